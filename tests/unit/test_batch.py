"""`collate` against loops over the raw log: every tensor a model sees, found a second time without it."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade.batch import Batch, collate
from raycascade.features import FeatureState
from raycascade.fitting import FitPart
from raycascade.items import ItemTable
from raycascade.keys import fold
from raycascade.schema import CountFeature, FeatureSchema
from tests import tiny_world
from tests.tiny_world import DAY_MS, START_MS

MORE: list[dict[str, Any]] = [
    {"kind": "match", "name": "same_item", "field": "item_id"}, {"kind": "match", "name": "same_tag", "field": "tags"},
    {"kind": "match", "name": "clicked_author", "field": "author", "action": "action", "values": ["click"]},
    {"kind": "match", "name": "author_rate", "field": "author", "action": "action", "values": ["click"], "rate": True},
    {"kind": "count", "name": "clicks_48h", "label": "click", "window_hours": 48},
    {"kind": "count", "name": "click_rate", "label": "click", "rate": True, "smoothing": 5.0},
    {"kind": "cross", "name": "city_device", "parts": ["city", "device"], "buckets": 32},
    {"kind": "clock", "name": "weekday", "part": "weekday", "utc_offset_hours": 8},
]


def schema_of(changes: dict[str, dict[str, Any]] | None = None) -> FeatureSchema:
    """The tiny log's schema with every kind of match; `changes` edits features by name."""
    tree = tiny_world.SCHEMA.model_dump(mode="json")
    features = [{**one, **(changes or {}).get(one["name"], {})} for one in [*tree["features"], *MORE]]
    return FeatureSchema.model_validate({**tree, "features": features})


def raw_requests() -> pa.Table:
    """The tiny log with lists of different lengths and what each stage of production did."""
    raw, draw = tiny_world.raw_requests(), np.random.default_rng(9)
    lengths = [0, *draw.integers(1, 7, len(raw) - 1)]
    for name in ("candidates", "click"):
        cut = [row[:n] for row, n in zip(raw[name].to_pylist(), lengths, strict=True)]
        raw = raw.set_column(raw.column_names.index(name), name, pa.array(cut, raw.schema.field(name).type))
    reached = [draw.integers(0, 4, n).tolist() for n in lengths]
    rank = [draw.integers(0, 5, n).tolist() for n in lengths]
    return raw.append_column("reached", pa.array(reached, pa.list_(pa.int64()))).append_column(
        "rank", pa.array(rank, pa.list_(pa.int64())))


def world(schema: FeatureSchema) -> ItemTable:
    part = FitPart(schema)
    part.add_requests(raw_requests(), where="log")
    part.add_items(tiny_world.raw_items(), where="items")
    state = part.finish(tiny_world.raw_items(), as_of_ms=START_MS + 7 * DAY_MS)
    return ItemTable.from_encoded(state.encode_items(tiny_world.raw_items(), where="items"), state)


@pytest.fixture(scope="module")
def items() -> ItemTable:
    return world(schema_of())


@pytest.fixture(scope="module")
def requests() -> pa.Table:
    return raw_requests()


@pytest.fixture(scope="module")
def batch(items: ItemTable, requests: pa.Table) -> Batch:
    return collate(items.state.encode_requests(requests, where="log"), items, keep=(3, 1), k=2)


RAW_ITEMS = {row["item_id"]: row for row in tiny_world.raw_items().to_pylist()}


def rows_of(state: FeatureState, name: str, values: list) -> list[int]:
    return state.vocabularies[name].lookup(pa.array(values)).tolist()


# ---------------------------------------------------------------- requests, candidates, history
def test_candidates_are_item_rows_and_padding_is_masked(batch: Batch, requests: pa.Table, items: ItemTable):
    for q, candidates in enumerate(requests["candidates"].to_pylist()):
        width = len(candidates)
        assert batch.mask_QC[q].tolist() == [True] * width + [False] * (6 - width)
        assert items.ids_of(batch.candidates_QC[q, :width].numpy()) == candidates
        assert batch.candidates_QC[q, width:].tolist() == [0] * (6 - width)
    assert batch.mask_QC[0].sum() == 0


def test_request_fields_are_those_of_the_encoded_rows(batch: Batch, requests: pa.Table, items: ItemTable):
    state = items.state
    assert batch.user["city"].tolist() == rows_of(state, "city", requests["city"].to_pylist())
    known = [value for value in requests["income"].to_pylist() if value is not None]
    mean, std = np.mean(known), np.std(known)
    expected = [0.0 if value is None else (value - mean) / std for value in requests["income"].to_pylist()]
    np.testing.assert_allclose(batch.user["income"].numpy(), expected, atol=1e-6)
    assert batch.user["income_missing"].tolist() == [float(value is None) for value in requests["income"].to_pylist()]
    hours = [time // 3_600_000 % 24 + 2 for time in requests["time_ms"].to_pylist()]
    assert batch.user["hour"].tolist() == hours
    days = [((time + 8 * 3_600_000 - START_MS) // DAY_MS) % 7 + 2 for time in requests["time_ms"].to_pylist()]
    assert batch.user["weekday"].tolist() == days, "2024-01-01 is a Monday, and the zone is eight hours ahead"
    assert batch.request_ids == tuple(requests["request_id"].to_pylist())
    assert batch.num_requests == len(requests)


def test_histories_hold_the_newest_events_left_aligned_with_their_ages(
    batch: Batch, requests: pa.Table, items: ItemTable
):
    most = min(10, max(len(row) for row in requests["history"].to_pylist()))
    assert batch.history_mask_QL.shape[1] == most
    for q, row in enumerate(requests.to_pylist()):
        past, times, actions = row["history"][-10:], row["history_time_ms"][-10:], row["history_action"][-10:]
        length, rest = len(past), [0] * (most - len(past))
        assert batch.history_mask_QL[q].tolist() == [True] * length + [False] * (most - length)
        assert items.ids_of(batch.history_rows_QL[q, :length].numpy()) == past
        assert batch.history_rows_QL[q, length:].tolist() == rest
        ages = [2 + min(31, math.floor(math.log2(1 + (row["time_ms"] - time) / 1000))) for time in times]
        assert batch.history["event_age"][q].tolist() == ages + rest
        acted = rows_of(items.state, "action", actions or ["none"])[:length]
        assert batch.history["action"][q].tolist() == acted + rest
        authors = rows_of(items.state, "author", [RAW_ITEMS[one]["author"] for one in past] or ["none"])[:length]
        assert batch.history["author"][q].tolist() == authors + rest


def test_a_request_without_history_or_candidates_is_all_padding(items: ItemTable, requests: pa.Table):
    nothing = requests.slice(0, 3).select(["request_id", "user_id", "time_ms", "city", "income", "device"])
    bare = collate(items.state.encode_requests(nothing, where="log", strict=False), items)
    assert bare.candidates_QC.shape == bare.mask_QC.shape == (3, 0)
    assert bare.history_mask_QL.shape == (3, 0)
    assert bare.targets is None
    for field in items.state.space.fields:
        group = {"request": bare.user, "event": bare.history}.get(field.side, bare.item)
        assert group[field.name].shape[:2] in ((3,), (3, 0), (3, field.width)), field.name


def test_every_field_of_the_space_is_there_with_its_shape_and_type(batch: Batch, items: ItemTable):
    groups = {"request": (batch.user, batch.time_ms_Q.shape), "item": (batch.item, batch.mask_QC.shape),
              "pair": (batch.item, batch.mask_QC.shape), "event": (batch.history, batch.history_mask_QL.shape)}
    for field in items.state.space.fields:
        group, shape = groups[field.side]
        tensor = group[field.name]
        assert tensor.shape == (*shape, *((field.width,) if field.form in ("ids", "vector") else ())), field.name
        assert tensor.dtype == (torch.int64 if field.form in ("id", "ids") else torch.float32), field.name
        if field.form in ("id", "ids"):
            assert 0 <= tensor.min() <= tensor.max() < field.num_rows, field.name
    assert set(batch.history) == {*items.state.space.history_fields, "action", "event_age"}


# ---------------------------------------------------------------- item fields
def test_item_fields_are_the_items_own_as_of_the_requests_time(batch: Batch, requests: pa.Table, items: ItemTable):
    for q, row in enumerate(requests.to_pylist()):
        for c, item in enumerate(row["candidates"]):
            raw = RAW_ITEMS[item]
            assert batch.item["author"][q, c] == rows_of(items.state, "author", [raw["author"]])[0]
            tags = items.state.vocabularies["tags"].lookup(pa.array(raw["tags"], pa.int64())).tolist()
            assert batch.item["tags"][q, c].tolist() == tags + [0] * (3 - len(tags))
            unit = np.array(raw["content"]) / np.linalg.norm(raw["content"])
            np.testing.assert_allclose(batch.item["content"][q, c].numpy(), unit, atol=1e-6)
            age = 2 + min(31, math.floor(math.log2(1 + (row["time_ms"] - raw["born_ms"]) / 1000)))
            assert batch.item["age"][q, c] == age
    padding = batch.item["author"][~batch.mask_QC]
    assert padding.eq(0).all()
    assert batch.item["content"][~batch.mask_QC].eq(0).all()


@pytest.mark.parametrize("name", ["views", "clicks_48h", "click_rate"])
def test_counts_are_those_of_earlier_days_of_the_log(name: str, batch: Batch, requests: pa.Table, items: ItemTable):
    feature = next(f for f in items.state.schema.features if f.name == name)
    assert isinstance(feature, CountFeature)
    rows = requests.to_pylist()

    def counted(item: int, time_ms: int, label: str | None) -> float:
        today = time_ms // DAY_MS
        first = 0 if feature.window_hours is None else today - feature.window_hours // 24
        earlier = [other for other in rows if first <= other["time_ms"] // DAY_MS < today]
        return float(sum(1 if label is None else other[label][c] for other in earlier
                         for c, shown in enumerate(other["candidates"]) if shown == item))

    total = sum(len(row["candidates"]) for row in rows)
    prior = sum(map(sum, (row["click"] for row in rows))) / total

    def value(item: int, time_ms: int) -> float:
        if not feature.rate:
            return math.log1p(counted(item, time_ms, None if feature.label == "exposure" else "click"))
        return (counted(item, time_ms, "click") + 5 * prior) / (counted(item, time_ms, None) + 5)

    final = [value(item, START_MS + 7 * DAY_MS) for item in RAW_ITEMS]
    mean, std = np.mean(final), np.std(final)
    for q in range(0, len(rows), 9):
        seen = [value(item, rows[q]["time_ms"]) for item in rows[q]["candidates"]]
        np.testing.assert_allclose(batch.item[name][q, :len(seen)].numpy(), (np.array(seen) - mean) / std, atol=1e-4)


# ---------------------------------------------------------------- pairs
def naive_matches(row: dict[str, Any], item: int, field: str, *, clicked: bool) -> int:
    def values(one: int) -> set:
        value = one if field == "item_id" else RAW_ITEMS[one][field]
        return set(value) if isinstance(value, list) else {value}

    events = list(zip(row["history"], row["history_action"], strict=True))[-10:]
    return sum(1 for past, action in events if values(past) & values(item) and (action == "click" or not clicked))


@pytest.mark.parametrize(("name", "field", "clicked"), [
    ("same_item", "item_id", False), ("same_author", "author", False), ("same_tag", "tags", False),
    ("clicked_author", "author", True),
])
def test_match_counts_equal_a_loop_over_the_history(
    name: str, field: str, clicked: bool, batch: Batch, requests: pa.Table
):
    found = 0
    for q, row in enumerate(requests.to_pylist()):
        expected = [naive_matches(row, item, field, clicked=clicked) for item in row["candidates"]]
        found += sum(expected)
        np.testing.assert_allclose(batch.item[name][q, :len(expected)].numpy(), np.log1p(expected), atol=1e-6)
    assert found > 10
    assert batch.item[name][~batch.mask_QC].eq(0).all()


def test_match_rates_are_smoothed_towards_a_half(batch: Batch, requests: pa.Table):
    for q, row in enumerate(requests.to_pylist()):
        for c, item in enumerate(row["candidates"]):
            both = naive_matches(row, item, "author", clicked=True), naive_matches(row, item, "author", clicked=False)
            assert batch.item["author_rate"][q, c].item() == pytest.approx((both[0] + 0.5) / (both[1] + 1))


def test_a_match_needs_no_field_that_the_model_sees_of_an_event(batch: Batch, requests: pa.Table):
    narrow = world(schema_of({"history": {"fields": ["item_id"]}}))
    other = collate(narrow.state.encode_requests(requests, where="log"), narrow)
    assert set(other.history) == {"item_id", "action", "event_age"}
    for name in ("same_author", "same_tag", "author_rate"):
        assert torch.equal(other.item[name], batch.item[name])


def test_the_values_of_an_action_are_found_in_a_hashed_vocabulary(batch: Batch, requests: pa.Table):
    hashed = world(schema_of({"action": {"buckets": 1_000_000}}))
    other = collate(hashed.state.encode_requests(requests, where="log"), hashed)
    assert torch.equal(other.item["clicked_author"], batch.item["clicked_author"])


def test_values_that_no_event_has_match_nothing(requests: pa.Table):
    numbers = pa.array([[1] * len(row) for row in requests["history"].to_pylist()], pa.list_(pa.int64()))
    raw = requests.set_column(requests.column_names.index("history_action"), "history_action", numbers)
    part = FitPart(schema_of())
    part.add_requests(raw, where="log")
    part.add_items(tiny_world.raw_items(), where="items")
    state = part.finish(tiny_world.raw_items(), as_of_ms=START_MS + 7 * DAY_MS)
    table = ItemTable.from_encoded(state.encode_items(tiny_world.raw_items(), where="items"), state)
    assert collate(state.encode_requests(raw, where="log"), table).item["clicked_author"].eq(0).all()


def test_crosses_hash_the_rows_of_their_parts_and_are_zero_where_one_is_missing(
    batch: Batch, requests: pa.Table, items: ItemTable
):
    names = [feature.name for feature in items.state.schema.features]
    for name, parts, buckets in (("city_author", ("city", "author"), 64), ("city_device", ("city", "device"), 32)):
        seed = names.index(name)
        for q in range(len(requests)):
            for c in range(int(batch.mask_QC[q].sum()) if name == "city_author" else 1):
                values = [int(batch.user[p][q] if p in batch.user else batch.item[p][q, c]) for p in parts]
                hashed = 2 + int(fold([np.array([value]) for value in values], seed=seed)[0]) % buckets
                seen = batch.item[name][q, c] if name == "city_author" else batch.user[name][q]
                assert seen == hashed
    assert batch.item["city_author"][~batch.mask_QC].eq(0).all()
    raw = requests.slice(1, 1).set_column(requests.column_names.index("city"), "city", pa.array(["nowhere"]))
    unknown = collate(items.state.encode_requests(raw, where="log"), items)
    assert unknown.user["city_device"].tolist() == [0]
    assert unknown.item["city_author"].eq(0).all()


# ---------------------------------------------------------------- targets
def test_relevance_is_reached_then_rank(batch: Batch, requests: pa.Table):
    assert batch.targets is not None
    assert (batch.targets.keep, batch.targets.k) == ((3, 1), 2)
    assert torch.equal(batch.targets.mask_QC, batch.mask_QC)
    for q, row in enumerate(requests.to_pylist()):
        width = len(row["candidates"])
        both = zip(row["reached"], row["rank"], strict=True)
        expected = [level + (1 / (1 + rank) if rank else 0) for level, rank in both]
        np.testing.assert_allclose(batch.targets.relevance_QC[q, :width].numpy(), expected, atol=1e-6)
        assert batch.targets.reached_QC[q].tolist() == row["reached"] + [0] * (6 - width)
        assert batch.targets.labels["click"][q, :width].tolist() == row["click"]


def test_logged_relevance_goes_first_and_without_both_the_positive_label_decides(items: ItemTable, requests: pa.Table):
    graded = [[0.5] * len(row) for row in requests["candidates"].to_pylist()]
    logged = requests.append_column("relevance", pa.array(graded, pa.list_(pa.float64())))
    targets = collate(items.state.encode_requests(logged, where="log"), items).targets
    assert targets is not None
    assert targets.relevance_QC[targets.mask_QC].eq(0.5).all()
    plain = requests.drop_columns(["reached", "rank"])
    targets = collate(items.state.encode_requests(plain, where="log"), items).targets
    assert targets is not None
    assert torch.equal(targets.relevance_QC, targets.labels["click"])
    assert torch.equal(targets.reached_QC, targets.labels["click"].long())


def test_an_unobserved_label_is_nan_and_counts_as_no_positive(items: ItemTable, requests: pa.Table):
    raw = requests.slice(1, 2).drop_columns(["reached", "rank"])
    position = raw.column_names.index("click")
    nulls = [[None, *row[1:]] for row in raw["click"].to_pylist()]
    raw = raw.set_column(position, "click", pa.array(nulls, pa.list_(pa.int64())))
    targets = collate(items.state.encode_requests(raw, where="log"), items).targets
    assert targets is not None
    assert targets.labels["click"][:, 0].isnan().all()
    assert targets.relevance_QC[:, 0].eq(0).all()
    assert targets.relevance_QC.isfinite().all()


# ---------------------------------------------------------------- other candidates, other batches
def same_tensors(one: Batch, other: Batch, *, but: tuple[str, ...] = ()) -> None:
    for group in ("user", "item", "history"):
        mine, theirs = getattr(one, group), getattr(other, group)
        assert set(mine) == set(theirs)
        for name in mine:
            assert name in but or torch.equal(mine[name], theirs[name]), name
    for name in ("history_mask_QL", "history_rows_QL", "candidates_QC", "mask_QC", "time_ms_Q"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_other_candidates_give_the_batch_that_collate_makes_of_them(batch: Batch, requests: pa.Table, items: ItemTable):
    draw = np.random.default_rng(3)
    lengths = draw.integers(0, 9, len(requests))
    drawn = [[tiny_world.item_id(p) for p in draw.choice(120, n, replace=False)] for n in lengths]
    raw = requests.select(["request_id", "user_id", "time_ms", "city", "income", "device", "history", "history_time_ms",
                           "history_action"]).append_column("candidates", pa.array(drawn, pa.list_(pa.int64())))
    expected = collate(items.state.encode_requests(raw, where="log", strict=False), items)
    before = {name: tensor.clone() for name, tensor in batch.item.items()}
    other = batch.with_candidates(expected.candidates_QC, expected.mask_QC, items)
    same_tensors(other, expected)
    assert other.targets is None
    assert all(torch.equal(batch.item[name], tensor) for name, tensor in before.items()), "the batch itself changed"


def test_rows_behind_the_mask_do_not_matter(batch: Batch, items: ItemTable):
    junk = torch.where(batch.mask_QC, batch.candidates_QC, 7)
    same_tensors(batch.with_candidates(junk, batch.mask_QC, items), batch)


def test_a_request_collated_alone_has_the_tensors_it_has_among_others(
    batch: Batch, requests: pa.Table, items: ItemTable
):
    for q in (0, 5, 17):
        alone = collate(items.state.encode_requests(requests.slice(q, 1), where="log"), items)
        width, length = alone.mask_QC.shape[1], alone.history_mask_QL.shape[1]
        for name, tensor in alone.user.items():
            assert torch.equal(tensor[0], batch.user[name][q]), name
        for name, tensor in alone.item.items():
            assert torch.equal(tensor[0], batch.item[name][q, :width]), name
        for name, tensor in alone.history.items():
            assert torch.equal(tensor[0], batch.history[name][q, :length]), name


def test_excluded_items_are_rows_a_request(batch: Batch, requests: pa.Table, items: ItemTable):
    assert len(batch.exclude) == len(requests)
    for q, row in enumerate(requests["exclude"].to_pylist()):
        assert items.ids_of(batch.exclude[q]) == row
    assert any(len(rows) for rows in batch.exclude)
