"""Nothing at or after a moment can be seen before it: the log is changed from that moment on, and all that models see
of earlier requests stays the same, bit for bit."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from raycascade import plugins
from raycascade.batch import Batch, collate
from raycascade.datasets._impressions import to_requests
from raycascade.features import FeatureState
from raycascade.fitting import FitPart
from raycascade.items import ItemTable
from raycascade.schema import FeatureSchema

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
START_MS = 1_704_067_200_000  # Monday 2024-01-01, UTC
NUM_ITEMS = 15
SCHEMA = FeatureSchema.model_validate({
    "features": [
        {"kind": "id", "name": "user", "side": "user"}, {"kind": "dense", "name": "mood", "side": "context"},
        {"kind": "dense", "name": "score", "side": "context", "normalise": "quantile"},
        {"kind": "clock", "name": "hour", "part": "hour"},
        {"kind": "id", "name": "item_id", "side": "item"}, {"kind": "id", "name": "author", "side": "item"},
        {"kind": "age", "name": "age", "side": "item", "source": "born_ms"},
        {"kind": "count", "name": "views"}, {"kind": "count", "name": "views_12h", "window_hours": 12},
        {"kind": "count", "name": "clicks", "label": "click"},
        {"kind": "count", "name": "rate", "label": "click", "rate": True},
        {"kind": "match", "name": "same_author", "field": "author"},
        {"kind": "match", "name": "liked_author", "field": "author", "action": "watched", "values": ["1"]},
        {"kind": "cross", "name": "user_author", "parts": ["user", "author"], "buckets": 512},
        {"kind": "history", "max_len": 6}, {"kind": "id", "name": "watched", "side": "event"},
        {"kind": "age", "name": "event_age", "side": "event"},
    ],
    "labels": ["click"], "positive": "click", "count_bucket_hours": 6,
})
ITEMS = pa.table({"item_id": np.arange(NUM_ITEMS) * 3 + 100, "author": np.arange(NUM_ITEMS) % 4,
                  "born_ms": START_MS - np.arange(NUM_ITEMS) * DAY_MS})


def impressions(
    seed: int, *, num_rows: int = 600, first_ms: int = START_MS, last_ms: int = START_MS + 6 * DAY_MS
) -> pa.Table:
    """Rows of eight users; requests of one user hold a few rows of nearly the same time."""
    draw = np.random.default_rng(seed)
    user = draw.integers(0, 8, num_rows)
    moment = draw.integers(first_ms // 60_000, last_ms // 60_000, num_rows) // 90 * 90 * 60_000
    time = np.clip(moment + draw.integers(0, 1_000, num_rows), first_ms, last_ms - 1)
    return pa.table({
        "request_id": [f"{u}-{m}" for u, m in zip(user, moment, strict=True)], "user_id": user, "time_ms": time,
        "item_id": draw.integers(0, NUM_ITEMS, num_rows) * 3 + 100, "user": user, "mood": draw.normal(size=num_rows),
        "score": draw.normal(size=num_rows), "click": draw.integers(0, 2, num_rows),
        "watched": draw.integers(0, 3, num_rows),
    })


def before(log: pa.Table, t: int) -> pa.Table:
    return log.filter(pc.less(log["time_ms"], t))


def with_another_future(log: pa.Table, t: int, seed: int) -> pa.Table:
    """The rows before t, and other rows from t on: other items, labels, users' features and more of them."""
    end = max(pc.max(log["time_ms"]).as_py() + 1, t + DAY_MS)
    future = impressions(seed, num_rows=900, first_ms=t, last_ms=end)
    mine = future.set_column(4, "user", pa.array(np.full(900, 77))).set_column(5, "mood", pa.array(np.full(900, 1e6)))
    return pa.concat_tables([mine, before(log, t)])  # in another order, too


def fit(log: pa.Table, end_ms: int, *, items: pa.Table = ITEMS, schema: FeatureSchema = SCHEMA) -> FeatureState:
    """As `prepare` fits: on the rows of the training range alone."""
    part, training = FitPart(schema), before(log, end_ms)
    (part.add_requests if "candidates" in log.column_names else part.add_impressions)(training, where="log")
    part.add_items(items, where="items")
    return part.finish(items, as_of_ms=end_ms)


def requests_of(log: pa.Table) -> pa.Table:
    tables = to_requests(log, SCHEMA, history_len=6, exclude_seen=True, duplicates="drop")
    return pa.concat_tables(list(tables)).sort_by([("user_id", "ascending"), ("time_ms", "ascending")])


def tensors(requests: pa.Table, state: FeatureState, *, items: pa.Table = ITEMS) -> Batch:
    table = ItemTable.from_encoded(state.encode_items(items, where="items"), state)
    return collate(state.encode_requests(requests, where="log"), table)


def assert_same(one: Batch, other: Batch, *, targets: bool = True) -> None:
    for group in ("user", "item", "history"):
        for name, tensor in getattr(one, group).items():
            assert torch.equal(tensor, getattr(other, group)[name]), name
    for name in ("candidates_QC", "mask_QC", "time_ms_Q", "history_rows_QL", "history_mask_QL"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.request_ids == other.request_ids
    assert all(np.array_equal(a, b) for a, b in zip(one.exclude, other.exclude, strict=True))
    if targets:
        assert one.targets is not None
        assert other.targets is not None
        assert torch.equal(one.targets.relevance_QC, other.targets.relevance_QC)


def whole_requests_before(requests: pa.Table, log: pa.Table, t: int) -> pa.Table:
    """Requests all of whose rows lie before t (a later row of a request is a candidate of it, not a feature)."""
    late = set(log.filter(pc.greater_equal(log["time_ms"], t))["request_id"].to_pylist())
    return requests.filter(pa.array([one not in late for one in requests["request_id"].to_pylist()]))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_state_and_all_earlier_requests_ignore_what_comes_after_the_training_log(seed: int):
    log, t = impressions(seed), START_MS + 4 * DAY_MS
    other = with_another_future(log, t, seed + 10)
    mine, theirs = fit(log, t), fit(other, t)
    assert mine.dense == theirs.dense
    assert mine.label_rates == theirs.label_rates
    assert mine.counters.to_arrow().equals(theirs.counters.to_arrow(), check_metadata=True)
    for name, vocabulary in mine.vocabularies.items():
        assert vocabulary.values.equals(theirs.vocabularies[name].values), name
    one, two = (before(requests_of(table), t) for table in (log, other))
    assert len(one) > 50
    assert one.equals(two)
    assert_same(tensors(one, mine), tensors(two, theirs))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("hours", [25, 48, 71])
def test_with_the_same_fitted_scales_the_future_of_the_training_log_is_invisible_too(seed: int, hours: int):
    """Vocabularies and scales are constants fitted on the whole training log; everything that is counted or listed per
    request must come from before it."""
    log, t, end = impressions(seed), START_MS + hours * HOUR_MS, START_MS + 5 * DAY_MS
    other = with_another_future(log, t, seed + 20)
    mine = fit(log, end)
    theirs = replace(mine, counters=fit(other, end).counters)
    one, two = (whole_requests_before(before(requests_of(table), t), table, t) for table in (log, other))
    common = set(one["request_id"].to_pylist()) & set(two["request_id"].to_pylist())
    one, two = (table.filter(pc.is_in(table["request_id"], pa.array(sorted(common)))) for table in (one, two))
    assert len(one) > 20
    assert one.equals(two)
    items = ItemTable.from_encoded(mine.encode_items(ITEMS, where="items"), mine)
    changed = replace(items, state=theirs)  # the same scales of counts
    encoded = mine.encode_requests(one, where="log")
    assert_same(collate(encoded, items), collate(encoded, changed))
    later = encoded.set_column(encoded.column_names.index("time_ms"), "time_ms", pa.array(np.full(len(encoded), end)))
    assert not torch.equal(collate(later, items).item["views"], collate(later, changed).item["views"])


@pytest.mark.parametrize("seed", [4, 5])
def test_the_outcome_of_a_request_never_enters_its_own_features(seed: int):
    log, end = impressions(seed), START_MS + 5 * DAY_MS
    state, requests = fit(log, end), requests_of(log)
    items = ItemTable.from_encoded(state.encode_items(ITEMS, where="items"), state)
    for position in np.random.default_rng(seed).choice(len(requests), 12, replace=False):
        mine = requests.slice(int(position), 1)
        own = pc.equal(log["request_id"], mine["request_id"][0].as_py())
        other_click = pc.if_else(own, pc.subtract(1, log["click"]), log["click"])
        flipped = log.set_column(log.column_names.index("click"), "click", other_click)
        flipped = flipped.set_column(log.column_names.index("watched"), "watched", pc.if_else(own, 9, log["watched"]))
        again = requests_of(flipped).slice(int(position), 1)
        assert again["click"].to_pylist() != mine["click"].to_pylist()
        changed = replace(items, state=replace(state, counters=fit(flipped, end).counters))
        one = collate(state.encode_requests(mine, where="log"), items)
        two = collate(state.encode_requests(again, where="log"), changed)
        assert_same(one, two, targets=False)


def test_the_candidates_of_a_request_are_not_in_its_own_history_or_counts():
    log = pa.table({
        "request_id": ["a", "a", "b"], "user_id": [1, 1, 1], "time_ms": START_MS + np.array([0, 5, 7 * HOUR_MS]),
        "item_id": [100, 103, 100], "user": [1, 1, 1], "mood": [0.0, 1.0, 2.0], "score": [0.0, 1.0, 2.0],
        "click": [1, 0, 1], "watched": [1, 2, 1]})
    state = fit(log, START_MS + DAY_MS)
    first, second = requests_of(log).to_pylist()
    assert (first["candidates"], first["history"]) == ([100, 103], [])
    assert (second["candidates"], second["history"], second["history_watched"]) == ([100], [100, 103], [1, 2])
    items = ItemTable.from_encoded(state.encode_items(ITEMS, where="items"), state)
    batch = collate(state.encode_requests(requests_of(log), where="log"), items)
    mean, std = items.count_stats["clicks"]
    counted = torch.expm1(batch.item["clicks"] * std + mean)
    assert counted[0, :2].tolist() == pytest.approx([0, 0], abs=1e-4)
    assert counted[1, 0].item() == pytest.approx(1, abs=1e-4)


def test_rows_of_the_same_moment_do_not_see_each_other():
    log = impressions(6, num_rows=40)
    log = log.set_column(2, "time_ms", pa.array(np.full(40, START_MS))).set_column(
        0, "request_id", pa.array([f"r{i}" for i in range(40)]))
    requests = requests_of(log)
    assert requests["history"].to_pylist() == [[]] * len(requests)
    assert requests["exclude"].to_pylist() == [[]] * len(requests)


# ---------------------------------------------------------------- form requests
@pytest.fixture(scope="module")
def simulated() -> tuple[FeatureSchema, pa.Table, pa.Table]:
    options = {"name": "simulated", "num_users": 40, "num_items": 400, "num_days": 4}
    plugin, config = plugins.options("datasets", options, "dataset")
    dataset = plugin(config, raw="")
    rows = pa.concat_tables([table for piece in dataset.slices() for table in dataset.read(piece)]).combine_chunks()
    return dataset.schema(), dataset.items(), rows


def with_shuffled_future(log: pa.Table, t: int) -> pa.Table:
    """From t on: the rows in another order with the feedback, candidates and contexts of one another."""
    draw, after = np.random.default_rng(7), log.filter(pc.greater_equal(log["time_ms"], t))
    order = pa.array(draw.permutation(len(after)))
    kept = ("request_id", "user_id", "time_ms")
    mixed = pa.table({name: after[name] if name in kept else after[name].take(order) for name in after.column_names})
    assert not mixed["candidates"].equals(after["candidates"])
    return pa.concat_tables([mixed, mixed.slice(0, 20), before(log, t)])


def test_the_simulated_log_before_a_moment_ignores_the_requests_after_it(simulated: tuple):
    schema, items, log = simulated
    t = START_MS + 2 * DAY_MS
    other = with_shuffled_future(log, t)
    mine, theirs = (fit(table, t, items=items, schema=schema) for table in (log, other))
    assert mine.dense == theirs.dense
    assert mine.label_rates == theirs.label_rates
    one, two = (before(table, t) for table in (log, other))
    assert len(one) > 50
    assert_same(tensors(one, mine, items=items), tensors(two, theirs, items=items))


def test_counts_of_the_simulated_log_come_from_earlier_days_alone(simulated: tuple):
    schema, items, log = simulated
    t, end = START_MS + 2 * DAY_MS, START_MS + 4 * DAY_MS
    mine = fit(log, end, items=items, schema=schema)
    theirs = replace(mine, counters=fit(with_shuffled_future(log, t), end, items=items, schema=schema).counters)
    table = ItemTable.from_encoded(mine.encode_items(items, where="items"), mine)
    encoded = mine.encode_requests(before(log, t), where="log")
    assert_same(collate(encoded, table), collate(encoded, replace(table, state=theirs)))
    assert not np.array_equal(mine.counters.totals_MT, theirs.counters.totals_MT)


def test_the_feedback_of_a_logged_request_is_none_of_its_features(simulated: tuple):
    schema, items, log = simulated
    t = START_MS + 3 * DAY_MS
    state = fit(log, t, items=items, schema=schema)
    test = log.filter(pc.greater_equal(log["time_ms"], t)).slice(0, 50)
    blind = test.drop_columns(["reached", "rank", "exposed", *schema.labels])
    table = ItemTable.from_encoded(state.encode_items(items, where="items"), state)
    one = collate(state.encode_requests(test, where="log"), table)
    two = collate(state.encode_requests(blind, where="log", strict=False), table)
    assert two.targets is None
    assert_same(one, two, targets=False)
