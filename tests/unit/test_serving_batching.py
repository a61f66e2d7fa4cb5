"""The batcher, the bounded door and the breaker, driven by hand: nothing here waits for a clock to be right."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from raycascade.errors import DeadlineExceeded, Overloaded
from raycascade.serving.batching import Batcher
from raycascade.serving.breaker import Breaker
from raycascade.serving.options import BatchOptions
from raycascade.serving.slots import Slots

FAR_S = 30.0


class Doubling:
    """Answers each number doubled, and holds a batch until it is let go."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        if not held:
            self.gate.set()

    async def __call__(self, items: list[int], deadline: float) -> Sequence[int]:
        assert deadline > time.monotonic()
        self.batches.append(items)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * item for item in items]


def batcher(run: Doubling, *, max_queued: int = 100, in_flight: int = 1, **options: Any) -> Batcher[int, int]:
    return Batcher(run, options=BatchOptions(**options), in_flight=in_flight, max_queued=max_queued, name="test")


def soon() -> float:
    return time.monotonic() + FAR_S


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(FAR_S):
            return await work()

    return asyncio.run(limited())


async def turns(count: int = 10) -> None:
    """Lets everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_comes_at_the_same_time_goes_together_and_everyone_gets_their_own():
    async def work() -> None:
        doubling = Doubling()
        joined = batcher(doubling)
        assert await asyncio.gather(*(joined.submit(n, deadline=soon()) for n in range(5))) == [0, 2, 4, 6, 8]
        assert doubling.batches == [[0, 1, 2, 3, 4]]

    run(work)


def test_what_comes_while_a_batch_runs_waits_for_its_end_and_no_longer():
    async def work() -> None:
        doubling = Doubling(held=True)
        joined = batcher(doubling)
        calls = [asyncio.create_task(joined.submit(0, deadline=soon()))]
        await turns()
        calls += [asyncio.create_task(joined.submit(n, deadline=soon())) for n in (1, 2)]
        await turns()
        assert doubling.batches == [[0]]
        assert joined.queued == 2
        doubling.gate.set()
        assert await asyncio.gather(*calls) == [0, 2, 4]
        assert doubling.batches == [[0], [1, 2]]

    run(work)


def test_a_batch_holds_no_more_than_it_may_and_the_order_is_that_of_arrival():
    async def work() -> None:
        doubling = Doubling()
        await asyncio.gather(*(batcher_.submit(n, deadline=soon()) for batcher_ in [batcher(doubling, max_size=3)]
                               for n in range(7)))
        assert doubling.batches == [[0, 1, 2], [3, 4, 5], [6]]

    run(work)


def test_sizes_count_and_a_large_item_goes_alone():
    async def work() -> None:
        doubling = Doubling()
        joined = batcher(doubling, max_size=4)
        sizes = {1: 2, 2: 3, 3: 1, 4: 9}
        await asyncio.gather(*(joined.submit(n, deadline=soon(), size=size) for n, size in sizes.items()))
        assert doubling.batches == [[1, 3], [2], [4]]

    run(work)


def test_only_one_key_is_in_a_batch():
    async def work() -> None:
        doubling = Doubling()
        joined = batcher(doubling)
        answers = await asyncio.gather(*(joined.submit(n, deadline=soon(), key=n % 2) for n in range(6)))
        assert answers == [0, 2, 4, 6, 8, 10]
        assert doubling.batches == [[0, 2, 4], [1, 3, 5]]

    run(work)


def test_the_wait_for_others_ends_when_a_batch_is_full():
    async def work() -> None:
        doubling = Doubling()
        joined = batcher(doubling, max_size=2, wait_ms=1000.0)
        first = asyncio.create_task(joined.submit(1, deadline=soon()))
        await turns()
        assert doubling.batches == []
        assert await joined.submit(2, deadline=soon()) == 4
        assert await first == 2
        assert doubling.batches == [[1, 2]]

    run(work)


def test_beyond_the_queue_a_call_is_refused_at_once():
    async def work() -> None:
        doubling = Doubling(held=True)
        joined = batcher(doubling, max_queued=2)
        calls = [asyncio.create_task(joined.submit(n, deadline=soon())) for n in range(1)]
        await turns()
        calls += [asyncio.create_task(joined.submit(n, deadline=soon())) for n in (1, 2)]
        await turns()
        with pytest.raises(Overloaded, match="test: 2 requests wait already") as refused:
            await joined.submit(3, deadline=soon())
        assert refused.value.retry_after_s >= 1
        doubling.gate.set()
        assert await asyncio.gather(*calls) == [0, 2, 4]

    run(work)


def test_an_expired_call_is_not_run():
    async def work() -> None:
        doubling = Doubling(held=True)
        joined = batcher(doubling)
        with pytest.raises(DeadlineExceeded):
            await joined.submit(1, deadline=time.monotonic() - 1)
        first = asyncio.create_task(joined.submit(2, deadline=soon()))
        await turns()
        with pytest.raises(DeadlineExceeded):
            await joined.submit(3, deadline=time.monotonic() + 0.01)
        doubling.gate.set()
        assert await first == 4
        await turns()
        assert doubling.batches == [[2]]

    run(work)


def test_a_batch_that_nobody_waits_for_is_cancelled_and_one_that_somebody_does_is_not():
    async def work() -> None:
        doubling = Doubling(held=True)
        joined = batcher(doubling)
        calls = [asyncio.create_task(joined.submit(n, deadline=soon())) for n in (1, 2)]
        await turns()
        calls[0].cancel()
        await turns()
        assert doubling.cancelled == 0
        calls[1].cancel()
        await turns()
        assert doubling.cancelled == 1
        doubling.gate.set()
        assert await joined.submit(4, deadline=soon()) == 8  # and there is room for others again

    run(work)


def test_calls_that_were_given_up_take_no_room_in_the_queue():
    async def work() -> None:
        doubling = Doubling(held=True)
        joined = batcher(doubling, max_queued=2)
        first = asyncio.create_task(joined.submit(0, deadline=soon()))
        await turns()
        impatient = [asyncio.create_task(joined.submit(n, deadline=soon())) for n in (1, 2)]
        await turns()
        for call in impatient:
            call.cancel()
        await turns()
        patient = asyncio.create_task(joined.submit(3, deadline=soon()))
        await turns()
        assert joined.queued == 1
        doubling.gate.set()
        assert await asyncio.gather(first, patient) == [0, 6]
        assert doubling.batches == [[0], [3]]

    run(work)


@pytest.mark.parametrize("number", [1, 13])
def test_what_is_ready_in_the_moment_when_the_time_is_over_is_given_out(number: int):
    """A busy event loop hears of both in the same turn."""
    async def work() -> None:
        doubling = Doubling(held=True)
        deadline = time.monotonic() + 0.05
        call = asyncio.create_task(batcher(doubling).submit(number, deadline=deadline))
        await turns()
        doubling.gate.set()
        while time.monotonic() < deadline + 0.01:
            pass
        if number == 13:
            with pytest.raises(ValueError, match="unlucky"):
                await call
        else:
            assert await call == 2

    run(work)


def test_what_a_batch_raises_is_raised_for_each_of_it_and_for_nobody_else():
    async def work() -> None:
        doubling = Doubling()
        joined = batcher(doubling, max_size=2)
        answers = await asyncio.gather(*(joined.submit(n, deadline=soon()) for n in (13, 1, 2, 3)),
                                       return_exceptions=True)
        assert [isinstance(answer, ValueError) for answer in answers] == [True, True, False, False]
        assert answers[2:] == [4, 6]

    run(work)


# ---------------------------------------------------------------- the door
def test_the_door_lets_in_as_many_as_it_may_and_the_rest_in_order():
    async def work() -> None:
        slots, order, gate = Slots(most=2, most_queued=3), [], asyncio.Event()

        async def guest(name: int) -> None:
            async with slots.taking(deadline=soon()):
                order.append(name)
                await gate.wait()

        guests = [asyncio.create_task(guest(n)) for n in range(5)]
        await turns()
        assert (order, slots.taken, slots.queued) == ([0, 1], 2, 3)
        with pytest.raises(Overloaded, match="2 requests are worked on and 3 wait"):
            async with slots.taking(deadline=soon()):
                pass
        gate.set()
        await asyncio.gather(*guests)
        assert (order, slots.taken, slots.queued) == ([0, 1, 2, 3, 4], 0, 0)

    run(work)


def test_a_guest_who_leaves_the_queue_makes_room():
    async def work() -> None:
        slots, gate = Slots(most=1, most_queued=1), asyncio.Event()

        async def inside() -> None:
            async with slots.taking(deadline=soon()):
                await gate.wait()

        first = asyncio.create_task(inside())
        await turns()
        with pytest.raises(DeadlineExceeded, match="while it waited"):
            async with slots.taking(deadline=time.monotonic() + 0.01):
                pass
        assert slots.queued == 0
        second = asyncio.create_task(inside())
        await turns()
        gate.set()
        await asyncio.gather(first, second)
        assert slots.taken == 0

    run(work)


def test_a_call_of_several_requests_takes_as_much_room_and_a_larger_one_than_all_goes_alone():
    async def work() -> None:
        slots = Slots(most=4, most_queued=8)
        async with slots.taking(3, deadline=soon()):
            waiting = asyncio.create_task(_enter(slots, 2))
            await turns()
            assert slots.queued == 2
        await waiting
        async with slots.taking(9, deadline=soon()):
            assert slots.taken == 9

    run(work)


async def _enter(slots: Slots, count: int) -> None:
    async with slots.taking(count, deadline=soon()):
        pass


# ---------------------------------------------------------------- the breaker
def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_call_find_out():
    now = [0.0]
    breaker = Breaker(failures=2, pause_s=1.0, clock_s=lambda: now[0])
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert not breaker.allows()
    now[0] = 1.0
    assert [breaker.allows(), breaker.allows()] == [True, False]
    now[0] = 2.0
    assert breaker.allows()
    breaker.succeeded()
    assert [breaker.allows(), breaker.allows()] == [True, True]
