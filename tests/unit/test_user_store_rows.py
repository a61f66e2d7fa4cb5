"""What a store holds of users, in the encoded requests: the same as if each query brought all of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from raycascade.batch import Batch
from raycascade.bundle import Bundle, load_bundle
from raycascade.config import parse_config
from raycascade.serving.requests import Event, Query
from raycascade.serving.user_rows import encode_queries
from raycascade.serving.users import PastEvent, UserState
from tests.tiny_world import DAY_MS, NUM_USERS, START_MS, item_id, raw_requests

END_MS = START_MS + 7 * DAY_MS  # of the training log
SHOP = {"dataset": {"name": "table", "columns": {"time": "ts"}, "features": [{"kind": "id", "name": "item_id",
        "side": "item"}], "labels": {"click": "click"}, "positive": "click"},
        "splits": {"test_from": "2024-01-08"}, "stages": [{"name": "retriever", "keep": 5, "model": {
            "name": "two_tower"}}]}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def seen_counts(bundle: Bundle) -> Bundle:
    """The same bundle, as if its log excluded what users were shown before."""
    dataset = {**SHOP["dataset"], "exclude_seen": True}
    return replace(bundle, config=bundle.config.model_copy(update={"dataset": dataset}))


def logged(user: int) -> list[PastEvent]:
    """The history of the user's last request of the log, which the users table holds."""
    row = raw_requests().to_pylist()[8 * (user - 100) + 7]
    return [PastEvent(item, time, {"action": action}) for item, time, action in zip(
        row["history"], row["history_time_ms"], row["history_action"], strict=True)]


def inline(events: list[PastEvent]) -> list[Event]:
    return [Event(item_id=item, time_ms=time or None, features=dict(features)) for item, time, features in events]


def in_order(events: list[PastEvent]) -> list[PastEvent]:
    return sorted(events, key=lambda event: event.time_ms)


def batch_of(bundle: Bundle, queries: list[Query], states: list[UserState | None] | None) -> Batch:
    ids = [f"q{position}" for position in range(len(queries))]
    return bundle.batch(encode_queries(queries, states, bundle, request_ids=ids).table)


def assert_same(left: Batch, right: Batch) -> None:
    """All that a model sees is the same."""
    for name in ("user", "history"):
        for field, values in getattr(left, name).items():
            assert values.equal(getattr(right, name)[field]), field
    for name in ("history_mask_QL", "history_rows_QL", "time_ms_Q", "history_time_ms_QL"):
        assert getattr(left, name).equal(getattr(right, name)), name
    for mine, other in zip(left.exclude, right.exclude, strict=True):
        assert set(mine.tolist()) == set(other.tolist())


moments = st.integers(START_MS - DAY_MS, END_MS + DAY_MS)
events = st.builds(PastEvent, st.integers(0, 130).map(item_id), moments, st.sampled_from(
    [{"action": "click"}, {"action": "skip"}, {"action": "unheard of"}, {"action": None}, {}]))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(user=st.integers(100, 100 + NUM_USERS + 2), new=st.lists(events, max_size=15),
       asked_ms=st.none() | st.integers(START_MS, END_MS + 2 * DAY_MS))
def test_events_since_the_training_give_the_request_that_brings_the_whole_history(
    bundle: Bundle, user: int, new: list[PastEvent], asked_ms: int | None
):
    old = logged(user) if user < 100 + NUM_USERS else []
    held = {(event.item_id, event.time_ms) for event in old}
    new = [event for event in in_order(new) if (event.item_id, event.time_ms) not in held]
    found = batch_of(bundle, [Query(user_id=user, time_ms=asked_ms)], [UserState(events=tuple(new))])
    whole = Query(user_id=user, time_ms=asked_ms, history=inline(in_order(old + new)) if old or new else None)
    assert_same(found, batch_of(bundle, [whole], [None]))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(user=st.integers(100, 130), past=st.lists(events, max_size=15), city=st.sampled_from(["city 0", "city 3", "?"]))
def test_a_whole_history_of_the_store_stands_for_that_of_the_users_table(
    bundle: Bundle, user: int, past: list[PastEvent], city: str
):
    state = UserState(features={"city": city}, events=tuple(in_order(past)), exclude=(item_id(7),), whole=True)
    whole = Query(user_id=user, features={"city": city}, history=inline(in_order(past)), exclude=[item_id(7)])
    assert_same(batch_of(bundle, [Query(user_id=user)], [state]), batch_of(bundle, [whole], [None]))


def test_the_whole_cascade_answers_alike(bundle: Bundle):
    new = [PastEvent(item_id(9), END_MS + 5, {"action": "click"}), PastEvent(item_id(4), END_MS + 9, {})]
    stored = encode_queries([Query(user_id=105)], [UserState(events=tuple(new))], bundle, request_ids=["a"])
    brought = encode_queries([Query(user_id=105, history=inline(logged(105) + new))], [None], bundle, request_ids=["a"])
    bare = encode_queries([Query(user_id=105)], [None], bundle, request_ids=["a"])
    answers = [bundle.recommend(one.table).final for one in (stored, brought, bare)]
    assert np.array_equal(answers[0].rows_QC, answers[1].rows_QC)
    assert np.array_equal(answers[0].scores_QC, answers[1].scores_QC)
    assert not np.array_equal(answers[0].scores_QC, answers[2].scores_QC)


def test_what_a_query_brings_wins_over_the_store(bundle: Bundle):
    state = UserState(features={"city": "city 1", "income": 7.0}, events=(PastEvent(item_id(3), END_MS, {}),))
    query = Query(user_id=104, features={"city": "city 2", "income": None}, history=[Event(item_id=item_id(8))])
    (row,) = encode_queries([query], [state], bundle, request_ids=["a"]).table.to_pylist()
    bare = Query(user_id=104, features={"city": "city 2", "income": 7.0}, history=[Event(item_id=item_id(8))])
    assert row == encode_queries([bare], [None], bundle, request_ids=["a"]).table.to_pylist()[0]
    assert row["history"] == [10]


def test_an_event_that_the_users_table_holds_already_counts_once(bundle: Bundle):
    old = logged(105)
    again = UserState(events=(old[-1], PastEvent(old[-1].item_id, END_MS + 1, {"action": "click"})))
    wanted = Query(user_id=105, history=inline([*old, again.events[1]]))
    assert_same(batch_of(bundle, [Query(user_id=105)], [again]), batch_of(bundle, [wanted], [None]))


@pytest.mark.parametrize("whole", [False, True])
def test_events_behind_the_moment_that_is_asked_about_take_no_place(bundle: Bundle, whole: bool):
    past = [PastEvent(item_id(n), END_MS + n, {}) for n in range(30)]  # the models see ten
    found = batch_of(bundle, [Query(user_id=999, time_ms=END_MS + 15)], [UserState(events=tuple(past), whole=whole)])
    assert found.history_rows_QL.tolist() == [[n + 2 for n in range(5, 15)]]


def test_values_that_the_bundle_does_not_know_are_left_out(bundle: Bundle):
    strange = {"action": 4.5, "colour": "red"}
    state = UserState(features={"city": 1.5, "shoe": 43, "income": "much", "device": "phone"},
                      events=(PastEvent("no id", END_MS, strange), PastEvent(item_id(2), END_MS + 1, strange)))
    (row,) = encode_queries([Query(user_id=999)], [state], bundle, request_ids=["a"]).table.to_pylist()
    bare = Query(user_id=999, history=[Event(item_id="no id", time_ms=END_MS), Event(item_id=item_id(2),
                                                                                      time_ms=END_MS + 1)])
    assert row == encode_queries([bare], [None], bundle, request_ids=["a"]).table.to_pylist()[0]
    assert row["history"] == [1, 4]


def test_several_queries_are_encoded_as_each_alone(bundle: Bundle):
    state = UserState(events=(PastEvent(item_id(9), END_MS + 5, {"action": "click"}),))
    pairs: list[tuple[Query, UserState | None]] = [
        (Query(user_id=105), state), (Query(user_id="nobody"), None), (Query(user_id=103, exclude=[item_id(1)]), None),
        (Query(user_id=7, context={"device": 3}, history=[Event(item_id=item_id(3))]), None),
        (Query(user_id=108, context={"device": "3"}, time_ms=END_MS + DAY_MS), state), (Query(user_id=110), None),
        (Query(user_id=106), state), (Query(user_id="nobody else"), None), (Query(user_id=3, exclude=[1]), None),
    ]
    together = batch_of(bundle, [query for query, _ in pairs], [state for _, state in pairs])
    for position, (query, one) in enumerate(pairs):
        alone = batch_of(bundle, [query], [one])
        length = int(alone.history_mask_QL.sum())
        assert together.history_rows_QL[position, :length].tolist() == alone.history_rows_QL[0].tolist()
        assert int(together.history_mask_QL[position].sum()) == length
        for side in ("user", "history"):
            for name, values in getattr(alone, side).items():
                found = getattr(together, side)[name][position]
                assert (found[:length] if side == "history" else found).equal(values[0]), name
        assert together.time_ms_Q[position] == alone.time_ms_Q[0]
        assert together.request_ids[position] == f"q{position}"
        excluded = alone.exclude[0].tolist() if alone.exclude else []
        assert together.exclude[position].tolist() == excluded


def test_without_the_store_a_history_that_is_not_brought_is_empty(bundle: Bundle):
    queries = [Query(user_id=105), Query(user_id=105, history=[Event(item_id=item_id(3))])]
    found = encode_queries(queries, None, bundle, request_ids=["a", "b"])
    empty = encode_queries([Query(user_id=105, history=[])], [None], bundle, request_ids=["a"])
    assert found.table.to_pylist()[0] == empty.table.to_pylist()[0]
    assert found.table.to_pylist()[0]["city"] == bundle.users.table.to_pylist()[5]["city"]
    assert (found.sources, found.known) == (("unavailable", "request"), (True, True))


@pytest.mark.parametrize(("query", "state", "source", "known"), [
    ({"user_id": 105}, None, "store", True),
    ({"user_id": 7}, UserState(), "store", True),
    ({"user_id": 7}, None, "unknown", False),
    ({"user_id": 7, "features": {"city": "city 1"}}, None, "request", False),
    ({"user_id": 105, "history": []}, UserState(), "request", True),
    ({"user_id": 105, "features": {"city": "city 1"}}, None, "store", True),
])
def test_it_says_where_a_user_comes_from(
    bundle: Bundle, query: dict[str, Any], state: UserState | None, source: str, known: bool
):
    found = encode_queries([Query.model_validate(query)], [state], bundle, request_ids=["a"])
    assert (found.sources, found.known) == ((source,), (known,))


# ---------------------------------------------------------------- exclusion
def excluded(bundle: Bundle, query: Query, state: UserState) -> set[int]:
    table = encode_queries([query], [state], bundle, request_ids=["a"]).table
    return set(table["exclude"][0].as_py()) if "exclude" in table.column_names else set()


def test_a_watched_item_is_excluded_where_the_training_log_excludes_what_was_seen(
    bundle: Bundle, seen_counts: Bundle
):
    state = UserState(events=(PastEvent(item_id(30), END_MS + 5, {}),), exclude=(item_id(40),),
                      seen=((item_id(20), END_MS - 5), (item_id(30), END_MS + 5)))
    assert excluded(bundle, Query(user_id=105), state) == {42}
    assert excluded(seen_counts, Query(user_id=105), state) == {42, 22, 32}
    assert excluded(seen_counts, Query(user_id=103, exclude=[item_id(50)]), state) == {42, 22, 32, 52, 2, 3, 4, 5, 6}


@pytest.mark.parametrize(("asked_ms", "wanted"), [(None, {22, 32}), (END_MS + 6, {22, 32}), (END_MS + 5, {22}),
                                                  (END_MS - 5, set())])
def test_as_in_training_only_what_was_seen_strictly_before_the_request_is_excluded(
    seen_counts: Bundle, asked_ms: int | None, wanted: set[int]
):
    state = UserState(seen=((item_id(20), END_MS - 5), (item_id(30), END_MS + 5)))
    assert excluded(seen_counts, Query(user_id=105, time_ms=asked_ms), state) == wanted


@pytest.mark.parametrize(("options", "counts"), [
    ({}, False), ({"exclude_seen": True}, True), ({"exclude_seen": True, "layout": "requests"}, False),
])
def test_the_data_set_says_whether_what_was_seen_is_excluded(bundle: Bundle, options: dict[str, Any], counts: bool):
    shop = parse_config({**SHOP, "dataset": {**SHOP["dataset"], **options}}, where="shop")
    assert replace(bundle, config=shop).excludes_seen is counts
    assert not bundle.excludes_seen  # simulated: whole requests


def test_the_canonical_row_holds_what_the_store_adds(bundle: Bundle):
    state = UserState(features={"city": "city 1"}, events=(PastEvent(item_id(9), END_MS, {"action": "click"}),))
    (raw,) = encode_queries([Query(user_id="105")], [state], bundle, request_ids=["a"]).raw
    assert raw.to_pylist() == [{"request_id": "a", "user_id": 105, "city": "city 1", "history": [item_id(9)],
                                "history_time_ms": [END_MS], "history_action": ["click"]}]
    assert raw.schema.field("history").type == pa.list_(bundle.items.keys.type)
