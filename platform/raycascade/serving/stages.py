"""One stage of a served cascade, and what travels between stages: the encoded requests and compact arrays of item rows.

The same class computes in a replica of its own (composed, behind a `RemoteStage`) and beside the others in the
gateway's replica (fused, a `LocalStage`). Either joins the requests of the same moment into one batch.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from raycascade.batch import Batch
from raycascade.bundle import Bundle, load_bundle
from raycascade.cascade import StageOutcome, search_margin
from raycascade.errors import DeadlineExceeded, NotReady, Overloaded
from raycascade.ragged import Ragged
from raycascade.schema import PADDING
from raycascade.serving.batching import Batcher
from raycascade.serving.breaker import Breaker
from raycascade.serving.lanes import Lanes
from raycascade.serving.logs import request_metadata
from raycascade.serving.options import StageOptions

VERSION = b"bundle"  # in the metadata of what travels
PATIENCE_S = 0.2  # a call that got less time than that and was not answered is no sign of a stage that is gone
CLOCK_S = 0.02  # timers may be so much early


class Survivors(NamedTuple):
    """What a stage lets through, best first: item rows (int32, 0 = none) and the stage's scores (float32)."""

    rows_QK: np.ndarray
    scores_QK: np.ndarray

    def of(self, start: int, stop: int) -> "Survivors":
        """Those of some of the requests."""
        return Survivors(self.rows_QK[start:stop], self.scores_QK[start:stop])


class EncodedRequests:
    """Requests that one bundle has encoded together. Tensors and bytes are made once, when they are first needed."""

    def __init__(self, table: pa.Table, bundle: Bundle) -> None:
        self.table = table
        self.version = bundle.version
        self._bundle = bundle

    @cached_property
    def batch(self) -> Batch:
        """As tensors."""
        return self._bundle.batch(self.table)

    @cached_property
    def packed(self) -> bytes:
        """As bytes."""
        return pack(self.table, version=self.version, request_ids=self.table["request_id"].to_pylist())

    def joined(self, others: "Sequence[OneRequest]") -> "EncodedRequests":
        """Requests of the same version and columns as one table."""
        parts = [one.group.table.slice(one.row, 1) for one in others]
        return EncodedRequests(pa.concat_tables(parts).combine_chunks(), self._bundle)


class Ahead(NamedTuple):
    """What a stage let through of one request right behind its encoding, and the seconds that its whole batch took."""

    survivors: Survivors
    seconds: float


class OneRequest:
    """One of some encoded requests, and its place among them. It moves to another group where stages join it. `ahead`:
    what stages have let through before they were asked (`run_ahead`), by their names."""

    __slots__ = ("_columns", "_margin", "ahead", "group", "row")

    def __init__(self, group: EncodedRequests, row: int) -> None:
        self.group, self.row = group, row
        self.ahead: dict[str, Ahead] = {}
        schema, excluded = group.table.schema, 0
        if "exclude" in schema.names:
            excluded = len(group.table["exclude"][row].values or ())
        self._columns: Hashable = (group.version, tuple(schema.names), tuple(schema.types))
        self._margin = search_margin(excluded)

    @property
    def ahead_s(self) -> float:
        """What was computed ahead took so many seconds."""
        return sum(one.seconds for one in self.ahead.values())

    def key(self, *, searching: bool) -> Hashable:
        """What requests of one batch have in common: their columns, to be one table, and the width of their search."""
        return self._columns, self._margin if searching else 0


def together(requests: Sequence[OneRequest]) -> EncodedRequests:
    """One group of exactly these requests in this order: the one they are in already, or a new one."""
    group = requests[0].group
    rows = [one.row for one in requests]
    same = all(one.group is group for one in requests)
    if same and len(rows) == len(group.table) and rows == list(range(len(rows))):
        return group
    new = group.joined(requests)
    for row, one in enumerate(requests):
        one.group, one.row = new, row
    return new


class Stage(Protocol):
    """A stage as the gateway sees it, near or far."""

    async def run(self, request: OneRequest, before: Survivors | None, *, deadline: float) -> Survivors:
        """The survivors among `before` (None: the stage searches the whole catalogue), of a single request.

        `deadline` is a moment of `time.monotonic()`. DeadlineExceeded, Overloaded, or NotReady where no replica
        answers; anything else is a failure inside."""
        ...

    async def ready(self) -> bool:
        """Whether the stage can answer."""
        ...


class StageServer:
    """One stage of a bundle. Its methods block and are safe to call from several threads."""

    def __init__(self, bundle: Bundle | str, name: str) -> None:
        self.bundle = load_bundle(bundle, served=(name,)) if isinstance(bundle, str) else bundle
        self.name = name
        self._keep = self.bundle.cascade.keeps[self.bundle.cascade.names.index(name)]

    def run(self, batch: Batch, before: Survivors | None) -> Survivors:
        """The survivors of a batch of requests."""
        cascade = self.bundle.cascade
        if before is None:
            outcome = cascade.retrieve(batch, self.bundle.index)
        else:
            rows_QK = before.rows_QK.astype(np.int64)
            # what came from another process is read-only
            scores_QK = before.scores_QK if before.scores_QK.flags.writeable else before.scores_QK.copy()
            seen = StageOutcome("before", rows_QK.shape[1], rows_QK, scores_QK, rows_QK != PADDING)
            outcome = cascade.narrow(self.name, self._keep, batch, seen, self.bundle.items)
        rows_QK, mask_QK = outcome.kept()
        return Survivors(np.where(mask_QK, rows_QK, PADDING).astype(np.int32), outcome.scores_QC[:, :self._keep])


class LocalStage:
    """A stage in this process: batches of `most` at most run in a thread (of `lanes`, which stages share), so that the
    event loop stays free."""

    def __init__(self, server: StageServer, options: StageOptions | None = None, lanes: Lanes | None = None) -> None:
        options = options or StageOptions()
        self.server, self._lanes = server, lanes or Lanes()
        self.most = options.batch.max_size
        self._batcher = Batcher(self._run_batch, options=options.batch, in_flight=1, max_queued=options.max_queued,
                                name=server.name)

    async def run(self, request: OneRequest, before: Survivors | None, *, deadline: float) -> Survivors:
        """The stage's survivors."""
        return await self._batcher.submit((request, before), deadline=deadline,
                                          key=request.key(searching=before is None))

    async def ready(self) -> bool:
        """Always: the bundle is loaded."""
        return True

    async def _run_batch(self, calls: list[tuple[OneRequest, Survivors | None]], deadline: float) -> list[Survivors]:
        del deadline  # a computation that has begun is not interrupted
        return await self._lanes.run(self._compute, calls)

    def _compute(self, calls: list[tuple[OneRequest, Survivors | None]]) -> list[Survivors]:
        group = together([request for request, _ in calls])
        return split(self.server.run(group.batch, stacked([before for _, before in calls])), [1] * len(calls))


def run_ahead(requests: Sequence[OneRequest], stages: Sequence[LocalStage], *, deadline: float) -> None:
    """Takes requests of one group through stages of this process without a way back to the event loop between them:
    half of what such a request costs beside its models. As far as nothing stands in the way: what no stage would take
    as one batch, is late, or fails is left to the stages themselves, which say so. Blocks."""
    batches: dict[Hashable, list[OneRequest]] = {}
    for request in requests:
        batches.setdefault(request.key(searching=True), []).append(request)
    most = min(stage.most for stage in stages)
    for batch in batches.values():
        if len(batch) <= most:
            _run_batch_ahead(batch, stages, deadline=deadline)


def _run_batch_ahead(requests: Sequence[OneRequest], stages: Sequence[LocalStage], *, deadline: float) -> None:
    group, before = together(requests), None
    for stage in stages:
        if (started := time.monotonic()) >= deadline:
            return
        try:
            before = stage.server.run(group.batch, before)
        except Exception:  # the stage fails in the same way when it is asked
            return
        seconds = time.monotonic() - started
        for request, survivors in zip(requests, split(before, [1] * len(requests)), strict=True):
            request.ahead[stage.server.name] = Ahead(survivors, seconds)


class RemoteStage:
    """A stage in replicas of its own. `call` sends requests, survivors and the seconds left to one of them and answers
    its survivors; it raises DeadlineExceeded, Overloaded, NotReady, or `Lost` where the replica that had taken the call
    is gone: the call is then made once more, which another replica answers. While the stage does not answer at all,
    requests are told so at once (`Breaker`)."""

    def __init__(
        self, name: str, call: Callable[[bytes, Survivors | None, float], Awaitable[Survivors]],
        alive: Callable[[], Awaitable[bool]], options: StageOptions | None = None, *, breaker: Breaker | None = None,
    ) -> None:
        options = options or StageOptions()
        self._name, self._call, self._alive = name, call, alive
        self._breaker = breaker or Breaker()
        self._batcher = Batcher(self._run_batch, options=options.batch, in_flight=2 * options.most_replicas,
                                max_queued=options.max_queued, name=name)

    async def run(self, request: OneRequest, before: Survivors | None, *, deadline: float) -> Survivors:
        """The stage's survivors."""
        if not self._breaker.allows():
            raise NotReady(f"{self._name}: the stage has not answered lately; try again in a few seconds")
        return await self._batcher.submit((request, before), deadline=deadline,
                                          key=request.key(searching=before is None))

    async def ready(self) -> bool:
        """Whether a replica answers."""
        return await self._alive()

    async def _run_batch(self, calls: list[tuple[OneRequest, Survivors | None]], deadline: float) -> list[Survivors]:
        message = together([request for request, _ in calls]).packed
        before = stacked([before for _, before in calls])
        left_s = deadline - time.monotonic()
        try:
            survivors = await self._twice(message, before, deadline)
        except Overloaded:
            raise  # many calls are no sign of a stage that is gone
        except NotReady:
            self._breaker.failed()
            raise
        except (DeadlineExceeded, asyncio.CancelledError):
            # Cancelled: nobody waits any more. A caller who gives a stage no time says nothing of the stage.
            if left_s >= PATIENCE_S and time.monotonic() >= deadline - CLOCK_S:
                self._breaker.failed()
            raise
        self._breaker.succeeded()
        return split(survivors, [1] * len(calls))

    async def _twice(self, message: bytes, before: Survivors | None, deadline: float) -> Survivors:
        for _ in range(2):
            if (left_s := deadline - time.monotonic()) <= 0:
                raise DeadlineExceeded(f"{self._name}: the request's time was over before the call")
            with suppress(Lost):
                return await self._call(message, before, left_s)
        raise NotReady(f"{self._name}: two replicas in turn were lost; try again in a few seconds")


class Lost(Exception):
    """The replica that had taken a call is gone, or does not hold the bundle of the request."""


def stacked(parts: Sequence[Survivors | None]) -> Survivors | None:
    """The survivors of several calls of one stage as one; None where the stage has none before it."""
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts)), "a stage is the first one for all requests or for none"
    if len(present) <= 1:
        return present[0] if present else None
    return Survivors(np.concatenate([part.rows_QK for part in present]),
                     np.concatenate([part.scores_QK for part in present]))


def split(survivors: Survivors, sizes: Sequence[int]) -> list[Survivors]:
    """The inverse of `stacked`, by the number of requests of each call."""
    if len(sizes) == 1:
        return [survivors]
    ends = np.cumsum(sizes).tolist()
    return [survivors.of(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def pack(requests: pa.Table, *, version: str = "", request_ids: Sequence[str] = ()) -> bytes:
    """Encoded requests as an Arrow stream, with the version of the bundle that has encoded them, and the ids that logs
    call them by."""
    notes = ({VERSION: version.encode()} if version else {}) | (request_metadata(*request_ids) if request_ids else {})
    requests = requests.replace_schema_metadata(notes or None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, requests.schema) as writer:
        writer.write_table(requests)
    return sink.getvalue().to_pybytes()


def unpack(message: bytes) -> pa.Table:
    """The inverse of `pack`."""
    return pa.ipc.open_stream(message).read_all()


def most_excluded(requests: pa.Table) -> int:
    """The length of the longest list of items that one of some encoded requests excludes."""
    if "exclude" not in requests.column_names:
        return 0
    return int(Ragged.from_arrow(requests["exclude"]).lengths_Q.max(initial=0))


def version_of(requests: pa.Table) -> str:
    """The version of the bundle that has encoded what was unpacked, "" if it does not say."""
    return (requests.schema.metadata or {}).get(VERSION, b"").decode()
