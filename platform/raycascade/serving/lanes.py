"""Threads that compute beside an event loop. Whoever is alone always gets the same one, whose caches are warm."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
HERE_S = 0.02  # longer than that nobody else should wait for the loop
WEIGHT = 0.2  # of the newest work in the moving mean


class Lanes:
    """`count` threads. Work goes to the first of those with the least to do; a pool would hand it around, and the steps
    of one request would cost half as much again (two cores: 10 ms instead of 7). Belongs to one event loop."""

    def __init__(self, count: int = 1) -> None:
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"lane-{number}") for number in range(count)]
        self._busy = [0] * count
        self._small_s: float | None = None  # what small works take: a moving mean

    async def run(self, work: Callable[[*Arguments], Result], *arguments: *Arguments, small: bool = False) -> Result:
        """What the work returns or raises. Work that was cancelled before it began is not done. `small`: it may be done
        in the loop itself while no thread is busy, as long as such works take less than HERE_S; the way to a thread
        and back would cost a request about a millisecond."""
        started = time.monotonic()
        try:
            if small and self._small_s is not None and self._small_s < HERE_S and not any(self._busy):
                return work(*arguments)
            return await self._in_thread(work, *arguments)
        finally:
            if small:
                seconds = time.monotonic() - started
                self._small_s = seconds if self._small_s is None else (1 - WEIGHT) * self._small_s + WEIGHT * seconds

    async def _in_thread(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        lane = min(range(len(self._busy)), key=lambda number: (self._busy[number], number))
        loop, future = asyncio.get_running_loop(), self._threads[lane].submit(work, *arguments)
        self._busy[lane] += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            if future.done():
                self._busy[lane] -= 1
            else:  # nobody waits for it any more, but the thread goes on
                future.add_done_callback(lambda _: self._left_later(loop, lane))

    def _left_later(self, loop: asyncio.AbstractEventLoop, lane: int) -> None:
        with suppress(RuntimeError):  # the loop has ended before the work
            loop.call_soon_threadsafe(self._left, lane)

    def _left(self, lane: int) -> None:
        self._busy[lane] -= 1
