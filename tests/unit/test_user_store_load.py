"""Rows of a Parquet table as users for the store, and what is wrong with the others."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("redis", reason="the package redis is not installed; install raycascade[redis]")

from raycascade.errors import DataError
from raycascade.flows.users import Target, users_of
from raycascade.serving.users_redis import LoadedUser
from tests.tiny_world import raw_requests

LISTS = pa.list_(pa.int64())


@pytest.fixture(scope="module")
def target(tiny_bundle: str) -> Target:
    return Target.of(tiny_bundle, history_len=4)


def test_a_row_of_the_canonical_requests_is_a_user(target: Target):
    row = raw_requests().slice(31, 1)  # user 103, who must not get five items
    names = target.columns(row.schema, where="log")
    assert set(names) == {"user_id", "time_ms", "city", "income", "history", "history_time_ms", "history_action",
                          "exclude"}
    ((user,), problems) = users_of(row.select(names), target)
    (raw,) = row.to_pylist()
    assert problems == []
    assert (user.user_id, user.at_ms) == (103, raw["time_ms"])
    fields = {name: json.loads(value) for name, value in user.fields.items()}
    assert fields["features"] == {"city": raw["city"], "income": raw["income"]}
    assert fields["exclude"] == raw["exclude"]
    assert fields["past"] == [
        [time_ms, item_id, {"action": action}] for item_id, time_ms, action in zip(
            raw["history"], raw["history_time_ms"], raw["history_action"], strict=True)][-4:]


def test_null_leaves_what_is_held_as_it_is_and_an_empty_list_does_not(target: Target):
    table = pa.table({"user_id": ["1", "2"], "city": [None, "x"], "history": pa.array([None, []], LISTS),
                      "exclude": pa.array([None, []], LISTS)})
    assert users_of(table, target)[0] == [
        LoadedUser("1", 0, {"features": "{}"}),
        LoadedUser("2", 0, {"features": '{"city":"x"}', "exclude": "[]", "past": "[]"})]
    assert [user.fields for user in users_of(table.select(["user_id", "history"]), target)[0]] == [{}, {"past": "[]"}]


def test_events_are_loaded_in_order_of_time_the_oldest_left_out(target: Target):
    table = pa.table({"user_id": [1], "history": [["9", "7", "x", "8", "6"]],
                      "history_time_ms": pa.array([[30, 10, None, 20, 10]], LISTS),
                      "history_action": [["a", None, "b", "a", None]]})
    ((user,), _) = users_of(table, target)
    assert user.fields == {"past": '[[10,7],[10,6],[20,8,{"action":"a"}],[30,9,{"action":"a"}]]'}


GOOD = {"user_id": pa.array([1]), "time_ms": pa.array([5]), "city": pa.array(["x"]), "income": pa.array([1.0]),
        "history": pa.array([[5, 6]]), "exclude": pa.array([[5]]), "history_time_ms": pa.array([[1, 2]]),
        "history_action": pa.array([["a", "b"]])}


@pytest.mark.parametrize(("changes", "problem"), [
    ({"user_id": pa.array([None], pa.int64())}, "user 'None': user_id is null"),
    ({"time_ms": pa.array([-1])}, "user '1': time_ms: got -1"),
    ({"income": pa.array([float("nan")])}, "user '1': income: got nan for a feature of kind dense"),
    ({"history": pa.array([[1, None]], LISTS)}, "user '1': history: got None among item ids"),
    ({"exclude": pa.array([[1, None]], LISTS)}, "user '1': exclude: got None among item ids"),
    ({"history_time_ms": pa.array([[1]])}, "user '1': history_time_ms has 1 values for 2 of history"),
    ({"history_action": pa.array([["a", "b", "c"]])}, "user '1': history_action has 3 values for 2 of history"),
    ({"history_time_ms": pa.array([[1, -2]])}, "user '1': history_time_ms: expected Unix milliseconds or null"),
])
def test_a_bad_row_is_named_and_the_others_are_loaded(target: Target, changes: dict[str, pa.Array], problem: str):
    table = pa.concat_tables([pa.table(GOOD), pa.table({**GOOD, **changes}), pa.table({**GOOD, "user_id": [2]})])
    users, problems = users_of(table, target)
    assert [user.user_id for user in users] == [1, 2]
    assert [row for row, _ in problems] == [1]
    assert problems[0][1].startswith(problem)


@pytest.mark.parametrize(("changes", "problem"), [
    ({"user_id": pa.array([1.5])}, "user '1.5': user_id is neither an integer nor text"),
    ({"time_ms": pa.array([1.5])}, "user '1': time_ms: got 1.5"),
    ({"income": pa.array(["much"])}, "user '1': income: got much for a feature of kind dense"),
    ({"city": pa.array([["a", "b"]])}, "user '1': city: got ['a', 'b'] for a feature of kind id"),
    ({"exclude": pa.array([[1.5]])}, "user '1': exclude: got 1.5 among item ids"),
    ({"history_time_ms": pa.array([["a", "b"]])}, "user '1': history_time_ms: expected Unix milliseconds or null"),
    ({"history_action": pa.array([[1.5, 2.5]])}, "user '1': action: got 1.5 for a feature of kind id"),
])
def test_in_a_column_of_another_type_every_row_is_bad(target: Target, changes: dict[str, pa.Array], problem: str):
    users, problems = users_of(pa.table({**GOOD, **changes}), target)
    assert users == []
    assert problems[0][1].startswith(problem)


@pytest.mark.parametrize(("columns", "message"), [
    ({"user": [1]}, "column 'user_id' is missing; did you mean 'user'"),
    ({"user_id": [1], "device": ["a"]}, "nothing of users in columns user_id, device; expected history, "),
    ({"user_id": [1], "history": [5]}, "column 'history' must hold lists, got int64"),
    ({"user_id": [1], "history": [[1]], "history_time_ms": pa.array([[0]], pa.list_(pa.timestamp("ms")))},
     "column 'history_time_ms' must be int64 Unix milliseconds"),
])
def test_a_table_that_cannot_be_read_is_refused(target: Target, columns: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        target.columns(pa.table(columns).schema, where="t.parquet")


def test_without_a_bundle_there_is_one_line(tmp_path: Path):
    with pytest.raises(Exception, match="no finished bundle"):
        Target.of(str(tmp_path), history_len=3)
