"""The data set `traffic` on three requests written by hand, and its join with events held against brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycascade.datasets import _traffic_files as files
from raycascade.datasets._traffic_credit import SHOWN, credited
from raycascade.datasets.traffic import MINUTE_MS, TrafficDataset
from raycascade.errors import ConfigError, DataError
from raycascade.plugins import options
from tests.traffic_world import write_events, write_requests

HOUR_MS = 3_600_000
START_MS = 1_767_225_600_000  # 2026-01-01
FEATURES = [
    {"kind": "id", "name": "city", "side": "user"}, {"kind": "id", "name": "item_id", "side": "item"},
    {"kind": "id", "name": "author", "side": "item"}, {"kind": "history", "max_len": 5},
    {"kind": "id", "name": "action", "side": "event"}]
LABELS = {"click": {"feature": "action", "values": ["click", 7]}, "long": {"feature": "seconds", "above": 30},
          "any": {}}
# Three requests of two stages. Shown first, then what only the ranker, and only the retriever, let through.
REQUESTS = [
    {"id": "q1", "user": 1, "ms": START_MS, "levels": [[10, 11], [12], [13, 14]]},
    {"id": "q2", "user": 1, "ms": START_MS + 10 * MINUTE_MS, "levels": [[11, 12], [10], [15]]},
    {"id": "q3", "user": 2, "ms": START_MS + 20 * MINUTE_MS, "levels": [[10, 13], [], [11]]},
]
EVENTS = [
    (1, 10, START_MS + MINUTE_MS, None, '{"action": "click"}'),  # q1 shows 10; q2 does not
    (1, 11, START_MS + 11 * MINUTE_MS, None, '{"action": "view", "seconds": 31}'),  # both show 11: the newest, q2
    (1, 11, START_MS + 12 * MINUTE_MS, "q1", '{"action": "7"}'),  # says that it belongs to q1
    (1, 13, START_MS + MINUTE_MS, None, '{"action": "click"}'),  # 13 was never shown to user 1
    (2, 13, START_MS + 19 * MINUTE_MS, None, '{"action": "click"}'),  # before q3
    (2, 10, START_MS + 85 * MINUTE_MS, None, '{"action": "click"}'),  # 65 minutes after q3
    (3, 10, START_MS + 200 * MINUTE_MS, None, "{}"),  # nobody's; it makes the log long enough
]


def write_items(folder: Path, ids: range = range(10, 20)) -> None:
    pq.write_table(pa.table({"item_id": list(ids), "author": [f"a{i % 3}" for i in ids]}), folder / "items.parquet")


def more_columns(count: int, city: list[Any] | None = None) -> dict[str, pa.Array]:
    return {"city": pa.array(city or ["graz"] * count, pa.string()),
            "history": pa.array([[10, 19]] * count, pa.list_(pa.int64())),
            "history_action": pa.array([["view", None]] * count, pa.list_(pa.string()))}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_items(tmp_path)
    write_requests(tmp_path, REQUESTS[:2], number=0, **more_columns(2))
    write_requests(tmp_path, REQUESTS[2:], number=1, **more_columns(1, ["wien"]))
    write_events(tmp_path, EVENTS)
    return tmp_path


def dataset(folder: Path, **changes: Any) -> TrafficDataset:
    spec = {"name": "traffic", "items": "items.parquet", "features": FEATURES, "labels": LABELS, "positive": "click",
            **changes}
    plugin, chosen = options("datasets", spec, "dataset")
    return plugin(chosen, raw=str(folder))


def rows_of(log: TrafficDataset) -> dict[str, dict[str, Any]]:
    """Requests by id, every list as a dict by candidate."""
    tables = [table for piece in log.slices() for table in log.read(piece)]
    found = {}
    for row in (row for table in tables for row in table.to_pylist()):
        items = row.pop("candidates")
        lists = {name: dict(zip(items, row[name], strict=True)) for name in
                 ("reached", "rank", "exposed", "relevance", *LABELS) if name in row}
        found[row["request_id"]] = {**row, "candidates": items, **lists}
    return found


def test_three_requests_become_the_lists_worked_out_by_hand(log: Path):
    found = rows_of(dataset(log))
    assert list(found) == ["q1", "q2", "q3"]
    first = found["q1"]
    assert (first["user_id"], first["time_ms"], first["city"]) == (1, START_MS, "graz")
    assert (first["history"], first["history_action"]) == ([10, 19], ["view", None])
    assert first["reached"] == {10: 3, 11: 3, 12: 2, 13: 1, 14: 1}
    assert first["rank"] == {10: 1, 11: 2, 12: 1, 13: 1, 14: 2}
    assert first["exposed"] == {10: True, 11: True, 12: False, 13: False, 14: False}
    assert first["click"] == {10: 1, 11: 1, 12: None, 13: None, 14: None}
    assert found["q2"]["click"] == {11: 0, 12: 0, 10: None, 15: None}
    assert found["q2"]["long"] == {11: 1, 12: 0, 10: None, 15: None}
    assert found["q2"]["any"] == {11: 1, 12: 0, 10: None, 15: None}
    assert found["q3"]["any"] == {10: 0, 13: 0, 11: None}
    assert found["q3"]["city"] == "wien"


def test_the_newest_request_is_found_in_another_piece_too(log: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("raycascade.datasets.traffic.PIECE_BYTES", 1)
    (log / "requests").rename(log / "old")
    for number, request in enumerate(REQUESTS):
        write_requests(log, [request], number=number, **more_columns(1))
    assert len(dataset(log).slices()) == 3
    assert rows_of(dataset(log))["q1"]["long"] == {10: 0, 11: 0, 12: None, 13: None, 14: None}
    assert rows_of(dataset(log))["q2"]["long"] == {11: 1, 12: 0, 10: None, 15: None}


def test_gains_add_to_the_level_that_an_item_reached(log: Path):
    found = rows_of(dataset(log, gains={"click": 2.0, "any": 0.5}))["q1"]
    assert found["relevance"] == pytest.approx({10: 3.5 + 2.5, 11: 3 + 1 / 3 + 2.5, 12: 2.5, 13: 1.5, 14: 1 + 1 / 3})
    assert "relevance" not in rows_of(dataset(log))["q1"]


def test_a_window_that_is_not_over_leaves_a_request_out_and_says_so(log: Path):
    late = dataset(log, window_minutes=185)
    assert list(rows_of(late)) == ["q1", "q2"]  # the log ends 200 minutes after q1
    assert late.notes == {"requests are so new that events of theirs may be missing (unfinished: drop)": 1}
    assert list(rows_of(dataset(log, window_minutes=185, unfinished="keep"))) == ["q1", "q2", "q3"]
    with pytest.raises(DataError, match=r"covers 200\.0 minutes, less than window_minutes 201, .*unfinished: keep"):
        dataset(log, window_minutes=201).slices()


def test_a_request_that_lacks_a_stage_is_left_out(tmp_path: Path):
    write_items(tmp_path)
    write_requests(tmp_path, [REQUESTS[0], {**REQUESTS[1], "degraded": True}], **more_columns(2))
    assert list(rows_of(dataset(tmp_path, unfinished="keep"))) == ["q1"]
    assert list(rows_of(dataset(tmp_path, unfinished="keep", degraded="keep"))) == ["q1", "q2"]


def test_every_level_gives_at_most_so_many_candidates_and_all_that_were_shown(tmp_path: Path):
    write_items(tmp_path, range(10, 100))
    levels = [list(range(10, 14)), list(range(20, 40)), list(range(40, 90))]
    requests = [{"id": f"q{n}", "user": n, "ms": START_MS, "levels": levels} for n in range(40)]
    write_requests(tmp_path, requests, **more_columns(40))
    found = rows_of(dataset(tmp_path, unfinished="keep", per_level=3))
    for row in found.values():
        assert sorted(row["reached"].values()) == [1] * 3 + [2] * 3 + [3] * 4
    assert rows_of(dataset(tmp_path, unfinished="keep", per_level=3)) == found
    drawn = [item for row in found.values() for item in row["candidates"] if row["reached"][item] == 1]
    assert len(set(drawn)) > 30  # of 50: another three for each request
    assert np.mean([row["reached"][row["candidates"][0]] for row in found.values()]) < 2.8  # not the best first
    everything = rows_of(dataset(tmp_path, unfinished="keep", per_level=None))
    assert {len(row["candidates"]) for row in everything.values()} == {74}


def test_items_that_are_gone_from_the_catalogue_leave_the_lists(log: Path):
    write_items(log, range(10, 13))
    smaller = dataset(log)
    assert rows_of(smaller)["q1"]["reached"] == {10: 3, 11: 3, 12: 2}
    assert smaller.notes["candidates are not in the catalogue any more (missing_items: drop)"] == 4
    assert len(rows_of(dataset(log, missing_items="refuse"))["q1"]["candidates"]) == 5


def test_a_catalogue_with_ids_of_another_type_is_refused(log: Path):
    pq.write_table(pa.table({"item_id": ["10", "11"], "author": ["a", "b"]}), log / "items.parquet")
    with pytest.raises(DataError, match="candidates are int64, but item_id of the catalogue is string"):
        rows_of(dataset(log))


def test_a_file_that_is_older_than_a_feature_has_none_of_it(log: Path):
    older = {**REQUESTS[0], "id": "q0", "ms": START_MS - HOUR_MS}
    write_requests(log, [older], number=9, **{k: v for k, v in more_columns(1).items() if k != "city"})
    assert rows_of(dataset(log))["q0"]["city"] is None
    with pytest.raises(DataError, match="no 'citty'; did you mean 'city'"):
        rows_of(dataset(log, features=[{"kind": "id", "name": "citty", "side": "user"}, *FEATURES[1:]]))


def test_ids_that_are_numbers_in_one_file_and_text_in_another_need_a_word(log: Path):
    columns = more_columns(1) | {"city": pa.array([5], pa.int64())}
    write_requests(log, [{**REQUESTS[2], "id": "q4"}], number=9, **columns)
    with pytest.raises(DataError, match="'city' holds whole numbers, in other files text; add it to text_columns"):
        rows_of(dataset(log))
    assert rows_of(dataset(log, text_columns=["city"]))["q4"]["city"] == "5"


def test_what_requests_excluded_comes_along_on_request(tmp_path: Path):
    write_items(tmp_path)
    excluded = {"exclude": pa.array([[11], []], pa.list_(pa.int64()))}
    write_requests(tmp_path, REQUESTS[:2], **more_columns(2), **excluded)
    assert "exclude" not in rows_of(dataset(tmp_path, unfinished="keep"))["q1"]
    kept = rows_of(dataset(tmp_path, unfinished="keep", exclude="keep"))
    assert (kept["q1"]["exclude"], kept["q2"]["exclude"]) == ([11], [])


@pytest.mark.parametrize(("changes", "message"), [
    ({"labels": {"click": {"values": ["a"]}}}, "say nothing without the event's feature"),
    ({"labels": {"click": {"feature": "a", "values": ["a"], "above": 1}}}, "values and above exclude each other"),
    ({"positive": "clik"}, "positive 'clik' is not a label"), ({"gains": {"clik": 1}}, "did you mean 'click'"),
    ({"per_level": 0}, "per_level"), ({"window": 3}, "unknown key; did you mean 'window_minutes'"),
])
def test_options_that_say_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        dataset(tmp_path, **changes)


def test_a_folder_without_a_log_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no requests of a traffic log; set paths\.raw"):
        dataset(tmp_path).slices()
    (tmp_path / "requests").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "requests" / "mine.parquet")
    with pytest.raises(DataError, match=r"requests/mine\.parquet is not a file of a traffic log"):
        dataset(tmp_path).slices()


def test_a_damaged_file_and_one_of_another_format_are_named(log: Path):
    (path,) = (file.path for file in files.find(str(log), "events"))
    pq.write_table(pa.table({"a": [1]}), log / path)
    with pytest.raises(DataError, match=r"is of format 'none', this version reads '1'"):
        rows_of(dataset(log))
    (log / path).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"hand-000000\.parquet: cannot be read as Parquet"):
        rows_of(dataset(log))


# ---------------------------------------------------------------- the join
def by_brute_force(shown: list[dict[str, Any]], event: dict[str, Any], window_ms: int) -> int:
    """The rule in the words of the docstring, one event at a time."""
    mine = [(place, row) for place, row in enumerate(shown)
            if (row["user_id"], row["item_id"]) == (event["user_id"], event["item_id"])]
    if event["request_id"] is not None:
        mine = [(place, row) for place, row in mine if row["request_id"] == event["request_id"]]
    else:
        mine = [(place, row) for place, row in mine if row["time_ms"] <= event["time_ms"]]
    if not mine:
        return -1
    place, row = max(mine, key=lambda one: (one[1]["time_ms"], one[1]["request_id"], one[0]))
    return place if abs(row["time_ms"] - event["time_ms"]) <= window_ms else -1


@pytest.mark.parametrize("seed", range(8))
def test_events_are_credited_as_by_brute_force(seed: int):
    draw = np.random.default_rng(seed)

    def rows(count: int, *, named: bool) -> list[dict[str, Any]]:
        return [{"request_id": f"q{draw.integers(0, 60)}" if not named or draw.random() < 0.3 else None,
                 "user_id": str(draw.integers(0, 4)), "item_id": str(draw.integers(8, 14)),
                 "time_ms": int(draw.integers(0, 50))} for _ in range(count)]

    shown, events = rows(300, named=False), rows(400, named=True)
    kinds = pa.schema([("request_id", pa.string()), ("user_id", pa.string()), ("item_id", pa.string()),
                       ("time_ms", pa.int64())])
    found = credited(pa.Table.from_pylist(shown, kinds), pa.Table.from_pylist(events, kinds), 12)
    assert found.tolist() == [by_brute_force(shown, event, 12) for event in events]
    assert (found >= 0).sum() > 50


def test_without_events_or_shown_items_nothing_is_credited():
    kinds = pa.schema([(name, pa.int64() if name == "time_ms" else pa.string()) for name in SHOWN])
    one = pa.Table.from_pylist([{"request_id": "q", "user_id": "1", "item_id": "2", "time_ms": 3}], kinds)
    assert credited(one, kinds.empty_table(), 5).tolist() == []
    assert credited(kinds.empty_table(), one, 5).tolist() == [-1]
