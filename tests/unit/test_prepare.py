"""prepare without Ray: where the log is cut, how many partitions there are and how often files are written change
nothing but the files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raycascade import storage
from raycascade.config import Config, parse_config
from raycascade.errors import DataError
from raycascade.flows import prepare as flow
from raycascade.flows._spill import SpillFile, buckets_of, partitions, read_partition, spilled_bytes

DAY_MS = 86_400_000
NAMES = ("requests/train", "requests/valid", "requests/test", "users")


def config(folder: Path) -> Config:
    return parse_config({
        "paths": {"shards": str(folder)}, "splits": {"valid_from": "2024-01-03", "test_from": "2024-01-04"},
        "dataset": {"name": "simulated", "num_users": 700, "num_items": 400, "num_days": 4, "pool": 120,
                    "funnel": [30, 20, 15], "per_level": 5, "shown": 3, "history_len": 10},
        "stages": [{"name": "retriever", "keep": 8, "model": {"name": "two_tower"}},
                   {"name": "ranker", "keep": 4, "model": {"name": "mlp"}}]}, where="test")


def shards_of(folder: Path, *, tasks: int, partition_bytes: int, least: int) -> flow.Plan:
    """The steps of `prepare` one after the other, in this process."""
    plan = flow.Plan(config(folder), str(folder / "work"), str(folder / "v"))
    dataset = plan.dataset()
    spills = flow.spill_tasks(dataset.slices(), most=tasks)
    spilled = [flow.Spill(plan)(task) for task in spills]
    state = flow.fit(plan, dataset.schema(), dataset.items(), len(spills))
    state.save(storage.join(plan.target, "features"))
    for partition in partitions(spilled, partition_bytes=partition_bytes, least=least):
        flow.Encode(plan)(partition)
    return plan


def rows_of(plan: flow.Plan, name: str) -> list[dict[str, Any]]:
    tables = [pq.read_table(file) for file in sorted(Path(plan.target, name).glob("*.parquet"))]
    table = pa.concat_tables(tables)
    return table.sort_by("user_key" if name == "users" else "request_id").to_pylist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> flow.Plan:
    return shards_of(tmp_path_factory.mktemp("whole"), tasks=1, partition_bytes=1 << 40, least=2)


@pytest.mark.parametrize(("tasks", "partition_bytes", "least"), [(100, 100_000, 2), (2, 1 << 40, 16)])
def test_other_tasks_and_partitions_give_the_same_rows_and_state(
    whole: flow.Plan, tmp_path: Path, tasks: int, partition_bytes: int, least: int
):
    other = shards_of(tmp_path, tasks=tasks, partition_bytes=partition_bytes, least=least)
    assert len(list(Path(other.target, "users").iterdir())) > 2
    for name in NAMES:
        assert rows_of(other, name) == rows_of(whole, name)
    for file in sorted(Path(whole.target, "features").iterdir()):
        assert file.read_bytes() == Path(other.target, "features", file.name).read_bytes(), file.name


def test_encoded_rows_beyond_what_is_held_go_to_further_files(
    whole: flow.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flow, "HELD_BYTES", 50_000)
    monkeypatch.setattr(flow, "ENCODE_ROWS", 100)
    other = shards_of(tmp_path, tasks=1, partition_bytes=1 << 40, least=2)
    files = sorted(Path(other.target, "requests/train").iterdir())
    assert len(files) > 4
    for name in NAMES:
        assert rows_of(other, name) == rows_of(whole, name)
    for file in files:
        groups = pq.ParquetFile(file)
        for group in range(groups.num_row_groups):
            days = groups.read_row_group(group, ["time_ms"])["time_ms"].to_numpy() // DAY_MS
            assert len(np.unique(days)) == 1


def test_pieces_share_tasks_only_where_there_are_many():
    assert flow.spill_tasks(["a", "b", "c"], most=3) == [[0, ["a"]], [1, ["b"]], [2, ["c"]]]
    assert flow.spill_tasks(["a", "b", "c", "d", "e"], most=3) == [[0, ["a", "b"]], [1, ["c", "d"]], [2, ["e"]]]


# ---------------------------------------------------------------- spilled rows
def spill(folder: Path, number: int, *tables: pa.Table) -> dict[str, Any]:
    with SpillFile(str(folder / f"{number}.arrow"), sort_bytes=4_000, batch_bytes=400) as file:
        for table in tables:
            file.add(table)
    return {"batches": file.batches}


@pytest.mark.parametrize("partition_bytes", [1, 500, 5_000, 1 << 30])
def test_every_row_is_in_the_partition_of_its_user_and_in_no_other(tmp_path: Path, partition_bytes: int):
    draw = np.random.default_rng(2)
    tables = [pa.table({"user_id": draw.integers(0, 60, rows), "row": pa.array(1000 * number + np.arange(rows))})
              for number, rows in enumerate((500, 1, 0, 77, 300))]
    spilled = [spill(tmp_path, 0, *tables[:3]), spill(tmp_path, 1, *tables[3:])]
    assert spilled_bytes(spilled) == 16 * 878
    ranges = partitions(spilled, partition_bytes=partition_bytes, least=2)
    read = [read_partition(lambda number: str(tmp_path / f"{number}.arrow"), one) for one in ranges[:2_000]]
    found = [table for table in read if table is not None]
    users = [set(table["user_id"].to_pylist()) for table in found]
    if len(ranges) <= 2_000:
        assert sorted(pa.concat_tables(found).to_pylist(), key=lambda row: row["row"]) == \
            pa.concat_tables(tables).to_pylist()
    assert sum(map(len, users)) == len(set().union(*users))
    for table in found:  # a user's rows stay in the order of the log
        for user in set(table["user_id"].to_pylist()):
            mine = table.filter(pc.equal(table["user_id"], user))["row"].to_pylist()
            assert mine == sorted(mine)


def test_the_number_of_partitions_follows_the_size_of_the_log():
    def count(num_files: int, megabytes: int) -> int:
        width = 65_536 // megabytes
        batches = [[number * width, (number + 1) * width - 1, 1 << 20] for number in range(megabytes)]
        ranges = partitions([{"batches": batches}] * num_files)
        assert max(len(one["batches"]) for one in ranges) <= num_files * (64 + 2)
        return len(ranges)

    assert count(1, 1) == 2
    assert count(6, 1) == 12
    assert count(100, 1) == 16
    assert count(30, 100) == 47
    assert count(750, 27) == 317  # 20 GB


def test_a_partition_is_about_as_large_as_asked(tmp_path: Path):
    table = pa.table({"user_id": np.arange(20_000), "row": np.arange(20_000)})
    spilled = [spill(tmp_path, 0, table)]
    sizes = [one.nbytes for partition in partitions(spilled, partition_bytes=16_000, least=2)
             if (one := read_partition(lambda _: str(tmp_path / "0.arrow"), partition)) is not None]
    assert len(sizes) == 20
    assert max(sizes) < 1.2 * 16_000


def test_files_whose_columns_differ_are_refused(tmp_path: Path):
    numbers, texts = pa.table({"user_id": [1, 2], "x": [1, 2]}), pa.table({"user_id": [1, 2], "x": ["a", "b"]})
    with pytest.raises(DataError, match="column 'x' is int64 in one file of the log and string in another"):
        spill(tmp_path, 0, numbers, texts)
    spilled = [spill(tmp_path, 0, numbers), spill(tmp_path, 1, texts)]
    whole = {"buckets": [0, 1 << 16], "batches": [[0, 0], [1, 0]]}
    assert len(spilled) == 2
    with pytest.raises(DataError, match="column 'x' is int64 in one file"):
        read_partition(lambda number: str(tmp_path / f"{number}.arrow"), whole)
    with pytest.raises(DataError, match="column 'x' is not in the same place in all files"):
        spill(tmp_path, 2, numbers, numbers.rename_columns(["user_id", "y"]))


def test_buckets_do_not_depend_on_the_type_of_an_integer():
    ids = [1, 2, 300]
    assert buckets_of(pa.array(ids, pa.int16())).tolist() == buckets_of(pa.array(ids, pa.int64())).tolist()
    assert len(set(buckets_of(pa.array(np.arange(50_000))).tolist())) > 30_000
