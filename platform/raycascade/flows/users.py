"""users load: users of Parquet tables into Redis, raw, so that every later bundle can use them. One process, no Ray.

Columns are those of the canonical requests (datasets/__init__.py), and nothing but `user_id` is required: the user
features of the bundle, `history` with `history_time_ms` and `history_<event feature>`, `exclude`, and `time_ms`, the
moment that the row is about. What a table does not have, and what is null, stays as it is in Redis.
"""

import asyncio
import hashlib
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raycascade import storage
from raycascade.bundle import require_finished
from raycascade.errors import DataError
from raycascade.features import FeatureState
from raycascade.flows.score import request_files
from raycascade.progress import ProgressLine
from raycascade.schema import ClockFeature, Feature, HistoryFeature, near_miss
from raycascade.serving.users import IdKinds, StoreUnavailable, event_features, fits, kind_of
from raycascade.serving.users_redis import LoadedUser, RedisUserStore, as_json

BATCH_ROWS = 500  # users of one round trip
TIMEOUT_S = 30.0  # of one round trip
STREAM_BYTES = 1 << 20  # of a column that are read at once


@dataclass(frozen=True)
class Target:
    """What of a table is loaded: features of users and of events by name, and what ids are."""

    kinds: IdKinds
    users: dict[str, Feature]
    events: dict[str, Feature]
    history_len: int
    fingerprint: str

    @classmethod
    def of(cls, bundle: str, *, history_len: int) -> "Target":
        """Of a bundle, of which only the schema is read."""
        require_finished(bundle)
        state = FeatureState.load(storage.join(bundle, "features"), with_counters=False)
        filesystem, path = storage.resolve(storage.join(bundle, "users/users.parquet"))
        kinds = IdKinds(kind_of(pq.read_schema(path, filesystem=filesystem).field("user_key").type),
                        kind_of(state.item_ids.values.type))
        users: dict[str, Feature] = {
            f.name: f for f in state.schema.side("user") if not isinstance(f, ClockFeature | HistoryFeature)}
        return cls(kinds, users, event_features(state), history_len, state.schema.fingerprint())

    def columns(self, schema: pa.Schema, *, where: str) -> list[str]:
        """The columns of a table that are read; DataError for one that cannot be, and where nothing is to load."""
        if "user_id" not in schema.names:
            raise DataError(f"{where}: column 'user_id' is missing{near_miss('user_id', set(schema.names))}")
        lists = {"history", "exclude", "history_time_ms", *(f"history_{name}" for name in self.events)}
        wanted = [name for name in schema.names if name in {"user_id", "time_ms"} | lists | set(self.users)]
        if not set(wanted) - {"user_id", "time_ms"}:
            raise DataError(f"{where}: nothing of users in columns {', '.join(schema.names)}; expected history, "
                            f"exclude or user features of the bundle ({', '.join(self.users) or 'it has none'})")
        for name in wanted:
            kind = schema.field(name).type
            if pa.types.is_temporal(kind) or pa.types.is_temporal(getattr(kind, "value_type", kind)):
                raise DataError(f"{where}: column {name!r} must be int64 Unix milliseconds, got {kind}; cast it")
            if name in lists and not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise DataError(f"{where}: column {name!r} must hold lists, got {kind}")
        return wanted


@dataclass
class Tally:
    """What has become of the rows so far; `skipped` were loaded by an earlier attempt."""

    total: int
    rows: int = 0
    skipped: int = 0
    loaded: int = 0
    older: int = 0
    bad: int = 0
    started: float = field(default_factory=time.monotonic)


def load(
    source: str, *, to: str, bundle: str, namespace: str = "raycascade", history_len: int = 200,
    errors: str = "users-load.errors.txt",
) -> dict[str, Any]:
    """Writes the users of a Parquet file or folder to the Redis at `to` (a URL, or env:NAME), in bounded memory.

    Returns {"to", "rows", "loaded", "older", "bad", "errors", "skipped", "seconds", "rows_per_second"}. Rows replace
    what is held of their user, in their order, unless that is of a later `time_ms` (`older`); events that came in while
    serving stay. A bad row is a line of the file `errors`. A load that was interrupted goes on behind the last row
    group that was done (`skipped`). DataError for tables that cannot be read, and where every row is bad.
    """
    target = Target.of(bundle, history_len=history_len)
    source = storage.absolute(source)
    files = {file: _opened(storage.join(source, file) if file else source) for file in request_files(source)}
    columns = {file: target.columns(parquet.schema_arrow, where=file or source) for file, parquet in files.items()}
    store = RedisUserStore(to, target.kinds, namespace=namespace, history_len=history_len, exclude_len=0, dedup_s=1,
                           timeout_s=TIMEOUT_S)
    tally = Tally(sum(parquet.metadata.num_rows for parquet in files.values()))
    asyncio.run(_Load(source, files, columns, target, store, errors, tally).run())
    if tally.bad and not tally.loaded + tally.older + tally.skipped:
        raise DataError(f"{source}: all {tally.bad} rows are bad; see {errors}")
    seconds = time.monotonic() - tally.started
    if tally.bad:
        sys.stderr.write(f"users load: {tally.bad} of {tally.rows} rows are bad; {errors} has a line for each\n")
    return {"to": store.address, "rows": tally.rows, "loaded": tally.loaded, "older": tally.older, "bad": tally.bad,
            "errors": errors if tally.bad else "", "skipped": tally.skipped, "seconds": round(seconds, 2),
            "rows_per_second": round(tally.rows / max(seconds, 1e-9))}


@dataclass
class _Load:
    """One run."""

    source: str
    files: dict[str, pq.ParquetFile]
    columns: dict[str, list[str]]
    target: Target
    store: RedisUserStore
    errors: str
    tally: Tally

    async def run(self) -> None:
        """Loads what an earlier run has not; StoreUnavailable says how to go on."""
        line = ProgressLine("users load")
        try:
            name = self._name()
            done = int(await self.store.noted(name) or 0)
            if not done:
                Path(self.errors).unlink(missing_ok=True)
            async for number in self._groups(done, line):
                await self.store.note(name, str(number + 1))
            await self.store.note(name, None)
        except StoreUnavailable as error:
            raise StoreUnavailable(f"{error}; {self.tally.rows} rows are loaded, and the same command goes on with "
                                   "the row group it was at",
                                   error.reason) from None
        finally:
            line.close()
            await self.store.close()

    def _name(self) -> str:
        """Names this load: the same rows into the same form."""
        groups = {file: [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
                  for file, parquet in self.files.items()}
        content = [self.source, groups, self.columns, self.target.history_len, self.target.fingerprint]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    async def _groups(self, done: int, line: ProgressLine) -> AsyncIterator[int]:
        """Loads the row groups of all files behind those that are done; yields the number of each when it is loaded."""
        number = 0
        for file, parquet in self.files.items():
            position = 0
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if number < done:
                    self.tally.skipped += count
                else:
                    await self._load(file, group, position, line)
                    yield number
                position, number = position + count, number + 1

    async def _load(self, file: str, group: int, position: int, line: ProgressLine) -> None:
        """One row group: a batch is made ready in a thread while the one before is on its way."""
        batches = iter(self.files[file].iter_batches(BATCH_ROWS, row_groups=[group], columns=self.columns[file]))
        sending: asyncio.Task[None] | None = None
        while True:
            ready = await asyncio.to_thread(_next_users, batches, self.target)
            if sending is not None:
                await sending
                shown = self.tally.rows + self.tally.skipped
                line.show(shown / self.tally.total, self.tally.rows, time.monotonic() - self.tally.started)
            if ready is None:
                return
            users, problems, count = ready
            self._complain(file, position, problems)
            position += count
            sending = asyncio.create_task(self._send(users, count))

    async def _send(self, users: list[LoadedUser], count: int) -> None:
        loaded = await self.store.load(users, timeout_s=TIMEOUT_S)
        self.tally.rows += count
        self.tally.loaded += loaded
        self.tally.older += len(users) - loaded

    def _complain(self, file: str, position: int, problems: list[tuple[int, str]]) -> None:
        if problems:
            self.tally.bad += len(problems)
            with open(self.errors, "a", encoding="utf-8") as stream:
                for row, problem in problems:
                    stream.write(f"{file or self.source}: row {position + row}: {problem}\n")


def _opened(uri: str) -> pq.ParquetFile:
    """A Parquet file whose columns are streamed; DataError if it is not one."""
    filesystem, path = storage.resolve(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path), buffer_size=STREAM_BYTES, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{uri}: cannot be read as Parquet ({reason}); give Parquet files") from None


# ---------------------------------------------------------------- rows
def _next_users(
    batches: Iterator[pa.RecordBatch], target: Target
) -> tuple[list[LoadedUser], list[tuple[int, str]], int] | None:
    """The users of the next batch, its bad rows and what is wrong with them, and its length; None behind the last."""
    batch = next(batches, None)
    if batch is None:
        return None
    return (*users_of(pa.Table.from_batches([batch]), target), len(batch))


def users_of(table: pa.Table, target: Target) -> tuple[list[LoadedUser], list[tuple[int, str]]]:
    """The users of the good rows in their order, and the others' positions with what is wrong with them."""
    columns = {name: table[name].to_pylist() for name in table.column_names}
    rows = _Rows(columns, target, table.schema)
    users, problems = [], []
    for row, user_id in enumerate(columns["user_id"]):
        try:
            users.append(rows.user(row))
        except DataError as error:
            problems.append((row, f"user {str(user_id)[:80]!r}: {' '.join(str(error).split())}"))
    return users, problems


class _Rows:
    """Rows of one batch as JSON. Equal values of its columns become JSON once."""

    def __init__(self, columns: dict[str, list[Any]], target: Target, schema: pa.Schema) -> None:
        self._columns, self._target = columns, target
        self._features = [name for name in sorted(target.users) if name in columns]
        self._events = [name for name in sorted(target.events) if f"history_{name}" in columns]
        self._nested = any(pa.types.is_nested(schema.field(f"history_{name}").type.value_type) for name in self._events)
        self._item_json: dict[Any, str] = {}
        self._event_json: dict[Any, str] = {}

    def user(self, row: int) -> LoadedUser:
        """One row; DataError says what is wrong with it."""
        user_id = self._columns["user_id"][row]
        if not isinstance(user_id, int | str):
            raise DataError("user_id is null" if user_id is None else "user_id is neither an integer nor text")
        at_ms = self._value("time_ms", row) or 0
        if not isinstance(at_ms, int) or not 0 <= at_ms < 1 << 53:
            raise DataError(f"time_ms: got {at_ms}, expected Unix milliseconds")
        values = {name: self._columns[name][row] for name in self._features}
        fields = {"features": _checked(values, self._target.users)} if values else {}
        if (exclude := self._value("exclude", row)) is not None:
            fields["exclude"] = f"[{','.join(self._items(exclude, 'exclude'))}]"
        if (history := self._value("history", row)) is not None:
            fields["past"] = self._past(row, history)
        return LoadedUser(user_id, at_ms, fields)

    def _value(self, name: str, row: int) -> Any:
        return self._columns[name][row] if name in self._columns else None

    def _items(self, values: list[Any], name: str) -> list[str]:
        """Ids of items as JSON."""
        if self._target.kinds.items == "int" and all(type(value) is int for value in values):
            return list(map(str, values))
        found = self._item_json
        for value in values:
            if value not in found:
                if not isinstance(value, int | str):
                    raise DataError(f"{name}: got {value!r} among item ids")
                found[value] = as_json(self._target.kinds.item(value))
        return [found[value] for value in values]

    def _past(self, row: int, history: list[Any]) -> str:
        """The newest events in order of time; those of unknown time are the oldest."""
        items, count = self._items(history, "history"), len(history)
        times = self._value("history_time_ms", row) or [0] * count
        own = [self._columns[f"history_{name}"][row] or [None] * count for name in self._events]
        for name, values in (("time_ms", times), *zip(self._events, own, strict=True)):
            if len(values) != count:
                raise DataError(f"history_{name} has {len(values)} values for {count} of history")
        if None in times:
            times = [time_ms or 0 for time_ms in times]
        if count and not (set(map(type, times)) == {int} and 0 <= min(times) <= max(times) < 1 << 53):
            raise DataError("history_time_ms: expected Unix milliseconds or null")
        ends = [self._event_end(values) for values in zip(*own, strict=True)] if own else ["]"] * count
        order = sorted(range(count), key=times.__getitem__)[-self._target.history_len:]
        return f"[{','.join([f'[{times[at]},{items[at]}{ends[at]}' for at in order])}]"

    def _event_end(self, values: tuple[Any, ...]) -> str:
        """What stands behind the item of an event."""
        key = as_json(values) if self._nested else values
        if (found := self._event_json.get(key)) is None:
            features = _checked(dict(zip(self._events, values, strict=True)), self._target.events)
            found = self._event_json[key] = "]" if features == "{}" else f",{features}]"
        return found


def _checked(values: dict[str, Any], known: dict[str, Feature]) -> str:
    """Values that are there, as JSON; DataError for one that its feature cannot have."""
    present = {name: value for name, value in values.items() if value is not None}
    for name, value in present.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(one) for one in numbers if isinstance(one, float)) or not fits(value, known[name]):
            raise DataError(f"{name}: got {str(value)[:80]} for a feature of kind {known[name].kind}")
    return as_json(present)
