"""Joining concurrent calls into batches: plain asyncio, the same in the gateway's process and in a stage's replica."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from raycascade.errors import DeadlineExceeded, Overloaded
from raycascade.serving.options import BatchOptions

Item = TypeVar("Item")
Result = TypeVar("Result")
Settled = Callable[[Sequence[Result], Sequence[Result], float], Awaitable[None]]


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    """An item that waits, or is on its way with others."""

    item: Item
    size: int
    key: Hashable
    deadline: float
    result: "asyncio.Future[Result]"


class Batcher(Generic[Item, Result]):
    """Gathers items that come at the same time and runs them together: first come, first served.

    `run` gets the items of a batch and the moment (`time.monotonic()`) when the last of them gives up; it answers one
    result for each, and what it raises is raised for each. A batch holds at most `max_size` (the sum of the items'
    sizes; a larger item goes alone) of one key, and leaves as described in `BatchOptions`. An item whose time is over
    is not run; a batch of which nobody waits any more is cancelled. `settled` gets the results, those of them that
    nobody waited for any more, and that moment: a batch counts as being on its way until it returns, though its results
    are given out before. Belongs to one event loop.
    """

    def __init__(
        self, run: Callable[[list[Item], float], Awaitable[Sequence[Result]]], *, options: BatchOptions, in_flight: int,
        max_queued: int, name: str, settled: Settled[Result] | None = None,
    ) -> None:
        self._run, self._settled = run, settled
        self._max_size, self._wait_s = options.max_size, options.wait_ms / 1000
        self._most_running = options.in_flight or in_flight
        self._max_queued = max_queued
        self._name = name
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._queued = 0  # the sum of the sizes
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._seconds = 0.0  # a moving mean of what one batch takes

    @property
    def queued(self) -> int:
        """How much waits."""
        return self._queued

    async def submit(self, item: Item, *, deadline: float, size: int = 1, key: Hashable = None) -> Result:
        """The item's result. Overloaded where the queue is full, DeadlineExceeded where the time is over before."""
        if self._is_full(size):
            self._drop_abandoned()
        if self._is_full(size):
            raise Overloaded(f"{self._name}: {self._queued} requests wait already; try again later",
                             retry_after_s=self._retry_after_s())
        if (left_s := deadline - time.monotonic()) <= 0:
            raise self._too_late()
        waiting = _Waiting(item, size, key, deadline, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._queued += size
        self._wake()
        try:
            async with asyncio.timeout(left_s):
                return await waiting.result
        except TimeoutError:
            if waiting.result.done() and not waiting.result.cancelled():
                return waiting.result.result()  # it came in the same turn of the loop; or the error is the run's own
            raise self._too_late() from None

    def _is_full(self, size: int) -> bool:
        return self._queued + size > self._max_queued and bool(self._queue)

    def _drop_abandoned(self) -> None:
        """What nobody waits for any more takes no room."""
        self._queue = deque(waiting for waiting in self._queue if not waiting.result.done())
        self._queued = sum(waiting.size for waiting in self._queue)

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._name}: the request's time was over; give it more, or try again later")

    def _retry_after_s(self) -> int:
        batches = self._queued / self._max_size / self._most_running
        return max(1, min(60, round(batches * self._seconds + 0.5)))

    def _wake(self) -> None:
        """Sees to it that the queue is looked at: after everything that comes in this turn of the loop, so that what
        comes together goes together, or after the time to wait for others."""
        if len(self._running) >= self._most_running or not self._queue:
            return
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = (loop.call_later(self._wait_s, self._launch) if self._wait_s
                           else loop.call_soon(self._launch))
        elif self._wait_s and self._queued >= self._max_size:
            self._timer.cancel()
            self._timer = loop.call_soon(self._launch)

    def _launch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and len(self._running) < self._most_running:
            batch = self._next()
            if not batch:
                continue
            task = asyncio.get_running_loop().create_task(self._carry(batch))
            self._running.add(task)
            for waiting in batch:
                waiting.result.add_done_callback(lambda _, task=task, batch=batch: _end_if_alone(task, batch))

    def _next(self) -> "list[_Waiting[Item, Result]]":
        """The next batch; what nobody waits for any more is left out, and what has another key stays in its place."""
        batch: list[_Waiting[Item, Result]] = []
        total, kept, now = 0, deque[_Waiting[Item, Result]](), time.monotonic()
        while self._queue and total < self._max_size:
            waiting = self._queue.popleft()
            if waiting.result.done() or waiting.deadline <= now:
                self._queued -= waiting.size
            elif batch and (waiting.key != batch[0].key or total + waiting.size > self._max_size):
                kept.append(waiting)
            else:
                batch.append(waiting)
                total += waiting.size
                self._queued -= waiting.size
        self._queue.extendleft(reversed(kept))
        return batch

    async def _carry(self, batch: "list[_Waiting[Item, Result]]") -> None:
        started = time.monotonic()
        try:
            results = await self._run([one.item for one in batch], max(one.deadline for one in batch))
            assert len(results) == len(batch), (self._name, len(results), len(batch))
            unwanted = []
            for waiting, result in zip(batch, results, strict=True):
                if waiting.result.done():
                    unwanted.append(result)
                else:
                    waiting.result.set_result(result)
            if self._settled is not None:
                await self._settled(results, unwanted, max(one.deadline for one in batch))
        except Exception as error:
            for waiting in batch:
                if not waiting.result.done():
                    waiting.result.set_exception(error)
        finally:
            self._running.discard(asyncio.current_task())  # type: ignore[arg-type]
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)
            if self._queue:
                self._launch()


def _end_if_alone(task: "asyncio.Task[None]", batch: "list[_Waiting[Item, Result]]") -> None:
    """Cancels a batch that nobody waits for."""
    if not task.done() and all(waiting.result.cancelled() for waiting in batch):
        task.cancel()
