"""Frozen semantic ids as a folder: the same tokens after a round trip, no leakage, and refusals in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycascade.counters import Counters
from raycascade.errors import BundleError, DataError
from raycascade.semantic_ids.artefact import ItemContent, SemanticIds
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.semantic_ids.tokenizers import Tokenizer
from raycascade.semantic_ids.training import RQVAETraining

CONFIG = RQVAE.Config(levels=3, codes=8, hidden=(12,), dim=4, batch=32, steps=15, reset_every=5)
KINDS: dict[str, dict[str, Any]] = {"unigram": {}, "bigram": {"rows": 40}, "pieces": {"rows": 60, "corpus": 300}}
DAY_MS = 86_400_000


def _content(items: int = 80) -> ItemContent:
    """Item 3 has no content, every fifth item is new."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(items, 6)).astype(np.float32)
    vectors[3] = 0
    shown = rng.integers(1, 40, items)
    shown[::5] = 0
    return ItemContent(pa.array([f"i{number}" for number in range(items)]), vectors, shown)


def _build(content: ItemContent, kind: str = "pieces") -> SemanticIds:
    training = RQVAETraining(CONFIG, *content.training_rows())
    options = Tokenizer.Config.model_validate({"kind": kind, **KINDS[kind]})
    return SemanticIds.build(training.run(), options, content, period_ms=(0, DAY_MS), curves=training.curves)


@pytest.fixture(scope="module")
def built() -> SemanticIds:
    return _build(_content())


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- there and back
@pytest.mark.parametrize("kind", KINDS)
def test_saved_ids_give_the_same_tokens_when_loaded(tmp_path: Path, kind: str):
    built = _build(_content(), kind)
    version = built.save(str(tmp_path))
    loaded = SemanticIds.load(str(tmp_path))
    unseen = np.random.default_rng(9).normal(size=(50, 6)).astype(np.float32)
    assert loaded.tokens(unseen).to_arrow() == built.tokens(unseen).to_arrow()
    assert loaded.version == version == json.loads((tmp_path / "manifest.json").read_text())["sid_version"]
    assert loaded.num_rows == built.num_rows
    assert loaded.item_ids == built.item_ids
    assert (loaded.codes_NL == built.codes_NL).all()
    assert loaded.report == built.report
    assert loaded.facts == {"period_ms": [0, DAY_MS], "fingerprint": _content().fingerprint()}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_folder_has_the_files_it_promises_and_no_other(tmp_path: Path, built: SemanticIds):
    built.save(str(tmp_path))
    assert set(_bytes(tmp_path)) == {"rqvae.safetensors", "rqvae.json", "tokenizer.json", "pieces.model",
                                     "codes.parquet", "report.json", "manifest.json"}
    codes = pq.read_table(tmp_path / "codes.parquet")
    assert codes.column_names == ["item_id", "codes"]
    assert codes["codes"][3].as_py() is None
    assert codes["codes"][4].as_py() == built.codes_NL[4].tolist()


def test_items_without_content_have_no_tokens_and_known_items_those_of_their_vector(built: SemanticIds):
    content = _content()
    lists = built.tokens(content.vectors_NV).to_arrow().to_pylist()
    assert lists[3] == []
    assert all(1 <= len(tokens) <= 3 for number, tokens in enumerate(lists) if number != 3)
    assert built.tokens(content.vectors_NV[7:8]).to_arrow().to_pylist() == lists[7:8]
    assert built.tokens(2 * content.vectors_NV).to_arrow().to_pylist() == lists
    assert (built.report["items"], built.report["new_items"]) == (79, 16)
    assert built.report["tokens"]["rows"] == built.num_rows


def test_items_of_equal_content_have_equal_tokens(built: SemanticIds):
    twins = np.repeat(_content().vectors_NV[10:20], 2, axis=0)
    lists = built.tokens(twins).to_arrow().to_pylist()
    assert lists[::2] == lists[1::2]


# ---------------------------------------------------------------- leakage
def test_items_that_appear_after_training_change_no_byte_of_what_was_learned(tmp_path: Path, built: SemanticIds):
    content = _content()
    rng = np.random.default_rng(8)
    order = rng.permutation(1080)
    old = np.flatnonzero(order < 80)
    mixed = np.argsort(np.concatenate([old, np.setdiff1d(np.arange(1080), old)]))  # old items keep their order
    new_ids = pa.array([f"new{number}" for number in range(1000)])
    later = ItemContent(
        pa.concat_arrays([content.item_ids, new_ids]).take(pa.array(mixed)),
        np.concatenate([content.vectors_NV, 50 + rng.normal(size=(1000, 6)).astype(np.float32)])[mixed],
        np.concatenate([content.impressions_N, np.zeros(1000, int)])[mixed])
    again = _build(later)
    built.save(str(tmp_path / "before"))
    again.save(str(tmp_path / "after"))
    before, after = _bytes(tmp_path / "before"), _bytes(tmp_path / "after")
    for name in ("rqvae.safetensors", "rqvae.json", "tokenizer.json", "pieces.model"):
        assert before[name] == after[name], name
    assert again.version == built.version
    assert (again.codes_NL[old] == built.codes_NL).all()
    assert again.item_ids.take(pa.array(old)) == content.item_ids


def test_the_items_of_the_training_period_do_change_what_is_learned(built: SemanticIds):
    content = _content()
    shown = content.impressions_N.copy()
    shown[5] += 30
    assert _build(replace(content, impressions_N=shown)).version != built.version


# ---------------------------------------------------------------- from a fitted state
def test_content_and_impressions_come_from_the_encoded_items_and_the_counts_of_training():
    flat = pa.array(np.arange(6, dtype=np.float32))
    items = pa.table({"item_key": ["a", "b", "c"], "content": pa.FixedSizeListArray.from_arrays(flat, 2)})
    counters = Counters.from_events(("exposure",), np.array([2, 2, 4]), np.array([10, 12, 12]),
                                    np.array([[3.0], [4.0], [5.0]]), bucket_ms=DAY_MS)
    content = ItemContent.of(items, "content", counters)
    assert content.vectors_NV.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert content.impressions_N.tolist() == [7, 0, 5]
    assert content.training_N.tolist() == [True, False, True]
    for column in ("item_key", "nothing"):
        with pytest.raises(DataError, match=f"{column!r} is not a vector feature of the items"):
            ItemContent.of(items, column, counters)


# ---------------------------------------------------------------- refusals
def _refused(folder: Path) -> str:
    with pytest.raises(BundleError) as error:
        SemanticIds.load(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_changed_and_foreign_files_are_refused_in_one_line(tmp_path: Path, built: SemanticIds):
    assert "no manifest.json, so no finished semantic ids" in _refused(tmp_path)
    built.save(str(tmp_path))
    good = _bytes(tmp_path)
    for name in sorted(set(good) - {"manifest.json"}):
        (tmp_path / name).write_bytes(good[name] + b" ")
        assert f"{name}: changed since it was written" in _refused(tmp_path)
        (tmp_path / name).unlink()
        assert f"{name}: missing" in _refused(tmp_path)
        (tmp_path / name).write_bytes(good[name])
    manifest = json.loads(good["manifest.json"])
    for changed, problem in ((manifest | {"format_version": 2}, "format 2, this version reads 1"),
                             (manifest | {"sid_version": "0" * 16}, "does not list the files of version 0000"),
                             ({}, "damaged"), (manifest | {"files": {}}, "does not list the files")):
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        assert problem in _refused(tmp_path)


def test_files_that_do_not_fit_one_another_are_refused(tmp_path: Path, built: SemanticIds):
    wider = RQVAE(CONFIG.model_copy(update={"dim": 5}), 6)
    wider.config = CONFIG
    replace(built, model=wider).save(str(tmp_path))
    assert "do not fit one another" in _refused(tmp_path)


def test_tokens_of_another_version_are_refused(built: SemanticIds):
    built.require_version(built.version, where="items")
    with pytest.raises(BundleError, match=f"items: tokens of semantic ids 0123, but these are {built.version}; run"):
        built.require_version("0123", where="items")


@pytest.mark.parametrize(("vectors", "problem"), [
    (np.zeros((1, 5), np.float32), "expected 6 numbers"), (np.full((1, 6), np.nan, np.float32), "NaN or infinity"),
])
def test_a_new_items_vector_that_does_not_fit_is_refused(built: SemanticIds, vectors: np.ndarray, problem: str):
    with pytest.raises(DataError, match=problem):
        built.tokens(vectors)
