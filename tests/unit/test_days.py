"""Training in order of time: a log cut into the days of its zone, and read day after day."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raycascade import shards as module, storage
from raycascade.shards import DAY_MS, ShardReader, Shards, by_day, publish, write_part
from tests import tiny_world

HOUR_MS, START_MS, GROUP = 3_600_000, tiny_world.START_MS, 16
ZONES = [0.0, 8.0, -5.5, 5.75]


def log(num_rows: int = 400, *, days: int = 5, seed: int = 1) -> pa.Table:
    """Rows at random moments in no order; about half of them within an hour of some zone's midnight."""
    draw = np.random.default_rng(seed)
    at_ms = START_MS + draw.integers(0, days * DAY_MS, num_rows)
    edge = draw.integers(1, days, num_rows) * DAY_MS - (draw.choice(ZONES, num_rows) * HOUR_MS).astype(np.int64)
    near = START_MS + edge + draw.integers(-2, 2, num_rows) * draw.integers(1, HOUR_MS // 2, num_rows)
    return pa.table({"id": np.arange(num_rows), "time_ms": np.where(draw.random(num_rows) < 0.5, at_ms, near)})


def day_of(time_ms: int, zone: float) -> int:
    return (time_ms + int(zone * HOUR_MS)) // DAY_MS


# ---------------------------------------------------------------- cutting
@pytest.mark.parametrize("zone", ZONES)
def test_a_log_falls_into_the_days_of_its_zone_in_order_of_time(zone: float):
    table = log()
    days = list(by_day(table, utc_offset_hours=zone))
    seen = [{day_of(t, zone) for t in day["time_ms"].to_pylist()} for day in days]
    assert [len(one) for one in seen] == [1] * len(days)
    order = [one.pop() for one in seen]
    assert order == sorted(set(order))
    rows = pa.concat_tables(days)
    assert rows["time_ms"].to_pylist() == sorted(table["time_ms"].to_pylist())
    assert sorted(rows["id"].to_pylist()) == table["id"].to_pylist()


def test_a_midnight_belongs_to_the_day_it_begins_and_equal_times_keep_their_order():
    table = pa.table({"time_ms": [START_MS + DAY_MS, START_MS, START_MS + DAY_MS - 1, START_MS + DAY_MS, START_MS],
                      "id": [0, 1, 2, 3, 4]})
    assert [day["id"].to_pylist() for day in by_day(table, utc_offset_hours=0.0)] == [[1, 4, 2], [0, 3]]
    assert [day["id"].to_pylist() for day in by_day(table, utc_offset_hours=1e-3)] == [[1, 4], [2, 0, 3]]


def test_no_rows_are_no_days():
    assert list(by_day(log(0), utc_offset_hours=3.0)) == []


# ---------------------------------------------------------------- reading
def published(root: Path, zone: float) -> Shards:
    """The log as three part files, each with rows of every day."""
    schema = tiny_world.SCHEMA.model_copy(update={"utc_offset_hours": zone})
    state = replace(tiny_world.fitted(), schema=schema)
    state.save(str(root / "v-1" / "features"))
    table = log()
    for number, rows in enumerate(np.array_split(np.arange(len(table)), [150, 180])):
        write_part(storage.join(str(root), "v-1/requests/train", f"part-{number:05d}.parquet"),
                   by_day(table.take(pa.array(rows)), utc_offset_hours=zone))
    publish(str(root), "v-1", {"requests": {"train": len(table)}})
    return Shards.open(str(root))


@pytest.fixture(scope="module", params=[0.0, 8.0, -5.5])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    """With row groups of 16 rows, three of which are shuffled together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_PER_GROUP", GROUP)
        patch.setattr(module, "WINDOW_GROUPS", 3)
        yield published(tmp_path_factory.mktemp("days"), request.param)


def days_read(shards: Shards, reader: ShardReader, epoch: int) -> list[tuple[int, list[int]]]:
    """(day, ids) in the order of reading, one entry a run of equal days."""
    zone = shards.state.schema.utc_offset_hours
    rows = [row for batch in reader.batches(epoch) for row in batch.to_pylist()]
    return [(day, [row["id"] for row in same])
            for day, same in groupby(rows, key=lambda row: day_of(row["time_ms"], zone))]


def test_a_row_group_never_spans_two_days_of_the_schemas_zone(shards: Shards):
    zone, found = shards.state.schema.utc_offset_hours, []
    for name, group, rows in shards.groups("train"):
        table = shards.read_group(name, group)
        assert len(table) == rows <= GROUP
        assert {day_of(t, zone) for t in table["time_ms"].to_pylist()} == {shards.day_of(name, group)}
        found += table["id"].to_pylist()
    assert sorted(found) == list(range(400))


@pytest.mark.parametrize("batch_size", [7, 64, 500])
def test_in_time_every_day_is_read_to_its_end_before_the_next_begins(shards: Shards, batch_size: int):
    zone, table = shards.state.schema.utc_offset_hours, log()
    days = days_read(shards, ShardReader(shards, "train", batch_size, seed=2, in_time=True), 0)
    assert [day for day, _ in days] == sorted({day_of(t, zone) for t in table["time_ms"].to_pylist()})
    for day, ids in days:
        mine = [i for i, t in enumerate(table["time_ms"].to_pylist()) if day_of(t, zone) == day]
        assert sorted(ids) == mine


def test_a_day_is_shuffled_anew_in_every_epoch_and_by_the_seed(shards: Shards):
    orders = [days_read(shards, ShardReader(shards, "train", 32, seed=seed, in_time=True), epoch)
              for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert orders[0] == orders[3]
    for other in orders[1:3]:
        for (day, ids), (same_day, others) in zip(orders[0], other, strict=True):
            assert day == same_day
            assert sorted(ids) == sorted(others)
            assert ids != others or len(ids) < 5


def test_without_in_time_the_days_are_mixed(shards: Shards):
    assert len(days_read(shards, ShardReader(shards, "train", 32, seed=1), 0)) > 10


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_reading_in_time_resumes_at_any_step_on_any_worker(shards: Shards, world_size: int):
    for rank in range(world_size):
        reader = ShardReader(shards, "train", 11, seed=4, rank=rank, world_size=world_size, in_time=True)
        whole = list(reader.batches(3))
        for start in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
            rest = list(reader.batches(3, start=start))
            assert len(rest) == len(whole) - start
            assert all(one.equals(other) for one, other in zip(rest, whole[start:], strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_workers_share_the_rows_and_each_reads_its_days_in_order(shards: Shards, world_size: int):
    readers = [ShardReader(shards, "train", 8, seed=5, rank=rank, world_size=world_size, in_time=True)
               for rank in range(world_size)]
    assert len({reader.num_steps(0) for reader in readers}) == 1
    shares = [days_read(shards, reader, 0) for reader in readers]
    for share in shares:
        order = [day for day, _ in share]
        assert order == sorted(set(order))
    ids = [one for share in shares for _, day in share for one in day]
    assert len(ids) == len(set(ids)) > 400 - world_size * (8 + GROUP)
