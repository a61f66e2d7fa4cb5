"""The door for raw requests: JSON and Parquet columns in the types of the training log."""

import numpy as np
import pyarrow as pa
import pytest

from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import DataError
from raycascade.serving.requests import Event, Query, checked, ids_as, needed, table_of
from tests.tiny_world import START_MS, item_id, raw_requests


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


def encoded(bundle: Bundle, query: Query) -> dict[str, object]:
    return bundle.encode(table_of(query, bundle, request_id="r")).to_pylist()[0]


def test_ids_become_the_type_of_the_log_and_those_that_cannot_are_unknown():
    assert ids_as(["12", 7, "x", 1 << 40, None, "-3"], pa.int32()) == [12, 7, None, None, None, -3]
    assert ids_as(["a", 7], pa.string()) == ["a", "7"]


def test_a_query_of_a_known_user_is_that_users_state(bundle: Bundle):
    last = {row["user_key"]: row for row in bundle.users.table.to_pylist()}[104]
    for user_id in (104, "104"):
        row = encoded(bundle, Query(user_id=user_id))
        assert {name: row[name] for name in ("city", "income", "history", "history_action")} == {
            name: last[name] for name in ("city", "income", "history", "history_action")}
        assert row["time_ms"] == bundle.state.as_of_ms


def test_what_a_query_brings_wins_and_null_brings_nothing(bundle: Bundle):
    own = encoded(bundle, Query(user_id=104))
    query = Query(user_id=104, features={"city": "city 2", "income": None}, history=[Event(item_id=item_id(3))])
    brought = encoded(bundle, query)
    city = int(bundle.state.vocabularies["city"].lookup(pa.array(["city 2"]))[0])
    assert (brought["city"], brought["income"], brought["history"]) == (city, own["income"], [5])
    assert brought["history_action"] == [1]
    assert not brought["history_time_ms"]


def test_a_query_in_json_is_encoded_as_the_row_of_the_log_that_says_the_same(bundle: Bundle):
    raw = raw_requests().slice(42, 1)
    row = raw.to_pylist()[0]
    past = [Event(item_id=item, time_ms=moment, features={"action": action}) for item, moment, action in zip(
        row["history"], row["history_time_ms"], row["history_action"], strict=True)]
    query = Query(user_id=row["user_id"], time_ms=row["time_ms"], context={"device": row["device"]},
                  features={"city": row["city"], "income": row["income"]}, history=[*past])
    expected = bundle.encode(raw.drop_columns(["candidates", "click"])).to_pylist()[0]
    found = encoded(bundle, query)
    for name in ("city", "income", "device", "history", "history_time_ms", "history_action", "time_ms", "user_key"):
        assert found[name] == expected[name], name


def test_excluded_items_add_to_those_of_the_users_table(bundle: Bundle):
    found = encoded(bundle, Query(user_id=103, exclude=[item_id(50), "nonsense"]))
    assert found["exclude"] == [2, 3, 4, 5, 6, 52, 1]
    assert encoded(bundle, Query(user_id=104, exclude=[item_id(50)]))["exclude"] == [52]


@pytest.mark.parametrize(("query", "message"), [
    ({"features": {"citty": "x"}}, "features.citty: no such user feature; did you mean 'city'"),
    ({"features": {"device": "x"}}, "features.device: no such user feature"),
    ({"context": {"hour": 3}}, "context.hour: no such context feature"),
    ({"features": {"income": "much"}}, "features.income: expected a number"),
    ({"features": {"city": ["a"]}}, "features.city: expected an id"),
    ({"features": {"city": 1.5}}, "features.city"),
    ({"history": [{"item_id": 5000, "features": {"act": "click"}}]}, "history.features.act: no such event feature"),
])
def test_a_feature_that_does_not_fit_the_schema_is_named(bundle: Bundle, query: dict, message: str):
    with pytest.raises(DataError, match=message):
        table_of(Query.model_validate({"user_id": 100, **query}), bundle, request_id="r")


def test_columns_take_the_types_of_the_log(bundle: Bundle):
    table = pa.table({"user_id": ["100", "7"], "time_ms": pa.array([None, START_MS], pa.int64()),
                      "history": pa.array([["5000"], None], pa.list_(pa.string()))})
    found = checked(table, bundle, where="t")
    assert found["user_id"].to_pylist() == [100, 7]
    assert found["time_ms"].to_pylist() == [bundle.state.as_of_ms, START_MS]
    assert found["history"].to_pylist() == [[5000], None]


@pytest.mark.parametrize(("columns", "message"), [
    ({"userid": [1]}, "column 'user_id' is missing; did you mean 'userid'"),
    ({"user_id": pa.array([1, None])}, "user_id is null in row 1"),
    ({"user_id": ["a"]}, "'user_id' must hold int64"),
    ({"user_id": [1], "time_ms": pa.array([0], pa.timestamp("ms"))}, "must be int64 Unix milliseconds"),
    ({"user_id": [1], "history": [5000]}, "'history' must hold list"),
])
def test_columns_that_cannot_be_read_are_named(bundle: Bundle, columns: dict, message: str):
    with pytest.raises(DataError, match=message):
        checked(pa.table(columns), bundle, where="t")


def test_only_the_columns_that_recommending_reads_are_read(bundle: Bundle):
    names = needed([*raw_requests().column_names, "other"], bundle)
    assert not {"candidates", "click", "other"} & set(names)
    assert {"user_id", "city", "device", "history_action", "exclude"} <= set(names)


def test_rows_with_and_without_a_history_are_completed_each_on_its_own(bundle: Bundle):
    table = pa.table({"user_id": [104, 104, 1], "history": pa.array([None, [item_id(0)], None], pa.list_(pa.int64()))})
    stored = {row["user_key"]: row for row in bundle.users.table.to_pylist()}[104]["history"]
    assert bundle.encode(table)["history"].to_pylist() == [stored, [2], []]
    assert np.array_equal(bundle.users.rows(table["user_id"]) >= 0, [True, True, False])
