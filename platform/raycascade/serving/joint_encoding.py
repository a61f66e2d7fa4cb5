"""Encoding the queries of the same moment together: one table for all, and each query's place in it."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from raycascade.bundle import Bundle
from raycascade.errors import DeadlineExceeded
from raycascade.serving.answers import UserSource
from raycascade.serving.batching import Batcher
from raycascade.serving.lanes import Lanes
from raycascade.serving.options import StageOptions
from raycascade.serving.requests import Query
from raycascade.serving.stages import EncodedRequests, LocalStage, OneRequest, run_ahead
from raycascade.serving.user_rows import Encoded, encode_queries
from raycascade.serving.users import UserState


class Wave:
    """Queries that were encoded together, until the last of them is answered."""

    def __init__(self, size: int) -> None:
        self._inside = set(range(size))
        self._over = asyncio.Event()

    def leave(self, place: int) -> None:
        """One of them is answered, or given up; to say it again changes nothing."""
        self._inside.discard(place)
        if not self._inside:
            self._over.set()

    async def over(self, deadline: float) -> None:
        """Returns when all have left, or should have."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._over.wait()


class Entry(NamedTuple):
    """A query as the stages see it. `raw`: its canonical row, `encoded`: what became of it and the users table. Whoever
    has got it says `leave()` in the end, or stands in the way of others until its deadline."""

    wave: Wave
    place: int  # in the wave
    request: OneRequest
    encoded: pa.Table
    raw: pa.Table
    source: UserSource
    known: bool

    def leave(self) -> None:
        """The query is answered, or given up; may be said twice."""
        self.wave.leave(self.place)


@dataclass(eq=False, slots=True)
class _Call:
    query: Query
    state: UserState | None
    available: bool  # whether the user store was
    request_id: str
    deadline: float
    entry: Entry | None = None  # once it is encoded


class JointEncoder:
    """Encodes with one bundle, in a thread; queries that come while another batch is encoded go together. With `waves`,
    at most so many batches are between here and their answers: where the stages compute in this process, a few large
    batches cost less than many small ones. None: any number. `near`: the stages that compute here; a batch that is
    encoded goes through them in the same thread."""

    def __init__(
        self, bundle: Bundle, options: StageOptions, *, lanes: Lanes | None = None, waves: int | None = None,
        near: Sequence[LocalStage] = (),
    ) -> None:
        self._bundle, self._lanes, self._near = bundle, lanes or Lanes(), near
        self._batcher = Batcher(self._run, options=options.batch, in_flight=waves or 1, max_queued=options.max_queued,
                                name="encode", settled=_until_over if waves else None)

    async def encode(
        self, query: Query, state: UserState | None, *, available: bool, request_id: str, deadline: float
    ) -> Entry:
        """The encoded query. DataError where it does not fit the bundle, whatever it was encoded with."""
        call = _Call(query, state, available, request_id, deadline)
        try:
            entry = await self._batcher.submit(call, deadline=deadline, key=available)
        except DeadlineExceeded:
            if call.entry is None:
                raise
            entry = call.entry  # its time is over in the middle of the stages here: some may have let it through
        except asyncio.CancelledError:
            if call.entry is not None:  # it came in the moment when it was given up
                call.entry.leave()
            raise
        if isinstance(entry, Exception):
            raise entry
        return entry

    async def _run(self, calls: list[_Call], deadline: float) -> Sequence[Entry | Exception]:
        del deadline
        return await self._lanes.run(self._encode, calls, small=len(calls) == 1 and not self._near)

    def _encode(self, calls: list[_Call]) -> Sequence[Entry | Exception]:
        try:
            states = [call.state for call in calls] if calls[0].available else None
            encoded = encode_queries([call.query for call in calls], states, self._bundle,
                                     request_ids=[call.request_id for call in calls])
        except Exception as error:  # the caller's or ours: the others must not pay for it
            if len(calls) == 1:
                return [error]
            return [entry for call in calls for entry in self._encode([call])]
        entries = self._entries(encoded)
        for call, entry in zip(calls, entries, strict=True):
            call.entry = entry
        if self._near:
            run_ahead([entry.request for entry in entries], self._near, deadline=min(call.deadline for call in calls))
        return entries

    def _entries(self, encoded: Encoded) -> list[Entry]:
        group = EncodedRequests(encoded.table, self._bundle)
        wave = Wave(len(encoded.table))
        return [Entry(wave, row, OneRequest(group, row), encoded.table.slice(row, 1), encoded.raw[row],
                      encoded.sources[row], encoded.known[row]) for row in range(len(encoded.table))]


async def _until_over(
    entries: Sequence[Entry | Exception], unwanted: Sequence[Entry | Exception], deadline: float
) -> None:
    for entry in unwanted:
        if isinstance(entry, Entry):
            entry.leave()
    for wave in {id(entry.wave): entry.wave for entry in entries if isinstance(entry, Entry)}.values():
        await wave.over(deadline)
