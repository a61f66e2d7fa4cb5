"""Encoding one column at a time: hashes, vocabularies, normalisation by hand, refusals, and files without loss."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raycascade.errors import ConfigError, DataError
from raycascade.features import (
    DenseStats,
    FeatureState,
    clock_rows,
    dense_column,
    normalise,
)
from raycascade.fitting import FitPart
from raycascade.items import ItemTable, age_rows
from raycascade.keys import Vocabulary, fold, hash_rows, mix, to_keys
from raycascade.schema import ClockFeature, FeatureSchema
from tests import tiny_world


def fitted(values: list, *, column: pa.DataType | None = None, **options: Any) -> FeatureState:
    """The state of a log with one user feature `x`; two items, one request a value."""
    schema = FeatureSchema.model_validate({"features": [{"name": "x", "side": "user", **options}]})
    part = FitPart(schema)
    part.add_requests(log_of(values, column), where="log")
    return part.finish(pa.table({"item_id": [1, 2]}), as_of_ms=0)


def log_of(values: list, column: pa.DataType | None = None) -> pa.Table:
    rows = range(len(values))
    return pa.table({"request_id": [f"q{i}" for i in rows], "user_id": pa.array(rows),
                     "time_ms": pa.array([5] * len(values)),
                     "candidates": pa.array([[1]] * len(values), pa.list_(pa.int64())), "x": pa.array(values, column)})


def encoded(state: FeatureState, values: list, column: pa.DataType | None = None, *, name: str = "x") -> list:
    return state.encode_requests(log_of(values, column), where="log")[name].to_pylist()


# ---------------------------------------------------------------- hashes
def test_the_hash_gives_the_published_vectors():
    assert mix(np.array([0, 1], np.uint64)).tolist() == [16294208416658607535, 10451216379200822465]
    three, seven = np.array([3]), np.array([7])
    assert fold([three, seven]).tolist() == [12799117710262669428]
    assert fold([seven, three]).tolist() == [1377067358039863116]
    assert (fold([three, seven]) % np.uint64(1000)).tolist() == [428]
    assert (fold([np.array([12]), np.array([345]), np.array([6789])]) % np.uint64(100_000)).tolist() == [23065]


def test_the_hash_equals_its_definition_in_whole_numbers():
    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    ids = [0, 1, -1, 2**62, -(2**63), 12345]
    for seed in (0, 9):
        expected = [mixed(mixed(seed) ^ one % 2**64) for one in ids]
        assert fold([np.array(ids)], seed=seed).tolist() == expected
        assert hash_rows(np.array(ids), 100, seed=seed).tolist() == [2 + one % 100 for one in expected]


def test_whole_numbers_are_their_own_keys_and_text_has_the_same_key_in_every_encoding():
    ids = [2**24 + 1, 2**53 + 1, -(2**63), 2**63 - 1]
    assert to_keys(pa.array(ids)).tolist() == ids
    text = pa.array(["ann", "bob", "ann", ""])
    keys = to_keys(text)
    assert keys[0] == keys[2]
    assert len(set(keys.tolist())) == 3
    chunks = pa.chunked_array([text.slice(0, 1), text.slice(1)])
    for same in (text.cast(pa.large_string()), text.dictionary_encode(), chunks):
        assert to_keys(same).tolist() == keys.tolist()
    assert keys[0] == -3242823647693640502, "keys are saved in bundles and must never change"


def test_ids_of_other_types_or_too_large_are_refused():
    with pytest.raises(DataError, match="must be integers or strings, got double"):
        to_keys(pa.array([1.0]))
    with pytest.raises(DataError, match="must lie below 2\\^63"):
        to_keys(pa.array([2**63], pa.uint64()))


# ---------------------------------------------------------------- vocabularies
@pytest.mark.parametrize("values", [["b", "a", None, "b"], [20, 10, None, 20], [2**53 + 1, 2**53, None, 2**53 + 1]])
def test_values_get_rows_by_their_count_and_null_and_the_unknown_get_row_one(values: list):
    state = fitted(values, kind="id")
    assert encoded(state, values) == [2, 3, 1, 2]
    assert state.space["x"].num_rows == 4
    other = "zzz" if isinstance(values[0], str) else 999
    assert encoded(state, [other, values[0]]) == [1, 2]


def test_equal_counts_are_ordered_by_value():
    assert encoded(fitted([30, 10, 20], kind="id"), [10, 20, 30]) == [2, 3, 4]


@pytest.mark.parametrize("start", [2**24, 2**53, 2**62, -(2**62)])
def test_large_neighbouring_ids_stay_apart(start: int):
    values = [start + i for i in range(5)]
    assert encoded(fitted(values, kind="id"), values) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint32(), pa.bool_()])
def test_every_width_of_integers_means_the_same_values(kind: pa.DataType):
    state = fitted([1, 1, 0], kind="id")
    values = pa.array([0, 1, None]).cast(kind).to_pylist()
    assert encoded(state, values, kind) == [3, 2, 1]


def test_text_is_no_number_and_numbers_are_no_text():
    assert encoded(fitted([1, 2], kind="id"), ["1", "2"]) == [1, 1]
    assert encoded(fitted(["1", "2"], kind="id"), [1, 2]) == [1, 1]


def test_rare_values_are_unknown():
    state = fitted(["a", "a", "b", "c", "c"], kind="id", min_count=2)
    assert encoded(state, ["a", "b", "c"]) == [2, 1, 3]


def test_more_values_than_allowed_are_hashed_and_only_null_is_unknown():
    values = list(range(100, 120))
    state = fitted(values, kind="id", max_values=8)
    assert state.space["x"].num_rows == 10
    rows = encoded(state, [*values, 7, None])
    assert rows[:-1] == hash_rows(np.array([*values, 7]), 8).tolist()
    assert rows[-1] == 1
    assert encoded(fitted(values, kind="id", max_values=20), values) == list(range(2, 22))


def test_buckets_hash_without_fitting():
    state = fitted(["a", "b", "a"], kind="id", buckets=50)
    rows = encoded(state, ["a", "b", "never seen", None])
    assert rows == [*hash_rows(to_keys(pa.array(["a", "b", "never seen"])), 50).tolist(), 1]


def test_several_values_keep_their_order_and_a_null_list_is_empty():
    state = fitted([["x", "y"], ["x"], None], kind="ids")
    assert encoded(state, [["y", "x", "q", None], [], None], pa.list_(pa.string())) == [[3, 2, 1, 1], [], []]


def test_several_values_that_are_no_list_are_refused_when_fitted_and_when_encoded():
    state = fitted([["x"]], kind="ids")
    with pytest.raises(DataError, match="log: column 'x' must hold lists, got string; declare it as an id"):
        encoded(state, ["x"])
    with pytest.raises(DataError, match="must hold lists"):
        fitted(["x"], kind="ids")


def test_a_vocabulary_of_floats_is_refused_with_the_column():
    with pytest.raises(DataError, match="log: x: ids must be integers or strings, got double; cast the column"):
        fitted([1.5], kind="id")
    with pytest.raises(DataError, match="log: column 'x': ids must be integers"):
        encoded(fitted([1], kind="id"), [1.5])


def test_an_empty_vocabulary_knows_nothing():
    assert Vocabulary(pa.array([], pa.int64())).lookup(pa.array([1, None])).tolist() == [1, 1]
    assert encoded(fitted([None, None], column=pa.string(), kind="id"), ["a"]) == [1]


@pytest.mark.parametrize("values", [
    [3, 1, 2], [-2, 5, 0], [7], [0, 10**12], [2**63 - 1, -(2**63)], [2**63 - 1, 2**63 - 2], [-(2**63), 1 - 2**63]])
def test_integers_close_together_or_far_apart_are_looked_up_alike(values: list[int]):
    around = sorted({key for value in values for key in (value - 1, value, value + 1) if -(2**63) <= key < 2**63})
    asked = [*around, 4, None, -(2**63), 2**63 - 1]
    expected = [values.index(key) + 2 if key in values else 1 for key in asked]
    assert Vocabulary(pa.array(values)).lookup(pa.array(asked, pa.int64())).tolist() == expected


# ---------------------------------------------------------------- dense
def test_standard_normalisation_by_hand_clipped_at_five():
    state = fitted([1.0, 2.0, 3.0, 6.0], kind="dense")
    mean, std = 3.0, math.sqrt(14 / 4)
    values = [1.0, 3.0, 100.0, -100.0]
    expected = [(1.0 - mean) / std, 0.0, 5.0, -5.0]
    assert encoded(state, values) == pytest.approx(expected, abs=1e-6)
    assert [f.name for f in state.space.fields] == ["x"], "nothing was missing, so there is no indicator"


def test_log_normalisation_by_hand_is_odd():
    state = fitted([0.0, math.e - 1, 1 - math.e], kind="dense", normalise="log")
    std = math.sqrt(2 / 3)
    assert encoded(state, [math.e**2 - 1, 0.0, 1 - math.e**2]) == pytest.approx([2 / std, 0.0, -2 / std], abs=1e-6)


def test_quantile_normalisation_maps_the_training_range_to_minus_one_to_one():
    values = [float(v) for v in range(1025)]
    state = fitted(values, kind="dense", normalise="quantile")
    assert len(state.dense["x"].edges) == 257
    asked = [-50.0, 0.0, 256.0, 512.0, 512.5, 1024.0, 1e9]
    assert encoded(state, asked) == pytest.approx([-1, -1, -0.5, 0, 0.5 / 512, 1, 1], abs=1e-6)


def test_no_normalisation_passes_the_number():
    assert encoded(fitted([1.0, 9.0], kind="dense", normalise="none"), [1.5, -7.0]) == [1.5, -7.0]


@pytest.mark.parametrize("how", ["none", "standard", "log", "quantile"])
def test_a_missing_number_is_zero_beside_an_indicator(how: str):
    state = fitted([4.0, None, 8.0], kind="dense", normalise=how)
    assert [f.name for f in state.space.fields] == ["x", "x_missing"]
    assert encoded(state, [None, 4.0])[0] == 0.0
    assert encoded(state, [None, 4.0], name="x_missing") == [1.0, 0.0]
    assert encoded(state, [None, None], pa.null(), name="x_missing") == [1.0, 1.0]


@pytest.mark.parametrize("how", ["standard", "log", "quantile"])
def test_a_column_without_any_number_or_with_a_single_one_is_harmless(how: str):
    assert np.isfinite(encoded(fitted([None, None], column=pa.float64(), kind="dense", normalise=how), [3.0])).all()
    constant = fitted([0.1] * 7, kind="dense", normalise=how)
    assert constant.dense["x"].std == 1.0, "the rounding of a constant is no spread"
    assert np.isfinite(encoded(constant, [0.1, 3.0])).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_column_and_row(bad: float):
    line = r"log: column 'x' holds (nan|inf|-inf) in row 1 \(1 such rows\); write null"
    with pytest.raises(DataError, match=line) as caught:
        dense_column(pa.table({"x": [1.0, bad, None]}), "x", where="log")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="column 'x' holds"):
        fitted([1.0, bad], kind="dense")
    with pytest.raises(DataError, match="column 'x' holds"):
        encoded(fitted([1.0, 2.0], kind="dense"), [1.0, bad])


def test_text_is_no_number():
    with pytest.raises(DataError, match="log: column 'x' must hold numbers, got string"):
        fitted(["1"], kind="dense")


def test_whole_numbers_and_booleans_are_numbers():
    state = fitted([1, 3], kind="dense")
    assert encoded(state, [1, 3]) == [-1.0, 1.0]
    assert encoded(state, [True], pa.bool_()) == [-1.0]


def test_quantiles_of_repeated_values_are_monotone():
    stats = DenseStats(edges=(0.0, 1.0, 8.0))
    scaled = normalise(np.array([-1.0, 0.0, 0.5, 1.0, 4.5, 8.0, 9.0]), "quantile", stats)
    assert scaled.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0]


# ---------------------------------------------------------------- vectors, ages, clocks
def test_vectors_have_length_one_and_null_is_the_zero_vector():
    state = fitted([[3.0, 4.0]], kind="vector", dim=2)
    table = log_of([[3.0, 4.0], None, [0.0, 0.0]], pa.list_(pa.float64()))
    values = np.array(state.encode_requests(table, where="log")["x"].to_pylist())
    np.testing.assert_allclose(values, [[0.6, 0.8], [0, 0], [0, 0]], atol=1e-7)


@pytest.mark.parametrize(("value", "expected"), [
    ([1.0], "must have 2 numbers, got 1"), ([1.0, math.nan], "holds NaN or infinity"), ([1.0, None], "holds NaN"),
])
def test_a_vector_of_another_width_or_with_holes_is_refused(value: list, expected: str):
    state = fitted([[3.0, 4.0]], kind="vector", dim=2)
    with pytest.raises(DataError, match=f"log: vector 'x' {expected}"):
        encoded(state, [[1.0, 2.0], value], pa.list_(pa.float64()))
    with pytest.raises(DataError, match="must be a list of numbers, got double"):
        encoded(state, [1.0])


def test_ages_fall_into_doubling_buckets_of_seconds():
    seconds = np.array([-5, 0, 0.999, 1, 2.999, 3, 7, 86_400, 2.0**40])
    expected = [2 + min(31, math.floor(math.log2(1 + max(s, 0)))) for s in seconds]
    assert age_rows((seconds * 1000).astype(np.int64), np.ones(9, bool)).tolist() == expected
    assert age_rows(np.array([5]), np.array([False])).tolist() == [1]


def test_clocks_give_the_hour_and_the_weekday_of_the_zone():
    monday = 1_704_067_200_000  # 2024-01-01T00:00Z
    times = np.array([monday, monday + 3_599_999, monday + 3_600_000, monday - 1, monday + 6 * 86_400_000])
    hour = {h: ClockFeature(name="h", part="hour", utc_offset_hours=h) for h in (0, 8, 5.5)}
    day = {h: ClockFeature(name="d", part="weekday", utc_offset_hours=h) for h in (0, 8)}
    assert (clock_rows(times, hour[0]) - 2).tolist() == [0, 0, 1, 23, 0]
    assert (clock_rows(times, hour[8]) - 2).tolist() == [8, 8, 9, 7, 8]
    assert (clock_rows(times, hour[5.5]) - 2).tolist() == [5, 6, 6, 5, 5]
    assert (clock_rows(times, day[0]) - 2).tolist() == [0, 0, 0, 6, 6]
    assert (clock_rows(times, day[8]) - 2).tolist() == [0, 0, 0, 0, 6]


def test_the_minute_of_a_zone_and_of_an_item_is_worked_out_by_hand():
    monday = 1_704_067_200_000
    times = np.array([monday, monday + 59_999, monday + 61_000, monday - 1])
    minute = {h: ClockFeature(name="m", part="minute", utc_offset_hours=h) for h in (0, 8, 5.75)}
    assert (clock_rows(times, minute[0]) - 2).tolist() == [0, 0, 1, 59]
    assert (clock_rows(times, minute[8]) - 2).tolist() == [0, 0, 1, 59]
    assert (clock_rows(times, minute[5.75]) - 2).tolist() == [45, 45, 46, 44]


def test_an_items_clock_reads_its_source_and_shares_the_table_of_the_requests():
    schema = FeatureSchema(features=(
        ClockFeature(name="hour", part="hour"),
        ClockFeature(name="born_hour", part="hour", side="item", source="born_ms", table="hour", utc_offset_hours=8)))
    items = pa.table({"item_id": [1, 2, 3], "born_ms": pa.array([1_704_067_200_000, 0, None], pa.int64())})
    state = FitPart(schema).finish(items, as_of_ms=0)
    assert state.encode_items(items, where="items")["born_hour"].to_pylist() == [2 + 8, 1, 1]
    assert [(f.name, f.side, f.table, f.num_rows) for f in state.space.fields] == [
        ("hour", "request", "hour", 26), ("born_hour", "item", "hour", 26)]
    table = ItemTable.from_encoded(state.encode_items(items, where="items"), state)
    assert table.fields(np.array([0, 1, 2]), 0)["born_hour"].tolist() == [0, 1, 10]


@pytest.mark.parametrize(("clock", "words"), [
    ({"side": "item"}, "side item needs a source"),
    ({"side": "context", "source": "born_ms"}, "one of side context reads the request's time"),
    ({"table": "city"}, "shares the table 'city' with a feature of id"),
    ({"table": "minute"}, "shares the table 'minute' with a feature of minute"),
])
def test_a_clock_that_cannot_be_is_refused(clock: dict[str, str], words: str):
    features = [{"kind": "id", "name": "city", "side": "user"}, {"kind": "clock", "name": "minute", "part": "minute"},
                {"kind": "clock", "name": "hour", "part": "hour", **clock}]
    with pytest.raises(ConfigError, match=words):
        FeatureSchema.model_validate({"features": features})


# ---------------------------------------------------------------- requests
def changed(table: pa.Table, name: str, values: object) -> pa.Table:
    column = values if isinstance(values, pa.Array) else pa.array(values)
    return table.set_column(table.column_names.index(name), name, column)


@pytest.mark.parametrize(("name", "values", "expected"), [
    ("candidates", [[4, 5005]], "log: candidate 4 is not in the items table"),
    ("click", [[1]], "'click' has 1 values for 2 of 'candidates' in row 0; lists must be parallel"),
    ("click", [[1, 2]], "label 'click' must be 0 or 1"),
    ("history_action", [["click"]], "'history_action' has 1 values for 2 of 'history' in row 0"),
    ("reached", [[1, 300]], "'reached' does not fit int8"),
    ("reached", [[1, None]], "'reached' is null for 1 candidates"),
    ("rank", [["a", "b"]], "'rank' does not fit int16"), ("relevance", [[None, 0.5]], "'relevance' is null"),
])
def test_a_request_that_contradicts_itself_is_refused_in_one_line(name: str, values: list, expected: str):
    raw = tiny_world.raw_requests().slice(0, 1)
    first, second = tiny_world.item_id(1), tiny_world.item_id(2)
    for column, value in {"candidates": [[5000, 5007]], "click": [[0, 1]], "history": [[first, second]],
                          "history_time_ms": [[1, 2]], "history_action": [["click", "skip"]]}.items():
        raw = changed(raw, column, value)
    state = tiny_world.fitted()
    assert len(state.encode_requests(raw, where="log")) == 1
    raw = changed(raw, name, values) if name in raw.column_names else raw.append_column(name, pa.array(values))
    with pytest.raises(DataError, match=expected) as caught:
        state.encode_requests(raw, where="log")
    assert "\n" not in str(caught.value)


def test_serving_takes_what_it_gets_where_preparing_refuses():
    state = tiny_world.fitted()
    raw = tiny_world.raw_requests().slice(0, 2).select(["request_id", "user_id", "time_ms", "candidates"])
    with pytest.raises(DataError, match="log: column 'city' is missing"):
        state.encode_requests(raw, where="log")
    loose = state.encode_requests(changed(raw, "candidates", [[4], []]), where="log", strict=False)
    assert loose["candidates"].to_pylist() == [[1], []]
    assert loose["city"].to_pylist() == [1, 1]
    assert loose["income_missing"].to_pylist() == [1.0, 1.0]
    assert loose["history"].to_pylist() == [[], []]


# ---------------------------------------------------------------- files
def test_a_state_comes_back_from_its_files_and_encodes_bit_for_bit_the_same(tmp_path: Path):
    state, uri = tiny_world.fitted(), str(tmp_path / "features")
    state.save(uri)
    again = FeatureState.load(uri)
    assert (again.schema, again.space, again.dense) == (state.schema, state.space, state.dense)
    assert (again.as_of_ms, again.label_rates) == (state.as_of_ms, state.label_rates)
    raw, items = tiny_world.raw_requests(), tiny_world.raw_items()
    assert again.encode_requests(raw, where="log").equals(state.encode_requests(raw, where="log"))
    assert again.encode_items(items, where="items").equals(state.encode_items(items, where="items"))
    np.testing.assert_array_equal(again.counters.totals_MT, state.counters.totals_MT)
    small = FeatureState.load(uri, with_counters=False)
    assert small.encode_requests(raw, where="log").equals(state.encode_requests(raw, where="log"))
    assert (small.counters.names, len(small.counters.keys_M)) == (state.counters.names, 0)
    second = str(tmp_path / "again")
    again.save(second)
    for file in sorted(Path(uri).iterdir()):
        assert (Path(second) / file.name).read_bytes() == file.read_bytes(), file.name


def test_files_are_arrow_and_json_and_hold_no_pickle(tmp_path: Path):
    tiny_world.fitted().save(str(tmp_path))
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert file.suffix in (".json", ".arrow")
        assert content[:6] == b"ARROW1" if file.suffix == ".arrow" else content[:1] in b"{["
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
