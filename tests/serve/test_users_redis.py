"""Users in a real Redis server: beside the naive store, with many writers, and after a load."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

pytest.importorskip("redis", reason="the package redis is not installed; install raycascade[redis]")

from raycascade.bundle import Bundle, load_bundle
from raycascade.serving import users_redis
from raycascade.serving.options import UsersOptions
from raycascade.serving.requests import Query
from raycascade.serving.user_rows import encode_queries
from raycascade.serving.users import EmbeddedUserStore, IdKinds, NewEvent, UserState, open_user_store
from raycascade.serving.users_redis import LoadedUser, RedisUserStore
from tests.naive_users import EXCLUDE_LEN, HISTORY_LEN, NaiveUsers, batches, replay, run
from tests.redis_process import INTEGERS, SOON_S, RedisProcess, event, eventually, needs_redis, store_of
from tests.tiny_world import DAY_MS, START_MS, item_id, write_bundle

pytestmark = needs_redis


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield process
    process.kill()


@pytest.fixture
def server(shared: RedisProcess) -> RedisProcess:
    """The module's server, empty."""
    with shared.client() as client:
        client.flushall()
    return shared


# ---------------------------------------------------------------- what is held
@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=batches, history_len=st.integers(1, 7), exclude_len=st.integers(0, 5))
def test_any_sequence_of_events_gives_what_the_naive_store_gives(
    server: RedisProcess, sent: list, history_len: int, exclude_len: int
):
    async def both() -> None:
        store = store_of(server, history_len=history_len, exclude_len=exclude_len)
        try:
            await replay(store, sent, NaiveUsers(history_len=history_len, exclude_len=exclude_len))
        finally:
            await store.close()

    with server.client() as client:
        client.flushall()
    run(both())


def test_concurrent_duplicates_from_several_gateways_count_once(server: RedisProcess):
    gateways, rounds = 6, 20
    start = threading.Barrier(gateways)

    def gateway(number: int) -> int:
        async def send() -> int:
            store, accepted = store_of(server, history_len=1000), 0
            start.wait(SOON_S)
            for position in range(rounds):
                events = [event(f"e{position}-{n}", user=n % 3, item=position, time_ms=position + 1) for n in range(6)]
                recorded = await store.append(events[number:] + events[:number], timeout_s=SOON_S)
                accepted += recorded.accepted
                assert recorded.accepted + recorded.duplicates == len(events)
            await store.close()
            return accepted

        return run(send())

    with ThreadPoolExecutor(gateways) as pool:
        accepted = sum(pool.map(gateway, range(gateways)))
    assert accepted == rounds * 6

    async def lengths() -> list[list[int]]:
        store = store_of(server, history_len=1000)
        states = await store.fetch([0, 1, 2], timeout_s=SOON_S)
        await store.close()
        return [[past.time_ms for past in state.events] for state in states if state is not None]

    assert run(lengths()) == [[time_ms for time_ms in range(1, rounds + 1) for _ in range(2)]] * 3


def test_what_the_server_holds_of_a_user_is_bounded(server: RedisProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(users_redis, "MOST_EVENT_IDS", 6)

    async def ask() -> None:
        store = store_of(server)
        for number in range(20):
            await store.append([event(f"e{number}", item=number, time_ms=100 - number)], timeout_s=60)
        await store.close()

    run(ask())
    with server.client() as client:
        assert client.llen("test:int:int:{1}:events") == HISTORY_LEN
        assert client.zcard("test:int:int:{1}:seen") == EXCLUDE_LEN
        assert client.zcard("test:int:int:{1}:ids") == 6
        assert 0 < client.ttl("test:int:int:{1}:ids") <= 3600


def test_a_duplicate_does_not_make_an_id_last_longer(server: RedisProcess):
    def arrived() -> float:
        with server.client() as client:
            return client.zscore("test:int:int:{1}:ids", "a") or 0.0

    async def ask() -> None:
        store = store_of(server)
        await store.append([event("a")], timeout_s=60)
        with server.client() as client:
            client.zadd("test:int:int:{1}:ids", {"a": arrived() - 1000})
        before = arrived()
        assert (await store.append([event("a")], timeout_s=60)).duplicates == 1
        assert arrived() == before
        await store.close()

    run(ask())


def test_ids_beyond_the_floats_come_back_whole(server: RedisProcess):
    async def ask() -> Any:
        store = store_of(server)
        await store.append([event("a", user=(1 << 62) + 1, item=(1 << 62) + 1), event("b", user=1 << 62)], timeout_s=60)
        found = await store.fetch([(1 << 62) + 1], timeout_s=60)
        await store.close()
        return found[0]

    state = run(ask())
    assert [past.item_id for past in state.events] == [(1 << 62) + 1]
    assert state.seen == (((1 << 62) + 1, 9),)


@pytest.mark.parametrize("user", ["}{", "a}:events", 'q"uote', "new\nline", "\u00e4\U0001f600", "*", "0"])
def test_no_id_of_a_user_touches_another(server: RedisProcess, user: str):
    async def ask() -> list[int]:
        store = store_of(server, kinds=IdKinds("text", "text"))
        events = [event("a", user=user, item="x y\n]"), event("a", user="a"), event("b", user=0)]
        await store.append(events, timeout_s=60)
        found = await store.fetch([user, "a", "0"], timeout_s=60)
        await store.close()
        return [len(state.events) for state in found if state is not None]

    assert run(ask()) == ([2, 1, 2] if user == "0" else [1, 1, 1])


def test_an_id_is_forgotten_after_its_time(server: RedisProcess):
    async def ask() -> None:
        store = store_of(server, dedup_s=0.2, history_len=100)
        assert (await store.append([event("a")], timeout_s=60)).accepted == 1

        async def again() -> bool:
            return (await store.append([event("a")], timeout_s=60)).accepted == 1

        await eventually(again)
        await store.close()

    run(ask())


def test_namespaces_and_kinds_of_ids_are_apart_and_versions_of_bundles_are_not(
    server: RedisProcess, bundle: Bundle, tmp_path: Path
):
    swapped = load_bundle(write_bundle(str(tmp_path / "other"), seed=12))
    assert swapped.version != bundle.version

    async def held(store: RedisUserStore) -> bool:
        (state,) = await store.fetch([1], timeout_s=60)
        await store.close()
        return state is not None

    async def ask() -> list[bool]:
        options = UsersOptions(store="redis", url=server.url, timeout_ms=60_000)
        first, other = open_user_store(options, bundle), open_user_store(options, swapped)
        assert isinstance(first, RedisUserStore)
        assert isinstance(other, RedisUserStore)
        await first.append([event("a")], timeout_s=60)
        await first.close()
        apart = {"namespace": "raycascade"}
        return [await held(other), await held(store_of(server, **apart)), await held(store_of(server)),
                await held(store_of(server, kinds=IdKinds("text", "int"), **apart)),
                await held(store_of(server, kinds=IdKinds("int", "text"), **apart))]

    assert run(ask()) == [True, True, False, False, False]


def test_both_stores_give_the_same_requests(server: RedisProcess, bundle: Bundle):
    events = [NewEvent(event_id=str(n), user_id=[105, "999"][n % 2], item_id=item_id(3 * n), features={
        "action": "click"} if n % 3 else {}, time_ms=START_MS + 7 * DAY_MS + 40 - n) for n in range(9)]
    users: list[int | str] = [105, 999, 110]

    async def ask() -> list[Any]:
        tables = []
        for store in (store_of(server, history_len=50), EmbeddedUserStore(INTEGERS, history_len=50, exclude_len=0,
                                                                          dedup_s=60)):
            await store.append(events, timeout_s=60)
            states = await store.fetch(users, timeout_s=60)
            tables.append(encode_queries([Query(user_id=user) for user in users], states, bundle,
                                         request_ids=["a", "b", "c"]))
            await store.close()
        return tables

    redis_says, memory_says = run(ask())
    assert redis_says.table.equals(memory_says.table)
    assert redis_says.known == memory_says.known == (True, True, True)


# ---------------------------------------------------------------- loaded users
def test_a_loaded_history_is_whole_and_events_since_continue_it(server: RedisProcess):
    async def ask() -> list[Any]:
        store = store_of(server, history_len=4)
        states = []
        await store.append([event("a", item=50, time_ms=20), event("b", item=51, time_ms=40)], timeout_s=60)
        for at_ms, past in ((7, "[[0,9],[10,10],[20,50],[20,20]]"), (8, "[[15,15],[30,30,{}]]"), (6, "[]")):
            loaded = LoadedUser("1", at_ms, {"features": '{"city":"x"}', "exclude": "[8]", "past": past})
            assert await store.load([loaded], timeout_s=60) == (at_ms > 6)
            states += await store.fetch([1], timeout_s=60)
        await store.append([event("c", item=52, time_ms=25), event("a", item=50, time_ms=20)], timeout_s=60)
        states += await store.fetch([1], timeout_s=60)
        await store.close()
        return states

    first, *others = run(ask())
    assert [(past.item_id, past.time_ms) for past in first.events] == [(10, 10), (50, 20), (20, 20), (51, 40)]
    assert (first.features, first.exclude, first.whole) == ({"city": "x"}, (8,), True)
    later = [(15, 15), (50, 20), (30, 30), (51, 40)]  # another load takes the place of the one before
    assert [[(past.item_id, past.time_ms) for past in state.events] for state in others] == [
        later, later, [(50, 20), (52, 25), (30, 30), (51, 40)]]


def test_what_a_load_leaves_out_stays(server: RedisProcess):
    async def ask() -> list[Any]:
        store = store_of(server)
        for fields in ({"past": "[]"}, {"exclude": "[3]"}, {"features": '{"city":"x"}'}, {}):
            await store.load([LoadedUser(1, 5, fields)], timeout_s=60)
        await store.load([LoadedUser(2, 0, {"features": "{}"})], timeout_s=60)
        found = await store.fetch([1, 2], timeout_s=60)
        await store.close()
        return found

    whole, not_whole = run(ask())
    assert (whole.features, whole.exclude, whole.events, whole.whole) == ({"city": "x"}, (3,), (), True)
    assert not_whole == UserState()
