"""The bounded door of a gateway: so many requests at a time, so many waiting, and the others are sent away at once."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from raycascade.errors import DeadlineExceeded, Overloaded


class Slots:
    """`most` requests are worked on, `most_queued` wait in order of arrival. A call may count as several requests; one
    that is larger than all of it goes in alone. Belongs to one event loop."""

    def __init__(self, *, most: int, most_queued: int) -> None:
        self._most, self._most_queued = most, most_queued
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._queued = 0
        self._seconds = 0.0  # a moving mean of what a request takes

    @property
    def taken(self) -> int:
        """How many requests are worked on."""
        return self._taken

    @property
    def queued(self) -> int:
        """How many wait."""
        return self._queued

    @asynccontextmanager
    async def taking(self, count: int = 1, *, deadline: float) -> AsyncIterator[None]:
        """Room for so many requests. Overloaded where the queue is full, DeadlineExceeded where their time is over
        before there is room."""
        await self._enter(count, deadline)
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds += 0.1 * (time.monotonic() - started - self._seconds)
            self._taken -= count
            self._let_in()

    async def _enter(self, count: int, deadline: float) -> None:
        if (left_s := deadline - time.monotonic()) <= 0:
            raise DeadlineExceeded("the request's time was over before it was begun; give it more")
        if not self._waiting and self._fits(count):
            self._taken += count
            return
        if self._queued + count > self._most_queued:
            raise Overloaded(f"{self._taken} requests are worked on and {self._queued} wait, which is as many as this "
                             "replica takes; try again later, or add replicas", retry_after_s=self._retry_after_s())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._queued += count
        try:
            async with asyncio.timeout(left_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # let in, and given up in the same moment
                self._taken -= count
            self._let_in()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's time was over while it waited; try again later") from None
            raise

    def _fits(self, count: int) -> bool:
        return self._taken == 0 or self._taken + count <= self._most

    def _let_in(self) -> None:
        while self._waiting:
            count, turn = self._waiting[0]
            if not turn.done() and not self._fits(count):
                break
            self._waiting.popleft()
            self._queued -= count
            if not turn.done():
                self._taken += count
                turn.set_result(None)

    def _retry_after_s(self) -> int:
        return max(1, min(60, math.ceil(self._queued * self._seconds / self._most)))
