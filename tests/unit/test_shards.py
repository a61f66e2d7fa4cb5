"""Published shards: read once an epoch, resumed to the exact batch, and never read half-written or damaged."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raycascade import shards as module, storage
from raycascade.errors import ShardError
from raycascade.shards import ShardReader, Shards, by_day, publish, write_part
from tests import tiny_world

ROWS, GROUP = 200, 16
CUTS = (0, 90, 97, ROWS)


def write(root: Path, version: str = "v-1", *, rows: int = ROWS) -> str:
    """The tiny log as a finished but unpublished version of three part files."""
    state, raw = tiny_world.fitted(), tiny_world.raw_requests().slice(0, rows)
    state.save(str(root / version / "features"))
    encoded = state.encode_requests(raw, where="log")
    for number, (start, stop) in enumerate(pairwise(CUTS)):
        part = str(root / version / "requests" / "train" / f"part-{number:05d}.parquet")
        write_part(part, by_day(encoded.slice(start, stop - start), utc_offset_hours=0.0))
    items = state.encode_items(tiny_world.raw_items(), where="items")
    write_part(str(root / version / "items" / "part-00000.parquet"), iter([items]))
    return str(root)


@pytest.fixture
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_GROUP", GROUP)
    monkeypatch.setattr(module, "WINDOW_GROUPS", 3)


@pytest.fixture
def shards(tmp_path: Path, _small_groups: None) -> Shards:
    root = write(tmp_path)
    publish(root, "v-1", {"requests": {"train": ROWS}})
    return Shards.open(root)


def ids(tables: list[pa.Table]) -> list[str]:
    return [one for table in tables for one in table["request_id"].to_pylist()]


def every_id() -> list[str]:
    """In the order of the files: by part, then by time."""
    rows = tiny_world.raw_requests().to_pylist()
    parts = [sorted(rows[start:stop], key=lambda row: row["time_ms"]) for start, stop in pairwise(CUTS)]
    return [row["request_id"] for part in parts for row in part]


def day_of(request_id: str) -> int:
    return int(request_id[1:]) % 8 * 20 // 24  # a user's requests are 20 hours apart


# ---------------------------------------------------------------- reading
@pytest.mark.parametrize("batch_size", [1, 7, 50, 200, 333])
def test_one_worker_reads_every_row_once_an_epoch(shards: Shards, batch_size: int):
    reader = ShardReader(shards, "train", batch_size, seed=3)
    batches = list(reader.batches(0))
    assert sorted(ids(batches)) == sorted(every_id())
    assert len(batches) == reader.num_steps(0) == -(-ROWS // batch_size)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_without_shuffling_the_order_is_that_of_the_files(shards: Shards):
    assert ids(list(ShardReader(shards, "train", 32, shuffle=False).batches(4))) == every_id()


def test_seed_and_epoch_decide_the_order(shards: Shards):
    def order(*, seed: int, epoch: int) -> list[str]:
        return ids(list(ShardReader(shards, "train", 32, seed=seed).batches(epoch)))

    assert order(seed=1, epoch=0) == order(seed=1, epoch=0)
    different = [order(seed=1, epoch=0), order(seed=1, epoch=1), order(seed=2, epoch=0), every_id()]
    assert len({tuple(one) for one in different}) == 4
    assert {tuple(sorted(one)) for one in different} == {tuple(sorted(every_id()))}


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_read_disjoint_rows_in_the_same_number_of_full_steps(shards: Shards, world_size: int):
    for epoch in range(3):
        readers = [ShardReader(shards, "train", 8, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
        batches = [list(reader.batches(epoch)) for reader in readers]
        steps = {reader.num_steps(epoch) for reader in readers}
        assert steps == {len(one) for one in batches}
        assert {len(table) for one in batches for table in one} == {8}
        seen = [row for one in batches for row in ids(one)]
        assert len(seen) == len(set(seen)) > ROWS - world_size * (8 + GROUP)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_reader_yields_exactly_the_batches_that_remain(shards: Shards, world_size: int):
    reader = ShardReader(shards, "train", 9, seed=2, rank=world_size - 1, world_size=world_size)
    whole = list(reader.batches(1))
    for start in (0, 1, 2, len(whole) // 2, len(whole) - 1, len(whole), len(whole) + 1):
        rest = list(reader.batches(1, start=start))
        assert len(rest) == max(0, len(whole) - start)
        assert all(one.equals(other) for one, other in zip(rest, whole[start:], strict=True))


def test_too_few_rows_for_the_workers_are_refused(shards: Shards):
    with pytest.raises(ShardError, match="too few rows for 2 workers with 150 requests a step each"):
        ShardReader(shards, "train", 150, world_size=2).num_steps(0)


def test_a_row_group_is_bounded_and_holds_rows_of_one_day(shards: Shards):
    days = [[day_of(f"q{i}") for i in range(start, stop)] for start, stop in pairwise(CUTS)]
    expected = [min(GROUP, part.count(day) - first) for part in days for day in sorted(set(part))
                for first in range(0, part.count(day), GROUP)]
    assert [rows for _, _, rows in shards.groups("train")] == expected
    for name, group, _ in shards.groups("train"):
        day = shards.day_of(name, group) - tiny_world.START_MS // tiny_world.DAY_MS
        assert {day_of(one) for one in ids([shards.read_group(name, group)])} == {day}


@pytest.mark.parametrize("world_size", [1, 2])
def test_in_time_the_days_come_one_after_the_other_and_are_shuffled_within(shards: Shards, world_size: int):
    seen: list[str] = []
    for rank in range(world_size):
        reader = ShardReader(shards, "train", 4, seed=1, rank=rank, world_size=world_size, in_time=True)
        order = ids(list(reader.batches(0)))
        assert [day_of(one) for one in order] == sorted(day_of(one) for one in order)
        assert order != ids(list(reader.batches(1)))
        seen += order
    assert len(seen) == len(set(seen))
    assert world_size > 1 or sorted(seen) == sorted(every_id())


def test_no_rows_make_no_file(tmp_path: Path):
    assert write_part(str(tmp_path / "part.parquet"), iter([])) == 0
    assert write_part(str(tmp_path / "part.parquet"), iter([pa.table({"x": pa.array([], pa.int64())})])) == 0
    assert not (tmp_path / "part.parquet").exists()


def test_state_and_items_are_those_that_were_written(shards: Shards):
    assert shards.state.space == tiny_world.fitted().space
    assert shards.items.ids_of(shards.items.all_rows) == tiny_world.raw_items()["item_id"].to_pylist()
    assert shards.splits == {"train": ROWS}
    with pytest.raises(ShardError, match="split 'test' has no requests"):
        shards.require_split("test")


# ---------------------------------------------------------------- publishing
def refused(root: Path, expected: str) -> None:
    with pytest.raises(ShardError, match=expected) as caught:
        Shards.open(str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_small_groups")
def test_a_version_without_a_manifest_is_invisible(tmp_path: Path):
    write(tmp_path)
    refused(tmp_path, "no manifest.json, so no finished shards; run `raycascade prepare`")
    publish(str(tmp_path), "v-1", {"requests": {"train": ROWS}})
    write(tmp_path, "v-2", rows=30)
    opened = Shards.open(str(tmp_path))
    assert opened.manifest["version"] == "v-1"
    assert len(ids(list(ShardReader(opened, "train", 64).batches(0)))) == ROWS


@pytest.mark.usefixtures("_small_groups")
def test_the_version_before_the_previous_one_is_removed(tmp_path: Path):
    for number in range(1, 4):
        write(tmp_path, f"v-{number}", rows=20 * number)
        held = Shards.open(str(tmp_path)) if number > 1 else None
        publish(str(tmp_path), f"v-{number}", {"requests": {"train": 20 * number}})
        if held is not None:  # a run that still reads the previous version
            assert len(held.read_group("requests/train/part-00000.parquet", 0)) > 0
        kept = [f"v-{n}" for n in range(max(1, number - 1), number + 1)]
        assert sorted(path.name for path in tmp_path.glob("v-*")) == kept
        assert Shards.open(str(tmp_path)).manifest["version"] == f"v-{number}"


def test_the_manifest_names_every_file_with_size_and_digest(shards: Shards):
    assert sorted(shards.manifest["files"]) == storage.list_files(shards.folder)
    for name, facts in shards.manifest["files"].items():
        assert facts["sha256"] == storage.sha256(f"{shards.folder}/{name}")
        assert facts["bytes"] == (Path(shards.folder) / name).stat().st_size


# ---------------------------------------------------------------- damage
@pytest.mark.parametrize("name", [
    "requests/train/part-00000.parquet", "items/part-00000.parquet", "features/state.json"])
def test_a_truncated_or_missing_file_is_named_when_the_shards_are_opened(shards: Shards, tmp_path: Path, name: str):
    file = Path(shards.folder) / name
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    refused(tmp_path, f"{name}: expected {len(content)} bytes, found {len(content) - 7} bytes; run prepare again")
    file.unlink()
    refused(tmp_path, f"{name}: expected {len(content)} bytes, found no file; run prepare again")


def test_another_format_or_a_damaged_manifest_is_refused(shards: Shards, tmp_path: Path):
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "format_version": 99}))
    refused(tmp_path, "manifest.json: format 99, this version reads 1; run prepare again")
    for text in ("{", "[]", "{}", ""):
        file.write_text(text)
        refused(tmp_path, r"manifest.json: damaged \(\w+\); run prepare again")


@pytest.mark.parametrize("name", ["requests/train/part-00000.parquet", "items/part-00000.parquet"])
def test_a_file_whose_bytes_changed_is_refused_when_it_is_read(shards: Shards, tmp_path: Path, name: str):
    file = Path(shards.folder) / name
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))
    opened = Shards.open(str(tmp_path))
    with pytest.raises(ShardError, match=f"{name}: cannot be read .*; run prepare again") as caught:
        opened.read_group(name, 0) if name.startswith("requests") else opened.table("items")
    assert "\n" not in str(caught.value)


def test_a_fitted_state_with_one_changed_byte_is_refused(shards: Shards, tmp_path: Path):
    file = Path(shards.folder) / "features" / "state.json"
    file.write_bytes(file.read_bytes().replace(b"1", b"2", 1))
    opened = Shards.open(str(tmp_path))
    with pytest.raises(ShardError, match=r"features/state\.json: changed since it was written; run prepare again"):
        _ = opened.state
