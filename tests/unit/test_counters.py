"""Counts before a moment against a loop over all events, and what must never enter them."""

import numpy as np
import pytest

from raycascade.counters import HOUR_MS, Counters

NAMES = ("exposure", "click")
START_MS = 1_704_067_200_000  # 2024-01-01


def events(seed: int, num_events: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Item rows 2 to 9, times over eight days, clicks."""
    draw = np.random.default_rng(seed)
    times = START_MS + draw.integers(0, 8 * 24 * HOUR_MS, num_events)
    return draw.integers(2, 10, num_events), times, draw.integers(0, 2, num_events)


def built(rows: np.ndarray, times: np.ndarray, clicks: np.ndarray, *, bucket_ms: int, offset_ms: int) -> Counters:
    counts = np.stack([np.ones(len(rows)), clicks], axis=1)
    bucket = (times + offset_ms) // bucket_ms
    return Counters.from_events(NAMES, rows, bucket, counts, bucket_ms=bucket_ms, offset_ms=offset_ms)


def brute_force(
    rows: np.ndarray, times: np.ndarray, values: np.ndarray, row: int, at_ms: int, *, bucket_ms: int, offset_ms: int,
    window_ms: int | None
) -> float:
    now, total = (at_ms + offset_ms) // bucket_ms, 0.0
    for event_row, time, value in zip(rows, times, values, strict=True):
        bucket = (time + offset_ms) // bucket_ms
        recent = window_ms is None or bucket >= now - max(1, window_ms // bucket_ms)
        total += value if event_row == row and bucket < now and recent else 0.0
    return total


@pytest.mark.parametrize("window_hours", [None, 1, 24, 72])
@pytest.mark.parametrize(("bucket_hours", "offset_hours"), [(1, 0.0), (24, 0.0), (24, 8.0), (24, -5.5), (6, 5.75)])
def test_counts_equal_a_loop_over_all_events(bucket_hours: int, offset_hours: float, window_hours: int | None):
    rows, times, clicks = events(1)
    scale = {"bucket_ms": bucket_hours * HOUR_MS, "offset_ms": int(offset_hours * HOUR_MS)}
    counters = built(rows, times, clicks, **scale)
    window_ms = None if window_hours is None else window_hours * HOUR_MS
    draw = np.random.default_rng(2)
    asked_rows = draw.integers(0, 12, 300)  # 0, 1, 10 and 11 were never seen
    asked_ms = START_MS + draw.integers(-24 * HOUR_MS, 10 * 24 * HOUR_MS, 300)
    asked_ms[:50] = (asked_ms[:50] + scale["offset_ms"]) // scale["bucket_ms"] * scale["bucket_ms"] - scale["offset_ms"]
    for name, values in (("exposure", np.ones(len(rows))), ("click", clicks)):
        expected = [brute_force(rows, times, values, row, at, window_ms=window_ms, **scale)
                    for row, at in zip(asked_rows, asked_ms, strict=True)]
        assert counters.as_of(asked_rows, asked_ms, name, window_ms).tolist() == expected
        assert sum(expected) > 0


def test_nothing_of_the_requests_own_bucket_or_later_is_counted():
    hour = HOUR_MS
    rows, times = np.array([2, 2, 2, 2]), START_MS + np.array([0, 23 * hour, 24 * hour, 49 * hour])
    counters = built(rows, times, np.ones(4), bucket_ms=24 * hour, offset_ms=0)
    day = 24 * hour
    for at, expected in ((0, 0), (day - 1, 0), (day, 2), (2 * day - 1, 2), (2 * day, 3), (3 * day, 4)):
        assert counters.as_of(np.array([2]), np.array([START_MS + at]), "click").tolist() == [expected]


def test_days_change_at_midnight_of_the_zone():
    midnight_in_china = START_MS - 8 * HOUR_MS
    rows, times = np.array([2]), np.array([midnight_in_china - 1])
    counters = built(rows, times, np.ones(1), bucket_ms=24 * HOUR_MS, offset_ms=8 * HOUR_MS)
    seen = counters.as_of(np.array([2, 2]), np.array([midnight_in_china - 1, midnight_in_china]), "exposure")
    assert seen.tolist() == [0, 1]


@pytest.mark.parametrize("seed", [3, 4])
def test_events_at_or_after_a_moment_change_no_count_before_it(seed: int):
    rows, times, clicks = events(seed)
    scale = {"bucket_ms": 6 * HOUR_MS, "offset_ms": 0}
    t = START_MS + 100 * HOUR_MS
    kept = times < t
    draw = np.random.default_rng(seed)
    other_rows, other_clicks = draw.integers(2, 30, (~kept).sum()), draw.integers(0, 9, (~kept).sum())
    other = built(np.concatenate([rows[kept], other_rows]), np.concatenate([times[kept], times[~kept] + 5]),
                  np.concatenate([clicks[kept], other_clicks]), **scale)
    asked_rows = np.tile(np.arange(12), 40)
    asked_ms = np.repeat(np.linspace(START_MS, t - 1, 40).astype(np.int64), 12)
    for window_ms in (None, 24 * HOUR_MS):
        before = built(rows, times, clicks, **scale).as_of(asked_rows, asked_ms, "click", window_ms)
        assert before.sum() > 0
        assert other.as_of(asked_rows, asked_ms, "click", window_ms).tolist() == before.tolist()


def test_shapes_broadcast_and_one_time_serves_the_whole_catalogue():
    counters = built(*events(5), bucket_ms=HOUR_MS, offset_ms=0)
    rows, times = np.arange(12), START_MS + np.arange(3)[:, None] * 48 * HOUR_MS
    table = counters.as_of(rows, times, "exposure")
    assert table.shape == (3, 12)
    for q in range(3):
        assert table[q].tolist() == counters.as_of(rows, int(times[q, 0]), "exposure").tolist()


def test_equal_pairs_of_item_and_bucket_are_added_up_in_any_order():
    rows, bucket, counts = np.array([3, 2, 3, 2]), np.array([1, 0, 1, 1]), np.array([[1, 0], [2, 1], [4, 1], [8, 1]])
    one = Counters.from_events(NAMES, rows, bucket, counts, bucket_ms=HOUR_MS)
    two = Counters.from_events(NAMES, rows[::-1], bucket[::-1], counts[::-1], bucket_ms=HOUR_MS)
    np.testing.assert_array_equal(one.totals_MT, two.totals_MT)
    assert one.as_of(np.array([2, 3]), 9 * HOUR_MS, "exposure").tolist() == [10, 5]


def test_a_log_without_events_counts_nothing():
    for counters in (Counters.empty(NAMES), Counters.from_events(
            NAMES, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2)), bucket_ms=HOUR_MS)):
        assert counters.as_of(np.arange(4), START_MS, "click").tolist() == [0, 0, 0, 0]
        again = Counters.from_arrow(counters.to_arrow())
        assert again.as_of(np.arange(4), START_MS, "click", HOUR_MS).tolist() == [0, 0, 0, 0]


def test_counters_come_back_from_arrow():
    counters = built(*events(6), bucket_ms=24 * HOUR_MS, offset_ms=8 * HOUR_MS)
    again = Counters.from_arrow(counters.to_arrow())
    assert (again.names, again.start_ms, again.bucket_ms, again.span) == (
        counters.names, counters.start_ms, counters.bucket_ms, counters.span)
    np.testing.assert_array_equal(again.keys_M, counters.keys_M)
    np.testing.assert_array_equal(again.totals_MT, counters.totals_MT)
