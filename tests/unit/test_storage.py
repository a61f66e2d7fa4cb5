"""Files by URI: what is written comes back, and a write that fails leaves the old content and nothing else."""

import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from raycascade import storage
from raycascade.errors import DataError


def test_what_is_written_comes_back_and_folders_are_made(tmp_path: Path):
    uri = storage.join(str(tmp_path), "a", "b.json")
    storage.write_json(uri, {"one": [1, None, 2**200]})
    assert storage.read_json(uri) == {"one": [1, None, 2**200]}
    table = pa.table({"x": pa.array([1, None], pa.int64()), "y": [["a"], []]}).replace_schema_metadata({"k": "v"})
    storage.write_arrow(storage.join(str(tmp_path), "c", "d.arrow"), table)
    assert storage.read_arrow(storage.join(str(tmp_path), "c", "d.arrow")).equals(table, check_metadata=True)
    assert storage.list_files(str(tmp_path)) == ["a/b.json", "c/d.arrow"]
    storage.copy_file(uri, storage.join(str(tmp_path), "e", "f.json"))
    assert storage.read_bytes(storage.join(str(tmp_path), "e", "f.json")) == storage.read_bytes(uri)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    uri = str(tmp_path / "manifest.json")
    storage.write_json(uri, {"version": 1})

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="no space left"):
        storage.write_json(uri, {"version": 2})
    assert storage.read_json(uri) == {"version": 1}
    assert storage.list_files(str(tmp_path)) == ["manifest.json"]


def test_content_that_cannot_be_json_leaves_the_old_file(tmp_path: Path):
    uri = str(tmp_path / "manifest.json")
    storage.write_json(uri, {"version": 1})
    with pytest.raises(TypeError):
        storage.write_json(uri, {"version": object()})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"version": 1}


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nothing\.json: no such file; check the path"):
        storage.read_json(str(tmp_path / "nothing.json"))


def test_folders_are_removed_with_all_below_them_and_nothing_happens_twice(tmp_path: Path):
    storage.write_bytes(str(tmp_path / "a" / "b" / "c"), b"1")
    storage.remove_folder(str(tmp_path / "a"))
    storage.remove_folder(str(tmp_path / "a"))
    assert not storage.exists(str(tmp_path / "a"))
    assert storage.list_files(str(tmp_path / "a")) == []


def test_the_digest_is_that_of_the_bytes(tmp_path: Path):
    content = bytes(range(256)) * 40_000
    storage.write_bytes(str(tmp_path / "x"), content)
    assert storage.sha256(str(tmp_path / "x")) == hashlib.sha256(content).hexdigest()


def test_paths_are_absolute_and_uris_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x") == str(tmp_path / "x")
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"
    assert storage.join("s3://bucket/x/", "y", "z") == "s3://bucket/x/y/z"
    assert storage.join("/", "y") == "/y"
