"""The traffic log: a sample of the served requests with every stage's survivors, and all events, as Parquet.

The data set `traffic` reads it, so that what was served trains the next cascade. A thread of its own makes rows and
files; a request only puts a record into a bounded queue, and a full queue drops it and counts it.
"""

import hashlib
import json
import logging
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from raycascade import storage
from raycascade.datasets import _traffic_files as files
from raycascade.datasets._traffic_files import EVENTS, Kind
from raycascade.errors import ConfigError
from raycascade.serving.telemetry import NoTelemetry, Telemetry
from raycascade.serving.traffic_rows import TrafficRecord, event_row, request_rows
from raycascade.serving.users import NewEvent

logger = logging.getLogger(__name__)

MOST_QUEUED = 4_096  # records and lists of events that wait for the thread
RECORDS_AT_ONCE = 64  # of which rows are made together, so that the thread never holds the interpreter for long
MOST_BYTES = 64 << 20  # of an open part; it is closed then, whatever its rows
MOST_PARTS = 8  # closed parts that could not be written yet; beyond them the oldest is lost
POLL_S = 0.5
WRITE_AGAIN_S = 5.0


@dataclass(frozen=True)
class _Events:
    """Events that came together; their features are as JSON already."""

    rows: list[dict[str, object]]


class _Open:
    """The rows of one kind that are not in a file yet: those of the open part, and of closed ones that wait."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.tables: list[pa.Table] = []
        self.closed: list[pa.Table] = []
        self.num_rows = self.num_bytes = 0
        self.since_s = 0.0
        self._schema: pa.Schema | None = None

    def add(self, table: pa.Table, *, now_s: float) -> None:
        if len(table) == 0:
            return
        try:
            known = [self._schema] if self._schema is not None else []
            self._schema = pa.unify_schemas([*known, table.schema], promote_options="default")
        except pa.ArrowException:  # of another bundle, or a value of another type; columns without a value go with any
            self.close()
            self._schema = table.schema
        self.since_s = self.since_s if self.tables else now_s
        self.tables.append(table)
        self.num_rows += len(table)
        self.num_bytes += table.nbytes

    def close(self) -> None:
        if self.tables:
            self.closed.append(pa.concat_tables(self.tables, promote_options="default").combine_chunks())
        self.tables, self.num_rows, self.num_bytes, self._schema = [], 0, 0, None


class TrafficLog:
    """Writes below `uri` (a path, s3://, gs://): a share `sample` of the requests, and every event. A file is closed
    after `rotate_s` seconds or `rotate_rows` rows; a process that dies loses what is not in a file. ConfigError for a
    place that cannot be one. Safe from any thread."""

    def __init__(
        self, uri: str, *, sample: float = 1.0, rotate_s: float = 60.0, rotate_rows: int = 10_000,
        telemetry: Telemetry | None = None, most_queued: int = MOST_QUEUED, clock: Callable[[], float] = time.time,
    ) -> None:
        self._uri = storage.absolute(uri)
        self._sample, self._rotate_s, self._rotate_rows = sample, rotate_s, rotate_rows
        self._telemetry, self._clock = telemetry or NoTelemetry(), clock
        _require_place(self._uri)
        self._queue: queue.Queue[TrafficRecord | _Events | None] = queue.Queue(most_queued)
        self._open: dict[Kind, _Open] = {"requests": _Open("requests"), "events": _Open("events")}
        self._writer, self._number = uuid.uuid4().hex[:12], 0
        self._counts: Counter[tuple[Kind, str]] = Counter()
        self._counting, self._not_before = threading.Lock(), 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="raycascade-traffic", daemon=True)
        self._thread.start()

    # ---- what the gateway calls
    def wants(self, request_id: str) -> bool:
        """Whether a request belongs to the sample: by its id alone, so that every process says the same."""
        return in_sample(request_id, self._sample)

    def offer(self, record: TrafficRecord) -> bool:
        """Takes a record of a request that is wanted; False where the queue is full and it is dropped."""
        return self._put(record, "requests", 1)

    def offer_events(self, events: Sequence[NewEvent]) -> bool:
        """Takes events; False where the queue is full and they are dropped."""
        now_ms = int(self._clock() * 1000)
        rows = [event_row(event, now_ms=now_ms, features=json.dumps(event.features, sort_keys=True))
                for event in events]
        return self._put(_Events(rows), "events", len(rows))

    def count(self, kind: Kind, outcome: str) -> int:
        """Rows so far that were "written", "dropped" (a full queue, or an id of another type than the log's) or "lost"
        (they could not be written)."""
        with self._counting:
            return self._counts[kind, outcome]

    def held(self, kind: Kind) -> int:
        """Rows of the open part, which a process that dies would lose."""
        return self._open[kind].num_rows

    def close(self, timeout_s: float = 30.0) -> bool:
        """Writes everything that was taken and ends the thread; whether it did so in time. Nothing more is taken."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- the thread
    def _put(self, work: "TrafficRecord | _Events", kind: Kind, rows: int) -> bool:
        try:
            if self._closed:
                raise queue.Full
            self._queue.put_nowait(work)
        except queue.Full:
            self._note(kind, "dropped", rows)
            return False
        return True

    def _run(self) -> None:
        ended = False
        while not ended:
            work, ended = self._taken()
            try:
                self._add(work)
            except Exception:  # a record that cannot be a row must not end the log
                logger.exception("%d records and lists of events could not be logged", len(work))
                self._note("requests", "lost", sum(isinstance(one, TrafficRecord) for one in work))
                self._note("events", "lost", sum(len(one.rows) for one in work if isinstance(one, _Events)))
            self._rotate(everything=ended)
        for part in self._open.values():
            self._note(part.kind, "lost", sum(map(len, part.closed)))

    def _taken(self) -> "tuple[list[TrafficRecord | _Events], bool]":
        """What waits, at most RECORDS_AT_ONCE, and whether it is the last."""
        taken: list[TrafficRecord | _Events] = []
        try:
            while len(taken) < RECORDS_AT_ONCE:
                work = self._queue.get(timeout=POLL_S) if not taken else self._queue.get_nowait()
                if work is None:
                    return taken, True
                taken.append(work)
        except queue.Empty:
            pass
        return taken, False

    def _add(self, work: "list[TrafficRecord | _Events]") -> None:
        now_s = self._clock()
        by_bundle: dict[int, list[TrafficRecord]] = {}
        for one in work:
            if isinstance(one, TrafficRecord):
                by_bundle.setdefault(id(one.bundle), []).append(one)
        for records in by_bundle.values():
            rows = request_rows(records)
            self._note("requests", "dropped", len(records) - len(rows))
            self._open["requests"].add(rows, now_s=now_s)
        events = [row for one in work if isinstance(one, _Events) for row in one.rows]
        if events:
            self._open["events"].add(pa.Table.from_pylist(events, EVENTS), now_s=now_s)

    def _rotate(self, *, everything: bool) -> None:
        now_s = self._clock()
        for part in self._open.values():
            full = part.num_rows >= self._rotate_rows or part.num_bytes >= MOST_BYTES
            if everything or full or (part.tables and now_s - part.since_s >= self._rotate_s):
                part.close()
            if part.closed and (everything or now_s >= self._not_before):
                self._write(part, now_s)

    def _write(self, part: _Open, now_s: float) -> None:
        """Writes closed parts, the oldest first; what cannot be written waits, as long as there is room for it."""
        while part.closed:
            rows = part.closed[0]
            try:
                files.write(self._uri, part.kind, rows, writer=self._writer, number=self._number)
            except (pa.ArrowException, OSError) as error:
                self._not_before = now_s + WRITE_AGAIN_S
                logger.warning("traffic log: %s cannot be written now (%s); %d parts wait", part.kind,
                               " ".join(str(error).split()), len(part.closed))
                break
            self._number += 1
            part.closed.pop(0)
            self._note(part.kind, "written", len(rows))
        while len(part.closed) > MOST_PARTS:
            self._note(part.kind, "lost", len(part.closed.pop(0)))

    def _note(self, kind: Kind, outcome: str, rows: int) -> None:
        if rows:
            with self._counting:
                self._counts[kind, outcome] += rows
            self._telemetry.traffic(kind, outcome, rows)


def _require_place(uri: str) -> None:
    """ConfigError for a folder that cannot be made and for a scheme that nobody knows. An object store that does not
    answer now may do so later, and must not keep a gateway from starting."""
    try:
        if "://" not in uri:
            storage.make_folder(uri)
        else:
            storage.resolve(uri)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        if "://" in uri and not isinstance(error, pa.ArrowInvalid):
            logger.warning("traffic log: %s does not answer now (%s); rows wait", uri, reason)
            return
        raise ConfigError(f"traffic.uri: {uri} cannot be written to ({reason}); give a folder on a disk, s3:// or "
                          "gs://") from None


def in_sample(request_id: str, share: float) -> bool:
    """Whether an id belongs to a sample: by a hash, so that a larger share holds every smaller one."""
    if share >= 1.0:
        return True
    drawn = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest())
    return drawn < share * 2.0**64

