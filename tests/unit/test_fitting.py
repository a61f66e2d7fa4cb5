"""Fitting in parts: any split of the log, merged in any order, gives the state of the whole log, bit for bit."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raycascade.errors import DataError
from raycascade.features import FeatureState
from raycascade.fitting import (
    SAMPLE_SIZE,
    UNIT_BITS,
    FitPart,
    exact_sum,
    fitted_columns,
    merged,
    required_columns,
)
from raycascade.schema import FeatureSchema
from tests import tiny_world

SCHEMA = FeatureSchema.model_validate({**tiny_world.SCHEMA.model_dump(mode="json"), "features": [
    *tiny_world.SCHEMA.model_dump(mode="json")["features"],
    {"kind": "dense", "name": "score", "side": "context", "normalise": "quantile"},
    {"kind": "dense", "name": "watched", "side": "event", "normalise": "quantile"},
    {"kind": "count", "name": "click_rate", "label": "click", "rate": True},
]})


def raw_requests() -> pa.Table:
    """The tiny log with numbers that do not add up exactly in floating point."""
    raw, draw = tiny_world.raw_requests(), np.random.default_rng(3)
    watched = [draw.lognormal(0, 4, len(row)).tolist() for row in raw["history"].to_pylist()]
    return raw.append_column("score", pa.array(draw.normal(1e9, 1e3, len(raw)) / 7)).append_column(
        "history_watched", pa.array(watched, pa.list_(pa.float64())))


def part_of(table: pa.Table) -> FitPart:
    part = FitPart(SCHEMA)
    part.add_requests(table, where="log")
    return part


def finished(part: FitPart) -> FeatureState:
    part.add_items(tiny_world.raw_items(), where="items")
    return part.finish(tiny_world.raw_items(), as_of_ms=tiny_world.START_MS + 7 * tiny_world.DAY_MS)


def assert_same(one: FeatureState, other: FeatureState) -> None:
    assert one.dense == other.dense
    assert one.label_rates == other.label_rates
    assert one.space == other.space
    for name, vocabulary in one.vocabularies.items():
        assert vocabulary.values.equals(other.vocabularies[name].values), name
    assert one.counters.to_arrow().equals(other.counters.to_arrow(), check_metadata=True)


@pytest.mark.parametrize("seed", range(5))
def test_parts_of_any_split_merged_in_any_order_give_the_state_of_the_whole(seed: int):
    raw, draw = raw_requests(), np.random.default_rng(seed)
    owner = draw.integers(0, 2 + seed, len(raw))
    parts = [part_of(raw.take(draw.permutation(np.flatnonzero(owner == number)))) for number in range(2 + seed)]
    merged = FitPart(SCHEMA)
    for number in draw.permutation(len(parts)):
        merged.merge(parts[number])
    whole = finished(part_of(raw))
    assert_same(finished(merged), whole)
    assert len(whole.dense["watched"].edges) > 100


def test_one_part_fed_table_by_table_equals_one_fed_at_once():
    raw, part = raw_requests(), FitPart(SCHEMA)
    for start in range(0, len(raw), 13):
        part.add_requests(raw.slice(start, 13), where="log")
    assert_same(finished(part), finished(part_of(raw)))


def test_a_part_comes_back_from_its_files(tmp_path: Path):
    raw = raw_requests()
    part_of(raw).save(str(tmp_path / "part"))
    part_of(raw.slice(0, 0)).save(str(tmp_path / "nothing"))
    again = FitPart.load(str(tmp_path / "part"), SCHEMA)
    again.merge(FitPart.load(str(tmp_path / "nothing"), SCHEMA))
    assert_same(finished(again), finished(part_of(raw)))


def test_impressions_in_any_split_give_the_state_of_the_whole():
    schema = FeatureSchema.model_validate({
        "features": [{"kind": "dense", "name": "age", "side": "user", "normalise": "quantile"}, {"kind": "history"},
                     {"kind": "id", "name": "item_id", "side": "item"},
                     {"kind": "id", "name": "action", "side": "event"}],
        "labels": ["click"]})
    draw = np.random.default_rng(4)
    log = pa.table({"user_id": draw.integers(0, 20, 300), "time_ms": draw.permutation(300) * 10**7,
                    "item_id": draw.integers(0, 9, 300), "age": draw.normal(size=300),
                    "action": draw.integers(0, 4, 300), "click": draw.integers(0, 2, 300)})
    items = pa.table({"item_id": np.arange(9)})

    def state(*tables: pa.Table) -> FeatureState:
        merged = FitPart(schema)
        for table in tables:
            part = FitPart(schema)
            part.add_impressions(table, where="log")
            merged.merge(part)
        return merged.finish(items, as_of_ms=0)

    whole, split = state(log), state(log.slice(200), log.slice(0, 50), log.slice(50, 150))
    assert_same(split, whole)
    counts = np.bincount(log["item_id"].to_numpy(), minlength=9)
    order = np.lexsort((np.arange(9), -counts))
    assert whole.vocabularies["item_id"].values.to_pylist() == order.tolist()
    assert whole.label_rates == {"click": log["click"].to_numpy().sum() / 300}


def test_the_moments_are_those_of_the_numbers():
    raw = raw_requests()
    stats = finished(part_of(raw)).dense["score"]
    values = raw["score"].to_numpy()
    assert stats.mean == pytest.approx(values.mean(), rel=1e-15)
    assert stats.std == pytest.approx(values.std(), rel=1e-6)


def test_an_exact_sum_is_the_sum_of_fractions():
    draw = np.random.default_rng(5)
    spread = draw.normal(size=2000) * 10.0 ** draw.integers(-300, 300, 2000)
    values = np.concatenate([spread, [0.0, -0.0, 5e-324, -1.7e308]])
    expected = sum((Fraction(float(value)) for value in values), Fraction(0))
    assert Fraction(exact_sum(values), 1 << UNIT_BITS) == expected
    assert exact_sum(draw.permutation(values)) == exact_sum(values)
    assert exact_sum(np.zeros(0)) == 0
    assert exact_sum(np.full(10**5, 0.1)) / (1 << UNIT_BITS) == math.fsum([0.1] * 10**5)


def test_the_quantile_sample_is_bounded_and_close_to_the_quantiles():
    schema = FeatureSchema.model_validate({"features": [
        {"kind": "dense", "name": "x", "side": "user", "normalise": "quantile"}]})
    size = 3 * SAMPLE_SIZE
    values = np.random.default_rng(6).normal(size=size)
    part = FitPart(schema)
    part.add_requests(pa.table({
        "request_id": np.arange(size), "time_ms": np.zeros(size, np.int64), "x": values,
        "candidates": pa.array([[]] * size, pa.list_(pa.int64()))}), where="log")
    assert len(part.samples["x"]) == SAMPLE_SIZE
    edges = part.finish(pa.table({"item_id": [1]}), as_of_ms=0).dense["x"].edges
    assert edges[128] == pytest.approx(np.median(values), abs=0.05)
    assert edges[64] == pytest.approx(np.quantile(values, 0.25), abs=0.05)


def test_only_exposed_candidates_count_as_exposures_and_every_logged_item_has_a_row():
    raw = tiny_world.raw_requests().slice(0, 1)
    raw = raw.append_column("exposed", pa.array([[True, True, False, False, None, True]]))
    part = FitPart(tiny_world.SCHEMA)
    part.add_requests(raw, where="log")
    assert part.events is not None
    shown = {row["item_id"] for row in part.events.to_pylist()}
    candidates, history = raw["candidates"][0].as_py(), raw["history"][0].as_py()
    assert shown == {candidates[0], candidates[1], candidates[5]}
    assert set(part.values["item_id"]["value"].to_pylist()) == {*candidates, *history}


def test_a_vocabulary_or_the_items_of_two_types_are_refused_in_one_line():
    schema = FeatureSchema.model_validate({"features": [{"kind": "id", "name": "x", "side": "user"}]})

    def part(item: object, x: object) -> FitPart:
        one = FitPart(schema)
        one.add_requests(pa.table({"request_id": [1], "time_ms": [5], "candidates": [[item]], "x": [x]}), where="log")
        return one

    with pytest.raises(DataError, match="one vocabulary holds both int64 and string; cast the columns to one type"):
        part(1, 1).merge(part(1, "a"))
    with pytest.raises(DataError, match="column 'item_id' holds both int64 and string"):
        part(1, 1).merge(part("a", 1))
    both = part(1, "a")
    both.merge(part(1, None))  # no value, no type
    assert both.values["x"]["value"].to_pylist() == ["a"]


def test_feedback_and_events_that_are_not_parallel_are_refused_before_anything_is_counted():
    raw = tiny_world.raw_requests().slice(0, 3)
    position = raw.column_names.index("click")
    with pytest.raises(DataError, match="log: 'click' has 1 values for 6 of 'candidates' in row 0"):
        FitPart(tiny_world.SCHEMA).add_requests(raw.set_column(position, "click", pa.array([[1]] * 3)), where="log")


def test_a_log_needs_the_columns_of_its_form():
    assert required_columns(tiny_world.SCHEMA, "requests") == [
        "request_id", "user_id", "time_ms", "candidates", "city", "income", "device", "click"]
    assert required_columns(tiny_world.SCHEMA, "impressions") == [
        "user_id", "time_ms", "item_id", "city", "income", "device", "action", "click"]


@pytest.mark.parametrize("num_parts", [0, 1, 2, 3, 7, 8])
def test_merging_like_with_like_gives_what_merging_in_a_row_gives(num_parts: int):
    raw = raw_requests()
    bounds = np.linspace(0, len(raw), num_parts + 1).astype(int)
    cuts = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    row = FitPart(SCHEMA)
    for start, stop in cuts:
        row.merge(part_of(raw.slice(start, stop - start)))
    tree = merged(SCHEMA, (part_of(raw.slice(start, stop - start)) for start, stop in cuts))
    assert_same(finished(tree), finished(row))


def test_fitting_reads_only_the_columns_it_names():
    raw = raw_requests()
    extra = raw.append_column("nothing", pa.array([0] * len(raw)))
    read = extra.select([name for name in extra.column_names if name in fitted_columns(SCHEMA)])
    assert "history_time_ms" in raw.column_names
    assert {"history_time_ms", "nothing"}.isdisjoint(read.column_names)
    assert_same(finished(part_of(read)), finished(part_of(raw)))


@pytest.mark.parametrize("order", [1, -1])
def test_a_vocabulary_that_will_be_hashed_keeps_no_more_values_than_show_it(order: int):
    schema = FeatureSchema.model_validate({"features": [{"kind": "id", "name": "x", "side": "user", "max_values": 5}]})

    def part(values: range) -> FitPart:
        one = FitPart(schema)
        column = pa.array(values)
        one.add_requests(pa.table({
            "request_id": column, "user_id": column, "time_ms": pa.array([0] * len(values)), "x": column,
            "candidates": pa.array([[1]] * len(values))}), where="log")
        return one

    parts = [part(range(3)), part(range(2, 5)), part(range(4, 90)), part(range(2))][::order]
    together = merged(schema, parts[:4])
    assert len(together.values["x"]) == 6
    vocabulary = together.finish(pa.table({"item_id": [1]}), as_of_ms=0).vocabularies["x"]
    assert (vocabulary.buckets, len(vocabulary.values)) == (5, 0)
    few = merged(schema, [part(range(3)), part(range(2, 5))])
    kept = few.finish(pa.table({"item_id": [1]}), as_of_ms=0).vocabularies["x"]
    assert (kept.buckets, sorted(kept.values.to_pylist())) == (None, [0, 1, 2, 3, 4])
