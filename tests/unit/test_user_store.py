"""The store in memory beside a naive one, and events at the door."""

import pickle
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import ConfigError, DataError
from raycascade.serving.options import UsersOptions, parse_options
from raycascade.serving.users import (
    EmbeddedUserStore,
    IdKinds,
    NewEvent,
    PastEvent,
    StoreUnavailable,
    check_events,
    open_user_store,
)
from tests.naive_users import EXCLUDE_LEN, HISTORY_LEN, NaiveUsers, batches, replay, run

INTEGERS = IdKinds("int", "int")
NOW_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


def embedded(*, history_len: int = HISTORY_LEN, exclude_len: int = EXCLUDE_LEN, **more: Any) -> EmbeddedUserStore:
    return EmbeddedUserStore(INTEGERS, history_len=history_len, exclude_len=exclude_len, dedup_s=100, **more)


def event(
    event_id: str, *, user: int | str = 1, item: int | str = 5, time_ms: int | None = 9, **features: Any
) -> NewEvent:
    return NewEvent(event_id=event_id, user_id=user, item_id=item, time_ms=time_ms, features=features)


# ---------------------------------------------------------------- what is held
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(sent=batches, history_len=st.integers(1, 7), exclude_len=st.integers(0, 5))
def test_any_sequence_of_events_gives_what_the_naive_store_gives(sent: list, history_len: int, exclude_len: int):
    naive = NaiveUsers(history_len=history_len, exclude_len=exclude_len)
    run(replay(embedded(history_len=history_len, exclude_len=exclude_len), sent, naive))


def test_late_events_are_sorted_in_and_those_of_one_moment_stay_in_their_order():
    async def ask() -> list[tuple[Any, int]]:
        store = embedded()
        await store.append([event(name, item=item, time_ms=time) for name, item, time in
                            [("a", 1, 50), ("b", 2, 20), ("c", 3, 50), ("d", 4, 20), ("e", 5, 30)]], timeout_s=1)
        (state,) = await store.fetch([1], timeout_s=1)
        assert state is not None
        return [(past.item_id, past.time_ms) for past in state.events]

    assert run(ask()) == [(2, 20), (4, 20), (5, 30), (1, 50), (3, 50)]


def test_an_event_without_a_time_happened_when_it_came():
    async def ask() -> Any:
        store = embedded(now_ms=lambda: NOW_MS)
        await store.append([event("a", item="x9", time_ms=None, action="click", other=None)], timeout_s=1)
        return (await store.fetch(["1"], timeout_s=1))[0]

    assert run(ask()).events == (PastEvent("x9", NOW_MS, {"action": "click"}),)


def test_an_id_is_forgotten_after_its_time_and_counts_for_its_user_only():
    clock = [0]

    async def ask() -> list[int]:
        store, counts = embedded(now_ms=lambda: clock[0]), []
        for now, user in ((0, 1), (1, 1), (1, 2), (99_999, 1), (100_000, 1), (199_999, 1), (200_000, 1)):
            clock[0] = now
            counts.append((await store.append([event("a", user=user)], timeout_s=1)).accepted)
        return counts

    assert run(ask()) == [1, 0, 1, 0, 1, 0, 1]


def test_the_users_that_were_heard_of_last_stay():
    async def ask() -> list[bool]:
        store = embedded(most_users=2)
        for name, user in (("a", 1), ("b", 2), ("c", 1), ("d", 3)):
            await store.append([event(name, user=user)], timeout_s=1)
        return [state is not None for state in await store.fetch([1, 2, 3], timeout_s=1)]

    assert run(ask()) == [True, False, True]


def test_a_state_does_not_change_when_later_events_come():
    async def ask() -> int:
        store = embedded()
        await store.append([event("a")], timeout_s=1)
        (before,) = await store.fetch([1], timeout_s=1)
        await store.append([event("b")], timeout_s=1)
        assert before is not None
        return len(before.events)

    assert run(ask()) == 1


# ---------------------------------------------------------------- ids
@pytest.mark.parametrize(("kind", "given", "wanted"), [
    ("int", "12", 12), ("int", 12, 12), ("int", "-3", -3), ("int", "x1", "x1"), ("int", "9" * 30, "9" * 30),
    ("int", "-" + "1" * 22, "-" + "1" * 22), ("text", 12, "12"), ("text", "12", "12"),
])
def test_ids_are_compared_in_the_type_of_the_log(kind: Any, given: Any, wanted: Any):
    assert IdKinds(kind, "int").user(given) == wanted
    assert IdKinds("int", kind).item(given) == wanted


# ---------------------------------------------------------------- the door
def test_events_that_the_log_knows_pass(bundle: Bundle):
    check_events([event("a", action="click"), event("b", item="no such item", time_ms=None, action=None),
                  event("c", time_ms=NOW_MS + 86_400_000, action="never seen")], bundle, now_ms=NOW_MS)


@pytest.mark.parametrize(("changes", "message"), [
    ({"time_ms": NOW_MS + 86_400_001}, "events.1.time_ms: .* is more than a day ahead"),
    ({"act": "click"}, "events.1.features.act: no such event feature; did you mean 'action'?"),
    ({"event_age": 3}, "events.1.features.event_age: no such event feature"),
    ({"action": 1.5}, "events.1.features.action: expected an id, got 1.5"),
    ({"action": ["click"]}, r"events.1.features.action: expected an id, got \[\"click\"\]"),
    ({"action": "x" * 5000}, "events.1.features: 5014 bytes, at most 4096 are kept"),
])
def test_an_event_that_does_not_fit_is_named(bundle: Bundle, changes: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        check_events([event("a"), event("b", **changes)], bundle, now_ms=NOW_MS)


@pytest.mark.parametrize("body", [
    {"event_id": ""}, {"event_id": "x" * 129}, {"event_id": 5}, {"time_ms": -1}, {"time_ms": 1 << 53},
    {"user_id": None}, {"item_id": 1.5}, {"more": 1}, {"features": {"a": float("nan")}},
])
def test_what_is_no_event_is_refused(body: dict[str, Any]):
    good = {"event_id": "a", "user_id": 1, "item_id": 2}
    assert NewEvent.model_validate(good).time_ms is None
    with pytest.raises(ValidationError):
        NewEvent.model_validate(good | body)


# ---------------------------------------------------------------- options
def test_the_options_open_the_store_they_name(bundle: Bundle):
    assert isinstance(open_user_store(UsersOptions(), bundle), EmbeddedUserStore)


@pytest.mark.parametrize(("tree", "message"), [
    ({"gateway": {"replicas": 2}}, "gateway.replicas: 2, but users.store embedded keeps users in one replica"),
    ({"users": {"store": "redis"}}, "users.url: missing; store redis needs one"),
    ({"users": {"url": "redis://:secret@host"}}, "users.url: store embedded asks no server"),
    ({"users": {"store": "redis", "url": "redis://x", "namespace": "a:b"}}, "users.namespace"),
])
def test_options_that_cannot_work_are_refused_in_one_line(tree: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_options(tree, where="serve.yaml")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_many_gateways_share_a_redis():
    options = parse_options({"gateway": {"replicas": 3}, "users": {"store": "redis", "url": "redis://:secret@host"}},
                            where="serve.yaml")
    assert options.gateway.replicas == 3
    assert "secret" not in repr(options)


def test_the_error_of_a_store_travels_with_its_reason():
    again = pickle.loads(pickle.dumps(StoreUnavailable("no answer", "timeout")))
    assert (str(again), again.reason) == ("no answer", "timeout")
