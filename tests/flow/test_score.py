"""Batch scoring with real actors: one row per request, all or nothing, recognised when it is asked for again."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raycascade import storage
from raycascade.bundle import load_bundle
from raycascade.errors import DataError
from raycascade.flows import score as flow
from raycascade.flows.score import Piece, pieces, score
from tests.tiny_world import raw_requests, write_bundle

pytestmark = pytest.mark.ray


def written(table: pa.Table, path: Path, *, row_group_size: int | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """700 requests in two files of several row groups; a tenth of the users is unknown."""
    rows = np.arange(700)
    table = pa.table({"request_id": [f"r{i}" for i in rows], "user_id": pa.array(100 + (rows * 7) % 28, pa.int64())})
    folder = tmp_path_factory.mktemp("requests")
    written(table.slice(0, 450), folder / "a.parquet", row_group_size=300)
    written(table.slice(450), folder / "day" / "b.parquet")
    written(table, folder / "_old" / "c.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def scored(ray_cluster: None, tiny_bundle: str, log: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    assert score(tiny_bundle, requests=log, out=str(out))["rows"] == 700
    return out


def test_every_request_has_one_row_with_the_answer_of_the_process(scored: Path, tiny_bundle: str):
    rows = {row["request_id"]: row for row in pq.read_table(scored).to_pylist()}
    assert sorted(rows) == sorted(f"r{i}" for i in range(700))
    bundle = load_bundle(tiny_bundle)
    sample = [rows[f"r{i}"] for i in range(0, 700, 61)]
    for row in sample:
        final = bundle.recommend(bundle.encode(pa.table({"user_id": [row["user_id"]]}))).final
        assert row["items"] == bundle.items.ids_of(final.kept()[0][0])
        np.testing.assert_allclose(row["scores"], final.scores_QC[0, :final.keep], rtol=1e-5, atol=1e-5)


def test_the_manifest_counts_the_rows_and_nothing_else_is_left(scored: Path):
    manifest = json.loads((scored / "_manifest.json").read_text())
    assert manifest["rows"] == 700
    assert manifest["files"] == sorted(path.name for path in scored.glob("*.parquet"))
    assert [path.name for path in scored.parent.iterdir()] == ["out"]


def test_the_same_bundle_and_requests_again_are_done_already(scored: Path, tiny_bundle: str, log: str):
    before = {path.name: path.stat().st_mtime_ns for path in scored.iterdir()}
    assert score(tiny_bundle, requests=log, out=str(scored))["rows"] == 700
    assert {path.name: path.stat().st_mtime_ns for path in scored.iterdir()} == before


def test_results_of_another_bundle_or_of_other_requests_are_not_overwritten(
    scored: Path, tiny_bundle: str, log: str, tmp_path: Path
):
    other = write_bundle(str(tmp_path / "other"), seed=12)
    with pytest.raises(DataError, match="results of another bundle; give a new folder"):
        score(other, requests=log, out=str(scored))
    fewer = written(pa.table({"user_id": [100]}), tmp_path / "fewer.parquet")
    with pytest.raises(DataError, match="results of other requests; give a new folder"):
        score(tiny_bundle, requests=fewer, out=str(scored))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(DataError, match="holds files that are not results"):
        score(tiny_bundle, requests=fewer, out=str(tmp_path / "mine"))


def test_requests_without_ids_are_named_by_file_and_row(ray_cluster: None, tiny_bundle: str, tmp_path: Path):
    table = raw_requests().drop_columns(["request_id"]).slice(0, 30)
    requests = written(table, tmp_path / "log.parquet", row_group_size=20)
    out = tmp_path / "out"
    out.mkdir()
    score(tiny_bundle, requests=requests, out=str(out))
    rows = {row["request_id"]: row for row in pq.read_table(out).to_pylist()}
    assert list(rows) == [f"log.parquet:{row}" for row in range(30)]
    bundle = load_bundle(tiny_bundle)
    final = bundle.recommend(bundle.encode(table.slice(25, 1).drop_columns(["candidates", "click"]))).final
    assert rows["log.parquet:25"]["items"] == bundle.items.ids_of(final.kept()[0][0])


@pytest.mark.parametrize(("name", "table", "message"), [
    ("twice", pa.table({"request_id": ["a", "b", "a"], "user_id": [1, 2, 3]}), "request_id a is there 2 times"),
    ("null", pa.table({"request_id": ["a", None], "user_id": [1, 2]}), "request_id is null in 1 rows"),
    ("users", pa.table({"uid": [1]}), "column 'user_id' is missing; did you mean 'uid'"),
    ("nobody", pa.table({"user_id": [1, None]}), "user_id is null in row 1"),
    ("words", pa.table({"user_id": ["a"]}), "'user_id' must hold int64"),
    ("empty", pa.table({"user_id": pa.array([], pa.int64())}), "no rows"),
])
def test_requests_that_cannot_be_scored_are_refused_before_anything_is_written(
    tiny_bundle: str, tmp_path: Path, name: str, table: pa.Table, message: str
):
    requests = written(table, tmp_path / "in" / f"{name}.parquet")
    with pytest.raises(DataError, match=message):
        score(tiny_bundle, requests=requests, out=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_that_is_no_parquet_is_refused(tiny_bundle: str, tmp_path: Path):
    (tmp_path / "x.parquet").write_text("user_id\n1\n")
    (tmp_path / "folder").mkdir()
    for name, message in (("x.parquet", "cannot be read as Parquet"), ("y", "no such file or folder"),
                          ("folder", r"no \.parquet files")):
        with pytest.raises(DataError, match=message):
            score(tiny_bundle, requests=str(tmp_path / name), out=str(tmp_path / "out"))


def test_nothing_is_left_of_a_run_that_fails_in_an_actor(ray_cluster: None, tiny_bundle: str, tmp_path: Path):
    table = pa.table({"user_id": range(600), "income": [*[1.0] * 599, float("nan")]})
    requests = written(table, tmp_path / "in.parquet")
    with pytest.raises(DataError, match="'income' holds nan"):
        score(tiny_bundle, requests=requests, out=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_pieces_cover_every_row_once():
    counts = {"a": [1000, 10], "b": [0, 600]}
    found = pieces(counts, num_actors=2)
    assert [piece.number for piece in found] == list(range(len(found)))
    for file, groups in counts.items():
        rows = [piece.position + i for piece in found if piece.file == file for i in range(piece.rows)]
        assert rows == list(range(sum(groups)))
    assert found[0] == Piece(0, "a", 0, 0, 256, 0)


def test_where_folders_cannot_be_renamed_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda uri: (store, uri.removeprefix("store://")))
    written(pa.table({"x": [1]}), tmp_path / ".work" / "part-000000.parquet")
    seen: list[list[str]] = []
    write_json = storage.write_json

    def noted(uri: str, content: object) -> None:
        seen.append(storage.list_files("store://out"))
        write_json(uri, content)

    monkeypatch.setattr(storage, "write_json", noted)
    flow.publish("store://.work", "store://out", {"rows": 1})
    assert seen == [["part-000000.parquet"]]
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest == {"rows": 1, "files": ["part-000000.parquet"]}
