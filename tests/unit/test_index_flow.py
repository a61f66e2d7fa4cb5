"""index: a new bundle beside the old one, with the same answers."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from raycascade import selfcheck
from raycascade.bundle import load_bundle, verify
from raycascade.flows.index import index


def test_the_new_bundle_is_whole_and_answers_as_the_old_one(tiny_bundle: str, tmp_path: Path):
    old = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    (old / "report.html").write_text("of the old bundle")
    (old / "evaluation.test.json").write_text("{}")
    result = index(str(old))
    assert result["items"] == load_bundle(tiny_bundle).items.num_items
    files = {file for file in verify(result["bundle"])["files"] if not file.startswith("selfcheck/")}
    assert files == set(verify(str(old))["files"])
    assert selfcheck.require_whole(load_bundle(result["bundle"]))
    assert not list(Path(result["bundle"]).glob("*.html"))
    asked = pa.table({"user_id": [100, 103, 999]})
    bundles = [load_bundle(uri) for uri in (tiny_bundle, result["bundle"])]
    before, after = (bundle.recommend(bundle.encode(asked)).final for bundle in bundles)
    assert np.array_equal(before.rows_QC, after.rows_QC)
    assert np.array_equal(before.scores_QC, after.scores_QC)


def test_the_same_bundle_gives_the_same_new_one_and_an_unfinished_one_is_replaced(tiny_bundle: str, tmp_path: Path):
    old = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    first = index(str(old))["bundle"]
    written = (Path(first) / "manifest.json").stat().st_mtime_ns
    assert index(str(old))["bundle"] == first
    assert (Path(first) / "manifest.json").stat().st_mtime_ns == written
    (Path(first) / "manifest.json").unlink()
    (Path(first) / "index" / "half").write_text("")
    assert index(str(old))["bundle"] == first
    assert "index/half" not in verify(first)["files"]
    assert Path(index(first)["bundle"]).name.count("-index-") == 1
