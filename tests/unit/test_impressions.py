"""Impressions grouped into requests, against a brute-force reading of the same promise."""

import numpy as np
import pyarrow as pa
import pytest

from raycascade.datasets._impressions import check_duplicates, made_request_ids, to_requests
from raycascade.errors import DataError
from raycascade.schema import AgeFeature, ClockFeature, FeatureSchema, HistoryFeature, IdFeature, IdsFeature

MINUTE = 60_000
SCHEMA = FeatureSchema(
    features=(
        IdFeature(name="city", side="user"), IdsFeature(name="moods", side="context"),
        ClockFeature(name="hour", part="hour"), HistoryFeature(max_len=3), IdFeature(name="watched", side="event"),
        AgeFeature(name="age", side="event"),
    ),
    labels=("click", "like"),
)


def log_of(num_rows: int, *, seed: int, num_users: int = 4, num_items: int = 6) -> pa.Table:
    """Rows out of order, with ties in time, interleaved requests, repeated items and nulls."""
    rng = np.random.default_rng(seed)
    user = rng.integers(num_users, size=num_rows)
    return pa.table({
        "user_id": pa.array([f"u{value}" for value in user]),
        "time_ms": rng.integers(12, size=num_rows) * MINUTE,
        "item_id": rng.integers(num_items, size=num_rows),
        "request_id": pa.array([f"r{value}" for value in rng.integers(3, size=num_rows)]),
        "city": pa.array(rng.integers(9, size=num_rows), mask=rng.random(num_rows) < 0.2),
        "moods": pa.array([list(range(value)) for value in rng.integers(3, size=num_rows)], pa.list_(pa.int64())),
        "click": rng.integers(2, size=num_rows).astype(np.int8),
        "like": pa.array(rng.integers(2, size=num_rows).astype(np.int8), mask=rng.random(num_rows) < 0.3),
        "watched": rng.integers(2, size=num_rows),
        "row": np.arange(num_rows),  # keeps rows apart, so that none is a duplicate
    })


def brute_force(log: pa.Table, history_len: int) -> dict[tuple[str, str], dict[str, object]]:
    """Row by row: each (user, request id) with all that its request should hold."""
    rows = sorted(log.to_pylist(), key=lambda row: row["time_ms"])  # stable: input order among equals
    requests: dict[tuple[str, str], dict[str, object]] = {}
    for user, request_id in {(row["user_id"], row["request_id"]) for row in rows}:
        mine = [row for row in rows if row["user_id"] == user]
        members = [row for row in mine if row["request_id"] == request_id]
        head, shown = members[0], [row for row in members if row["item_id"] is not None]
        before = [row for row in mine if row["time_ms"] < head["time_ms"] and row["item_id"] is not None]
        past = before[max(0, len(before) - history_len):]
        requests[user, request_id] = {
            "request_id": request_id, "user_id": user, "time_ms": head["time_ms"], "city": head["city"],
            "moods": head["moods"], "history": [row["item_id"] for row in past],
            "history_time_ms": [row["time_ms"] for row in past], "history_watched": [row["watched"] for row in past],
            "candidates": [row["item_id"] for row in shown], "click": [row["click"] for row in shown],
            "like": [row["like"] for row in shown], "exposed": [True] * len(shown),
            "exclude": {row["item_id"] for row in before},
        }
    return requests


def grouped(log: pa.Table, *, history_len: int = 3, gap_minutes: float | None = None, max_requests: int = 4096
            ) -> dict[tuple[str, str], dict[str, object]]:
    tables = to_requests(log, SCHEMA, history_len=history_len, exclude_seen=True, gap_minutes=gap_minutes,
                         max_requests=max_requests)
    rows = [row for table in tables for row in table.to_pylist()]
    for row in rows:
        assert len(set(row["exclude"])) == len(row["exclude"]), "an item is excluded once"
        row["exclude"] = set(row["exclude"])
    requests = {(row["user_id"], row["request_id"]): row for row in rows}
    assert len(requests) == len(rows), "every request comes once"
    return requests


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("history_len", [0, 3, 100])
def test_every_request_equals_the_one_found_row_by_row(seed: int, history_len: int) -> None:
    log = log_of(120, seed=seed)
    assert grouped(log, history_len=history_len) == brute_force(log, history_len)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_without_an_item_gives_a_request_but_is_never_part_of_a_history(seed: int) -> None:
    log = log_of(120, seed=seed)
    items = pa.array(log["item_id"].to_pylist(), mask=np.random.default_rng(seed).random(120) < 0.3)
    log = log.set_column(log.column_names.index("item_id"), "item_id", items)
    assert grouped(log) == brute_force(log, 3)


def test_small_output_tables_hold_the_same_requests_in_the_same_order() -> None:
    log = log_of(200, seed=1, num_users=20)
    options = {"history_len": 3, "exclude_seen": True}
    whole = pa.concat_tables(to_requests(log, SCHEMA, **options))
    small = list(to_requests(log, SCHEMA, **options, max_requests=7))
    assert max(map(len, small)) == 7
    assert pa.concat_tables(small).equals(whole)


def test_lists_too_long_for_one_table_are_spread_over_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycascade.datasets._impressions.MAX_LIST_VALUES", 10)
    log = log_of(120, seed=2)
    tables = list(to_requests(log, SCHEMA, history_len=3, exclude_seen=True))
    assert all(len(table) == 1 or sum(map(len, table["candidates"].to_pylist())) <= 10 for table in tables)
    assert grouped(log) == brute_force(log, 3)


def test_without_exclude_seen_there_is_no_exclude_column() -> None:
    table = next(to_requests(log_of(9, seed=0), SCHEMA, history_len=3, exclude_seen=False))
    assert "exclude" not in table.column_names
    assert table["history"].to_pylist()


@pytest.mark.parametrize("seed", range(4))
def test_what_happens_at_or_after_a_request_changes_nothing_in_it_but_its_own_candidates(seed: int) -> None:
    log = log_of(150, seed=seed)
    before = grouped(log)
    rng = np.random.default_rng(seed + 100)
    for key in list(before)[:6]:
        later = log["time_ms"].to_numpy() >= before[key]["time_ms"]
        items, watched, click = (log[name].to_numpy().copy() for name in ("item_id", "watched", "click"))
        items[later] = rng.integers(100, 200, size=later.sum())
        watched[later], click[later] = 1 - watched[later], 1 - click[later]
        changed = log
        for name, values in (("item_id", items), ("watched", watched), ("click", click)):
            changed = changed.set_column(changed.column_names.index(name), name, pa.array(values))
        mine = (np.array(log["user_id"].to_pylist()) == key[0]) & (np.array(log["request_id"].to_pylist()) == key[1])
        shortened = changed.filter(pa.array(~later | mine))
        for other in (changed, shortened):
            after = grouped(other)[key]
            own = ("candidates", "click", "like", "exposed")
            assert [v for n, v in after.items() if n not in own] == [v for n, v in before[key].items() if n not in own]
            assert after["candidates"] != before[key]["candidates"], "the change must reach the candidates"


def simple(user: list[object], time_ms: list[int], item: list[int], **columns: object) -> pa.Table:
    return pa.table({"user_id": pa.array(user), "time_ms": time_ms, "item_id": item, **columns})


BARE = FeatureSchema(features=(HistoryFeature(max_len=5),))


def test_a_longer_silence_than_the_gap_begins_a_new_request() -> None:
    log = simple([1, 1, 1, 2, 1], [0, 30 * MINUTE, 60 * MINUTE + 1, 60 * MINUTE, 61 * MINUTE], [7, 8, 9, 7, 5])
    table = next(to_requests(log, BARE, history_len=5, exclude_seen=False, gap_minutes=30.0))
    assert table["request_id"].to_pylist() == ["1-0", "1-3600001", "2-3600000"]
    assert table["candidates"].to_pylist() == [[7, 8], [9, 5], [7]]
    assert table["history"].to_pylist() == [[], [7, 8], []]


def test_rows_with_an_id_keep_it_beside_rows_that_are_cut_at_gaps() -> None:
    log = simple([1, 1, 1], [0, 10, 20], [7, 8, 9], request_id=pa.array([None, "x", None]))
    table = next(to_requests(log, BARE, history_len=5, exclude_seen=False, gap_minutes=30.0))
    assert table["request_id"].to_pylist() == ["1-0", "x"]
    assert table["candidates"].to_pylist() == [[7, 9], [8]]


def test_a_row_without_an_id_and_without_a_rule_is_refused() -> None:
    log = simple([1, 1], [0, 10], [7, 8], request_id=pa.array([None, "x"]))
    with pytest.raises(DataError, match="user 1 has 1 rows without a request_id"):
        next(to_requests(log, BARE, history_len=5, exclude_seen=False))


def test_the_same_request_id_of_two_users_is_two_requests() -> None:
    log = simple([1, 2], [0, 10], [7, 8], request_id=pa.array([5, 5]))
    table = next(to_requests(log, BARE, history_len=5, exclude_seen=False))
    assert table.select(["request_id", "user_id", "candidates"]).to_pylist() == [
        {"request_id": 5, "user_id": 1, "candidates": [7]}, {"request_id": 5, "user_id": 2, "candidates": [8]}]


def test_days_begin_at_midnight_of_the_zone() -> None:
    before_midnight = 1_650_815_999_999  # 2022-04-24 23:59:59.999 in UTC+8
    moments = pa.array([before_midnight, before_midnight + 1])
    made = made_request_ids("day", pa.array(["a", "a"]), moments, moments, utc_offset_hours=8.0)
    assert made.to_pylist() == ["a-20220424", "a-20220425"]


def test_a_missing_column_is_named_with_the_nearest_one() -> None:
    log = pa.table({"user_id": [1], "times_ms": [0], "item_id": [7], "request_id": ["x"]})
    with pytest.raises(DataError, match="'time_ms' is missing; did you mean 'times_ms'"):
        next(to_requests(log, BARE, history_len=5, exclude_seen=False))


def test_a_partition_without_rows_gives_no_requests() -> None:
    assert list(to_requests(log_of(3, seed=0).slice(0, 0), SCHEMA, history_len=3, exclude_seen=True)) == []


def test_rows_equal_in_every_column_are_dropped_or_refused() -> None:
    first = {"user_id": [1, 1, 1, 1], "time_ms": [5, 5, 5, 5], "item_id": [7, 7, 7, 7], "note": ["a", "a", None, "b"],
             "score": [0.5, 0.5, 0.5, 0.5], "moods": [[1, 2], [1, 2], [1, 2], [2, 1]]}
    log = pa.table(first)
    kept = check_duplicates(log, "drop")
    assert kept.to_pylist() == [log.to_pylist()[i] for i in (0, 2, 3)]
    with pytest.raises(DataError, match=r"user 1, item 7, time_ms 5 is logged more than once.*1 such rows.*drop"):
        check_duplicates(log, "refuse")


def test_lists_in_another_order_and_nulls_beside_zeros_are_not_duplicates() -> None:
    log = pa.table({"user_id": [1] * 4, "time_ms": [5] * 4, "item_id": [7] * 4,
                    "moods": pa.array([[1, 2], [2, 1], [], None], pa.list_(pa.int64())),
                    "score": pa.array([0.0, 0.0, 0.0, None]), "count": pa.array([0, 0, None, 0])})
    assert check_duplicates(log, "refuse").equals(log)
    same = pa.concat_tables([log, log])
    assert check_duplicates(same, "drop").equals(log)


@pytest.mark.parametrize("seed", range(3))
def test_dropping_duplicates_equals_a_set_of_rows(seed: int) -> None:
    log = log_of(400, seed=seed, num_users=2, num_items=2).drop_columns(["row", "moods", "city"])
    seen: list[dict[str, object]] = []
    for row in log.to_pylist():
        if row not in seen:
            seen.append(row)
    assert len(seen) < len(log)
    assert check_duplicates(log, "drop").to_pylist() == seen
