"""The store of users in Redis where the server is dead, hangs, refuses, or wants a password."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis", reason="the package redis is not installed; install raycascade[redis]")

from raycascade.serving.users import NewEvent, StoreUnavailable
from raycascade.serving.users_redis import RedisUserStore
from tests.naive_users import run
from tests.redis_process import INTEGERS, RedisProcess, event, eventually, needs_redis, store_of

pytestmark = needs_redis


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


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server to be killed."""
    process = RedisProcess(tmp_path)
    yield process
    process.kill()


def test_a_dead_server_costs_no_latency_and_is_found_again(own: RedisProcess, caplog: pytest.LogCaptureFixture):
    async def ask() -> list[float]:
        store = store_of(own)
        await store.append([event("a")], timeout_s=60)
        own.kill()
        waits, reasons = [], []
        for _ in range(30):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable) as caught:
                await store.fetch([1], timeout_s=60)
            waits.append(time.monotonic() - began)
            reasons.append(caught.value.reason)
        assert reasons == ["connection"] * 3 + ["open"] * 27
        assert not await store.ready()
        own.start()
        await eventually(store.ready)
        assert await store.fetch([1], timeout_s=60) == [None]  # this server keeps nothing
        assert (await store.append([event("a")], timeout_s=60)).accepted == 1  # nor the scripts
        await store.close()
        return waits

    with caplog.at_level(logging.WARNING, logger="raycascade"):
        waits = run(ask())
    assert sorted(waits)[15] < 0.005  # a median, so that a busy machine does not count
    assert [record.message.partition(" (")[0].partition(" after")[0] for record in caplog.records] == [
        f"the user store at redis://127.0.0.1:{own.port}/0 does not answer",
        f"the user store at redis://127.0.0.1:{own.port}/0 answers again"]


def test_a_server_that_hangs_costs_the_time_out_a_few_times_and_then_nothing(own: RedisProcess):
    async def ask() -> None:
        patient, store = store_of(own), store_of(own, timeout_s=0.2)
        await patient.append([event("a", user=user, item=user) for user in range(1, 9)], timeout_s=60)
        own.freeze()
        try:
            reasons = []
            for user in range(1, 9):
                with pytest.raises(StoreUnavailable) as caught:
                    await store.fetch([user], timeout_s=60)
                reasons.append(caught.value.reason)
            assert reasons == ["timeout"] * 3 + ["open"] * 5
        finally:
            own.thaw()
        for user in range(1, 9):  # what was given up comes late, and must not be taken for the answer to another

            async def answered(user: int = user) -> bool:
                try:
                    (state,) = await store.fetch([user], timeout_s=60)
                except StoreUnavailable:
                    return False
                assert state is not None
                assert [past.item_id for past in state.events] == [user]
                return True

            await eventually(answered)
        await store.close()
        await patient.close()

    run(ask())


def test_a_request_that_has_no_time_left_does_not_shut_others_out(own: RedisProcess):
    async def ask() -> None:
        store = store_of(own, timeout_s=60.0)
        for _ in range(10):
            with pytest.raises(StoreUnavailable, match="no answer within 0 ms"):
                await store.fetch([1], timeout_s=-1.0)
        assert await store.fetch([1], timeout_s=60) == [None]
        await store.close()

    run(ask())


def test_a_connection_that_died_while_idle_is_replaced_within_the_call(server: RedisProcess):
    async def ask() -> None:
        store = store_of(server)
        await store.append([event("a")], timeout_s=60)
        with server.client() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            client.script_flush()
        (state,) = await store.fetch([1], timeout_s=60)
        assert state is not None
        await store.close()

    run(ask())


@pytest.mark.parametrize("spoilt", ["events", "seen", "ids"])
def test_what_is_refused_is_said_without_what_was_asked_and_shuts_nobody_else_out(
    server: RedisProcess, caplog: pytest.LogCaptureFixture, spoilt: str
):
    async def ask() -> list[str]:
        store, said = store_of(server), []
        with server.client() as client:
            for _ in range(3):
                client.set(f"test:int:int:{{1}}:{spoilt}", "of no use")
                with pytest.raises(StoreUnavailable) as caught:
                    await store.append([NewEvent(event_id="private", user_id=1, item_id=2)], timeout_s=60)
                assert caught.value.reason == "refused"
                said.append(str(caught.value))
            client.delete(f"test:int:int:{{1}}:{spoilt}")
        again = await store.append([NewEvent(event_id="private", user_id=1, item_id=2)], timeout_s=60)
        assert again.accepted == 1  # nothing was left half done
        assert (await store.append([event("a", user=2)], timeout_s=60)).accepted == 1
        await store.close()
        return said

    with caplog.at_level(logging.WARNING, logger="raycascade"):
        said = run(ask())
    assert all("WRONGTYPE" in one and "private" not in one for one in said)
    assert [record.message.partition(": WRONGTYPE")[0] for record in caplog.records] == [
        f"the user store at redis://127.0.0.1:{server.port}/0 refuses"]


def test_failures_that_are_not_in_a_row_shut_nobody_out(own: RedisProcess):
    async def ask() -> None:
        store = store_of(own)
        for _ in range(2):
            own.kill()
            for _ in range(2):
                with pytest.raises(StoreUnavailable) as caught:
                    await store.fetch([1], timeout_s=60)
                assert caught.value.reason == "connection"
            own.start()
            assert await store.fetch([1], timeout_s=60) == [None]
        await store.close()

    run(ask())


def test_a_password_is_used_and_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any):
    server = RedisProcess(tmp_path, password="s3cret")
    monkeypatch.setenv("USERS_URL", server.url)

    async def ask() -> list[str]:
        good = store_of(server)
        assert (await good.append([event("a")], timeout_s=60)).accepted == 1
        await good.close()
        said = [repr(good._redis)]
        named = RedisUserStore("env:USERS_URL", INTEGERS, namespace="test", history_len=5, exclude_len=0, dedup_s=9,
                               timeout_s=60.0)
        assert await named.ready()
        await named.close()
        bad = RedisUserStore(server.url.replace("s3cret", "wr0ng"), INTEGERS, namespace="test", history_len=5,
                             exclude_len=0, dedup_s=9, timeout_s=60.0)
        for _ in range(5):
            with pytest.raises(StoreUnavailable) as caught:
                await bad.fetch([1], timeout_s=60)
            said.append(str(caught.value))
        await bad.close()
        return said

    try:
        with caplog.at_level(logging.DEBUG):
            said = " ".join([*run(ask()), caplog.text])
    finally:
        server.kill()
    assert "s3cret" not in said
    assert "wr0ng" not in said
    assert f"redis://127.0.0.1:{server.port}/0" in said
