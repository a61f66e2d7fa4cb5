"""Threads beside the event loop, and queries that are encoded together: who goes with whom, and who waits for whom."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import DataError
from raycascade.serving import gateway as gateway_module, joint_encoding, lanes as lanes_module
from raycascade.serving.context import RequestContext
from raycascade.serving.gateway import MOST_EXPLAINED, Gateway
from raycascade.serving.joint_encoding import Entry, JointEncoder, Wave
from raycascade.serving.lanes import Lanes
from raycascade.serving.options import StageOptions
from raycascade.serving.requests import Query
from raycascade.serving.stages import LocalStage, StageServer
from raycascade.serving.user_rows import encode_queries
from tests.served import patient
from tests.tiny_world import item_id

FAR_S = 60.0


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(FAR_S):
            return await work()

    return asyncio.run(limited())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


class Work:
    """Blocks its thread until it is let go; says which thread that was."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.gate.wait(FAR_S)
        return threading.current_thread().name


# ---------------------------------------------------------------- lanes
def test_small_work_is_done_in_the_loop_itself_once_it_is_known_to_be_short_and_no_thread_is_busy(
    monkeypatch: pytest.MonkeyPatch,
):
    async def work() -> None:
        lanes, here = Lanes(1), threading.current_thread().name

        async def thread(*, small: bool = True) -> str:
            return await lanes.run(lambda: threading.current_thread().name, small=small)

        assert await thread() != here  # nobody knows yet how long it takes
        assert await thread() == here
        assert await thread(small=False) != here
        held = Work()
        busy = asyncio.create_task(lanes.run(held))
        await until(held.begun.is_set)
        waiting = asyncio.create_task(thread())
        await asyncio.sleep(0)
        held.gate.set()
        assert await waiting == await busy != here
        assert await thread() == here
        monkeypatch.setattr(lanes_module, "HERE_S", 0.0)  # whatever it takes is too long
        assert await thread() != here

    run(work)


def test_what_small_work_raises_in_the_loop_is_raised():
    async def work() -> None:
        lanes = Lanes(1)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await lanes.run(lambda: 1 // 0, small=True)

    run(work)


def test_whoever_is_alone_gets_the_same_thread_and_others_one_that_is_free():
    async def work() -> None:
        lanes = Lanes(2)
        names = {await lanes.run(lambda: threading.current_thread().name) for _ in range(5)}
        assert len(names) == 1
        first, second = Work(), Work()
        both = [asyncio.create_task(lanes.run(one)) for one in (first, second)]
        await until(lambda: first.begun.is_set() and second.begun.is_set())
        first.gate.set()
        second.gate.set()
        assert len(set(await asyncio.gather(*both))) == 2

    run(work)


def test_a_thread_that_goes_on_behind_whoever_gave_up_is_not_free():
    async def work() -> None:
        lanes, given_up = Lanes(2), Work()
        call = asyncio.create_task(lanes.run(given_up))
        await until(given_up.begun.is_set)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        other = await lanes.run(lambda: threading.current_thread().name)  # would wait for ever behind it
        given_up.gate.set()
        await until(lambda: lanes._busy == [0, 0])
        assert await lanes.run(lambda: threading.current_thread().name) != other

    run(work)


def test_work_that_was_given_up_before_it_began_is_not_done():
    async def work() -> None:
        lanes, first, done = Lanes(1), Work(), list[str]()
        before = asyncio.create_task(lanes.run(first))
        await until(first.begun.is_set)
        waiting = asyncio.create_task(lanes.run(done.append, "waiting"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        first.gate.set()
        await before
        await lanes.run(done.append, "later")
        assert done == ["later"]

    run(work)


# ---------------------------------------------------------------- encoding together
@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


async def encode(encoder: JointEncoder, query: Query, *, seconds: float = FAR_S) -> Entry:
    return await encoder.encode(query, None, available=True, request_id=f"r{query.user_id}",
                                deadline=asyncio.get_running_loop().time() + seconds)


def test_queries_of_the_same_moment_are_one_table_and_each_is_what_it_is_alone(bundle: Bundle):
    queries = [Query(user_id=100), Query(user_id=101, exclude=[item_id(3)]),
               Query.model_validate({"user_id": "nobody", "history": [item_id(4)]})]

    async def work() -> None:
        encoder = JointEncoder(bundle, StageOptions())
        together = await asyncio.gather(*(encode(encoder, query) for query in queries))
        assert [len(entry.request.group.table) for entry in together] == [3, 3, 3]
        assert [entry.request.row for entry in together] == [0, 1, 2]
        for query, entry in zip(queries, together, strict=True):
            alone = await encode(JointEncoder(bundle, StageOptions()), query)
            for name in set(alone.encoded.column_names) - {"user_key"}:  # text as soon as one of them is
                assert entry.encoded[name].to_pylist() == alone.encoded[name].to_pylist(), name
            assert (entry.source, entry.known) == (alone.source, alone.known)

    run(work)


def test_a_query_that_does_not_fit_is_refused_and_those_beside_it_are_not(bundle: Bundle):
    async def work() -> None:
        encoder = JointEncoder(bundle, StageOptions())
        good, bad, other = await asyncio.gather(
            encode(encoder, Query(user_id=100)), encode(encoder, Query(user_id=101, features={"citty": "x"})),
            encode(encoder, Query(user_id=102)), return_exceptions=True)
        assert isinstance(bad, DataError)
        assert isinstance(good, Entry)
        assert isinstance(other, Entry)
        assert [entry.encoded["request_id"].to_pylist() for entry in (good, other)] == [["r100"], ["r102"]]

    run(work)


def test_a_query_that_breaks_the_encoding_breaks_it_for_nobody_else(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    def broken(queries: Sequence[Query], *others: Any, **named: Any) -> Any:
        if any(query.user_id == 101 for query in queries):
            raise ZeroDivisionError
        return encode_queries(queries, *others, **named)

    monkeypatch.setattr(joint_encoding, "encode_queries", broken)

    async def work() -> None:
        encoder = JointEncoder(bundle, StageOptions())
        found = await asyncio.gather(*(encode(encoder, Query(user_id=user)) for user in (100, 101, 102)),
                                     return_exceptions=True)
        assert [type(one) for one in found] == [Entry, ZeroDivisionError, Entry]

    run(work)


def test_a_wave_is_over_when_all_have_left_however_often_one_says_so():
    async def work() -> None:
        wave = Wave(2)
        over = asyncio.create_task(wave.over(asyncio.get_running_loop().time() + FAR_S))
        wave.leave(0)
        wave.leave(0)
        await asyncio.sleep(0)
        assert not over.done()
        wave.leave(1)
        await over

    run(work)


def test_no_more_waves_are_under_way_than_there_may_be(bundle: Bundle):
    async def work() -> None:
        encoder = JointEncoder(bundle, StageOptions(), waves=1)
        first = await encode(encoder, Query(user_id=100))
        others = [asyncio.create_task(encode(encoder, Query(user_id=user))) for user in (101, 102)]
        await asyncio.sleep(0.05)
        assert not any(call.done() for call in others)
        first.leave()
        entries = await asyncio.gather(*others)
        assert entries[0].wave is entries[1].wave

    run(work)


def test_a_query_that_is_given_up_in_the_moment_when_it_is_encoded_stands_in_nobodys_way(bundle: Bundle):
    async def work() -> None:
        encoder = JointEncoder(bundle, StageOptions(), waves=1)
        until_over = encoder._batcher._settled
        assert until_over is not None

        async def at_once(results: Sequence[Any], unwanted: Sequence[Any], deadline: float) -> None:
            call.cancel()
            await until_over(results, unwanted, deadline)

        encoder._batcher._settled = at_once
        call = asyncio.create_task(encode(encoder, Query(user_id=100), seconds=10 * FAR_S))
        assert isinstance((await asyncio.gather(call, return_exceptions=True))[0], asyncio.CancelledError)
        encoder._batcher._settled = until_over
        (await encode(encoder, Query(user_id=101))).leave()

    run(work)


# ---------------------------------------------------------------- explanations
def test_explanations_that_were_given_up_do_not_add_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    gate, running = threading.Event(), list[int]()

    def slow(*_: Any) -> Any:
        running.append(1)
        assert gate.wait(FAR_S)
        return None, {}

    monkeypatch.setattr(gateway_module, "fates", slow)
    stages = {name: LocalStage(StageServer(bundle, name)) for name in bundle.cascade.names}
    gateway = Gateway(bundle, stages, patient())

    async def given_up() -> None:
        call = asyncio.create_task(gateway.explain(Query(user_id=100), item_id(3),
                                                   RequestContext.new(deadline_ms=60_000)))
        count = len(running)
        await until(lambda: len(running) > count or gateway._explainers._busy == [1, 1])
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def work() -> None:
        for _ in range(5):
            await given_up()
        assert len(running) == MOST_EXPLAINED
        gate.set()

    run(work)
