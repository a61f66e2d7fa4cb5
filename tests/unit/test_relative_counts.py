"""Volumes of the whole log, and counts relative to the catalogue's mean: against loops over all events, and by hand."""

import math

import numpy as np
import pyarrow as pa
import pytest

from raycascade.counters import HOUR_MS, Counters
from raycascade.fitting import FitPart
from raycascade.items import ItemTable
from raycascade.schema import CountFeature, FeatureSchema

NAMES, DAY_MS, START_MS = ("exposure", "click"), 24 * HOUR_MS, 1_704_067_200_000
SCHEMA = FeatureSchema.model_validate({
    "features": [{"kind": "count", "name": "views", "relative": True},
                 {"kind": "count", "name": "recent_clicks", "label": "click", "window_hours": 24, "relative": True}],
    "labels": ["click"], "positive": "click", "count_bucket_hours": 24,
})


@pytest.mark.parametrize("window_hours", [None, 1, 24, 72])
@pytest.mark.parametrize(("bucket_hours", "offset_hours"), [(1, 0.0), (24, 0.0), (24, -5.5), (6, 5.75)])
def test_volumes_equal_a_loop_over_all_events(bucket_hours: int, offset_hours: float, window_hours: int | None):
    draw = np.random.default_rng(1)
    times = START_MS + draw.integers(0, 8 * DAY_MS, 300)
    clicks = draw.integers(0, 2, 300)
    bucket_ms, offset_ms = bucket_hours * HOUR_MS, int(offset_hours * HOUR_MS)
    buckets = (times + offset_ms) // bucket_ms
    counters = Counters.from_events(NAMES, draw.integers(2, 10, 300), buckets,
                                    np.stack([np.ones(300), clicks], 1), bucket_ms=bucket_ms, offset_ms=offset_ms)
    asked_ms = START_MS + draw.integers(-2 * DAY_MS, 14 * DAY_MS, (20, 5))  # before the log, in it and long after it
    wide = None if window_hours is None else max(1, window_hours * HOUR_MS // bucket_ms)
    for name, values in (("exposure", np.ones(300)), ("click", clicks)):
        now_QT = (asked_ms + offset_ms) // bucket_ms
        seen_QTE = buckets < now_QT[:, :, None]
        if wide is not None:
            seen_QTE &= buckets >= now_QT[:, :, None] - wide
        window_ms = None if window_hours is None else window_hours * HOUR_MS
        volume_QT = counters.volume(asked_ms, name, window_ms)
        assert volume_QT.tolist() == (seen_QTE * values).sum(-1).tolist()
        assert volume_QT.max() > 0
        rows = np.arange(12)[:, None, None]
        np.testing.assert_array_equal(counters.as_of(rows, asked_ms, name, window_ms).sum(0), volume_QT)


def test_an_empty_log_has_no_volume():
    assert Counters.empty(NAMES).volume(np.array([0, START_MS]), "click").tolist() == [0, 0]


def test_a_volume_survives_the_way_through_arrow():
    counters = Counters.from_events(NAMES, np.array([2, 2, 5]), np.array([0, 1, 1]), np.ones((3, 2)), bucket_ms=DAY_MS)
    again = Counters.from_arrow(counters.to_arrow())
    assert again.volume(np.arange(4) * DAY_MS, "click").tolist() == [0, 1, 3, 3]


# ---------------------------------------------------------------- the feature
@pytest.fixture(scope="module")
def items() -> ItemTable:
    """Four items. Day 0 shows a twice and b once; day 1 shows a, b and c three times each; clicks: a, then b and b."""
    shown = [(0, "a", 1), (0, "a", 0), (0, "b", 0),
             *[(1, item, click) for item in "abc" for click in ((1, 1, 0) if item == "b" else (0, 0, 0))]]
    requests = pa.table({
        "request_id": [f"q{i}" for i in range(len(shown))], "user_id": ["u"] * len(shown),
        "time_ms": pa.array([START_MS + day * DAY_MS + i for i, (day, _, _) in enumerate(shown)], pa.int64()),
        "candidates": [[item] for _, item, _ in shown], "click": [[click] for _, _, click in shown],
    })
    catalogue, part = pa.table({"item_id": ["a", "b", "c", "d"]}), FitPart(SCHEMA)
    part.add_requests(requests, where="log")
    part.add_items(catalogue, where="items")
    state = part.finish(catalogue, as_of_ms=START_MS + 2 * DAY_MS)
    return ItemTable.from_encoded(state.encode_items(catalogue, where="items"), state)


def by_hand(count: int, total: int) -> float:
    return math.log1p(count) - math.log1p(total / 4)  # four items in the catalogue


def close(values: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)


def test_a_relative_count_is_the_log_of_the_count_less_that_of_the_catalogues_mean(items: ItemTable):
    rows = items.state.item_ids.lookup(pa.array(["a", "b", "c", "d"]))
    views, clicks = (CountFeature.model_validate(f.model_dump()) for f in SCHEMA.features)
    day_1, day_2, day_9 = (START_MS + day * DAY_MS for day in (1, 2, 9))
    close(items.count(views, rows, day_1), [by_hand(n, 3) for n in (2, 1, 0, 0)])
    close(items.count(views, rows, day_2), [by_hand(n, 12) for n in (5, 4, 3, 0)])
    # only the day before counts: one click on day 0, two on day 1, none later
    close(items.count(clicks, rows, day_1), [by_hand(n, 1) for n in (1, 0, 0, 0)])
    close(items.count(clicks, rows, day_2), [by_hand(n, 2) for n in (0, 2, 0, 0)])
    close(items.count(clicks, rows, day_9), [0, 0, 0, 0])


def test_padding_and_unknown_items_are_items_that_were_never_seen(items: ItemTable):
    mean, std = items.count_stats["views"]
    fields = items.fields(np.array([[0, 1], [0, 1]]), START_MS + np.array([[1], [2]]) * DAY_MS)
    expected = [[(by_hand(0, total) - mean) / std] * 2 for total in (3, 12)]
    np.testing.assert_allclose(fields["views"].numpy(), expected, rtol=1e-5)


def test_each_request_has_the_mean_of_its_own_moment(items: ItemTable):
    times_Q1 = START_MS + np.array([[0], [1], [2], [5]]) * DAY_MS
    together = items.fields(np.broadcast_to(items.all_rows, (4, 4)), times_Q1)
    for q in range(4):
        alone = items.fields(items.all_rows, int(times_Q1[q, 0]))
        assert all(together[name][q].tolist() == alone[name].tolist() for name in ("views", "recent_clicks"))
    assert len({tuple(row) for row in together["views"].tolist()}) == 3  # the log is over after the second day


def test_a_log_twice_as_busy_moves_a_relative_count_less_than_the_count_itself():
    rows, buckets = np.repeat(np.arange(2, 12), 10), np.tile(np.arange(10), 10)
    values = []
    for factor in (50, 100):
        counters = Counters.from_events(("exposure",), rows, buckets, np.full((100, 1), factor), bucket_ms=DAY_MS)
        count = counters.as_of(np.array([3]), 10 * DAY_MS, "exposure")
        values.append((np.log1p(count), np.log1p(count) - np.log1p(counters.volume(10 * DAY_MS, "exposure") / 10)))
    assert values[1][0] - values[0][0] == pytest.approx(math.log(2), abs=0.01)
    assert values[1][1] == pytest.approx(values[0][1], abs=1e-6)
