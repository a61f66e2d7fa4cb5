"""prepare: raw log -> shards, with Ray Data.

Two distributed passes. The first reads every piece of the log once, fits its part of the feature state and spills the
rows by a hash of the user (`_spill.py`). The second takes one user partition at a time, groups impressions into
requests, encodes and writes the splits. A task holds about a hundred megabytes of rows, however large the log is.
"""

import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade import __version__, plugins, storage
from raycascade.config import Config
from raycascade.datasets import Dataset, ImpressionLog
from raycascade.datasets._impressions import to_requests
from raycascade.errors import DataError
from raycascade.features import FeatureState, require_columns
from raycascade.fitting import FitPart, fitted_columns, merged, required_columns
from raycascade.flows._cluster import each
from raycascade.flows._spill import SpillFile, partitions, read_partition, spilled_bytes
from raycascade.flows.semantic_ids import add_semantic_ids
from raycascade.keys import to_keys
from raycascade.schema import FeatureSchema
from raycascade.shards import by_day, publish, write_part
from raycascade.training.refusals import check_stages

NOW = "\x00now"  # request id of the synthetic request that carries a user's state at the end of the training log
ENCODE_ROWS = 4096
HELD_BYTES = 96 << 20  # encoded rows that a task sorts by day at a time
MAX_SPILLS = 1024  # tasks of the first pass; more pieces than that share tasks


@dataclass(frozen=True)
class Plan:
    """What every task needs to know; small and serialisable."""

    config: Config
    work: str  # spilled rows and fitted parts
    target: str  # the version being written

    def dataset(self) -> Dataset:
        """The dataset plug-in, made anew in each task."""
        return open_dataset(self.config)

    def rows_uri(self, number: int) -> str:
        """Where a task of the first pass spills its rows."""
        return storage.join(self.work, f"rows-{number:05d}.arrow")

    def fit_uri(self, number: int) -> str:
        """Where a task of the first pass leaves what it fitted."""
        return storage.join(self.work, f"fit-{number:05d}")


def open_dataset(config: Config) -> Dataset:
    """The config's dataset over `paths.raw`."""
    plugin, options = plugins.options("datasets", config.dataset, "dataset")
    return plugin(options, raw=config.paths.raw)


def prepare(config: Config) -> dict[str, Any]:
    """Builds and publishes shards; returns {"shards", "requests", "items", "seconds"}. A failed run leaves nothing.

    ConfigError, before anything is read, where the stages do not go with the declared features and labels.
    """
    started = time.monotonic()
    version = f"v-{uuid.uuid4().hex[:12]}"
    root = config.paths.shards
    dataset = open_dataset(config)
    check_stages(config, dataset.schema())
    tasks = spill_tasks(dataset.slices())
    plan = Plan(config, storage.join(root, f"_work-{version}"), storage.join(root, version))
    try:
        items = check_items(dataset.items())
        spilled = each(Spill(plan), tasks, notes=storage.join(plan.work, "spills"))
        state = fit(plan, dataset.schema(), items, len(tasks))
        trained_ms = (max(config.splits.ranges_ms()["train"][0], min(part["first_ms"] for part in spilled)),
                      state.as_of_ms)
        state, encoded, semantic_ids = add_semantic_ids(
            config, state, state.encode_items(items, where="items table"), period_ms=trained_ms, work=plan.work,
            target=plan.target)
        state.save(storage.join(plan.target, "features"))
        write_part(storage.join(plan.target, "items", "part-00000.parquet"), iter([encoded]))
        written = each(Encode(plan), partitions(spilled), notes=storage.join(plan.work, "encodes"))
        rows = {split: sum(part[split] for part in written) for split in config.splits.ranges_ms()}
        for split, count in rows.items():
            if count == 0:
                raise DataError(f"split {split!r} is empty: no request lies in its time range; the log covers "
                                f"{_covered(spilled)}; move the dates of `splits`")
        publish(root, version, {
            "requests": rows, "items": len(items), "users": sum(part["users"] for part in written),
            "fingerprint": state.schema.fingerprint(), "as_of_ms": state.as_of_ms, "trained_ms": list(trained_ms),
            "semantic_ids": semantic_ids,
            "notes": _noted([notes_of(dataset), *(part["notes"] for part in spilled)]),
            "log": {"rows": sum(part["rows"] for part in spilled), "bytes": spilled_bytes(spilled)},
            "config": config.model_dump(mode="json"), "raycascade": __version__,
        })
    except BaseException:
        storage.remove_folder(plan.target)
        raise
    finally:
        storage.remove_folder(plan.work)
    return {"shards": root, "requests": rows, "items": len(items), "seconds": round(time.monotonic() - started, 2)}


def notes_of(dataset: Dataset) -> dict[str, int]:
    """What a dataset counts of its log's oddities, by message; empty for those that count nothing."""
    return dict(getattr(dataset, "notes", {}))


def _noted(parts: list[dict[str, int]]) -> dict[str, int]:
    """The sum of all notes, printed on standard error."""
    notes: Counter[str] = Counter()
    for part in parts:
        notes.update(part)
    for message, count in sorted(notes.items()):
        sys.stderr.write(f"note: {count} {message}\n")
    return dict(sorted(notes.items()))


def _covered(spilled: list[dict[str, Any]]) -> str:
    first, last = min(part["first_ms"] for part in spilled), max(part["last_ms"] for part in spilled)
    return " to ".join(str(np.datetime64(moment, "ms"))[:16] + "Z" for moment in (first, last))


def check_items(items: pa.Table) -> pa.Table:
    """The items table with one row per id; DataError otherwise."""
    require_columns(items, ["item_id"], where="items table")
    if len(items) == 0:
        raise DataError("items table: no rows; give a catalogue")
    if items["item_id"].null_count:
        raise DataError(f"items table: item_id is null in {items['item_id'].null_count} rows; drop them")
    counts = pc.value_counts(items["item_id"])
    twice = counts.filter(pc.greater(counts.field(1), 1))
    if len(twice):
        raise DataError(f"items table: item {twice[0]['values']} stands in {twice[0]['counts']} rows; "
                        "keep one row per item")
    return items


def training_end_ms(config: Config, last_ms: int) -> int:
    """The end of the training log: where the next split begins, or just after the last row."""
    return min(config.splits.ranges_ms()["train"][1], last_ms + 1)


def spill_tasks(pieces: list[str], *, most: int = MAX_SPILLS) -> list[list[Any]]:
    """[number, pieces] of every task of the first pass, in order."""
    size = -(-len(pieces) // most)
    return [[number, pieces[start:start + size]] for number, start in enumerate(range(0, len(pieces), size))]


@dataclass(frozen=True)
class Spill:
    """First pass over one or a few pieces: fits their part, spills their rows by bucket of users into one file."""

    plan: Plan

    def __call__(self, task: list[Any]) -> dict[str, Any]:
        """Returns the buckets of the spilled batches, the number of rows and the time range."""
        number, pieces = task
        dataset = self.plan.dataset()
        part = FitPart(dataset.schema())
        rows, first_ms, last_ms = 0, 1 << 62, -(1 << 62)
        with SpillFile(self.plan.rows_uri(number)) as file:
            for piece, table in ((name, table) for name in pieces for table in dataset.read(name)):
                self._check(table, dataset, piece)
                if len(table) == 0:
                    continue
                time_ms = table["time_ms"].to_numpy()
                self._fit(part, table, time_ms, dataset.form, piece)
                file.add(table)
                rows += len(table)
                first_ms, last_ms = min(first_ms, int(time_ms.min())), max(last_ms, int(time_ms.max()))
        part.save(self.plan.fit_uri(number))
        return {"batches": file.batches, "rows": rows, "first_ms": first_ms, "last_ms": last_ms,
                "notes": notes_of(dataset)}

    def _check(self, table: pa.Table, dataset: Dataset, piece: str) -> None:
        require_columns(table, required_columns(dataset.schema(), dataset.form), where=piece)
        made_later = {"request_id"} if getattr(dataset, "gap_minutes", None) else set()
        for name in ("user_id", "time_ms", "request_id", "item_id"):
            if name not in made_later and name in table.column_names and table[name].null_count:
                raise DataError(f"{piece}: {name!r} is null in {table[name].null_count} rows; drop or fill them")
        if table["time_ms"].type != pa.int64():
            raise DataError(f"{piece}: time_ms must be int64 Unix milliseconds, got {table['time_ms'].type}")

    def _fit(self, part: FitPart, table: pa.Table, time_ms: np.ndarray, form: str, piece: str) -> None:
        start, end = self.plan.config.splits.ranges_ms()["train"]
        read = fitted_columns(part.schema)
        training = _chosen(table.select([name for name in table.column_names if name in read]),
                           (time_ms >= start) & (time_ms < end))
        (part.add_requests if form == "requests" else part.add_impressions)(training, where=piece)


def _chosen(table: pa.Table, mask: np.ndarray) -> pa.Table:
    """The rows where the mask is true, in their order."""
    rows = np.flatnonzero(mask)
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return table.slice(rows[0], len(rows))
    return table.take(pa.array(rows))


def fit(plan: Plan, schema: FeatureSchema, items: pa.Table, num_parts: int) -> FeatureState:
    """Merges the fitted parts and freezes the state."""
    whole = merged(schema, (FitPart.load(plan.fit_uri(number), schema) for number in range(num_parts)))
    whole.add_items(items, where="items table")
    if whole.events is None or len(whole.events) == 0:
        raise DataError("split 'train' is empty: no row of the log lies in its time range; move the dates of `splits`")
    end = plan.config.splits.ranges_ms()["train"][1]
    bucket_ms = schema.count_bucket_hours * 3_600_000
    offset_ms = int(schema.utc_offset_hours * 3_600_000)
    last = (pc.max(whole.events["bucket"]).as_py() + 1) * bucket_ms - offset_ms
    return whole.finish(items, as_of_ms=min(end, last))


@dataclass(frozen=True)
class Encode:
    """Second pass over one user partition: requests, encoded, written by split; and the users' final states."""

    plan: Plan

    def __call__(self, partition: dict[str, Any]) -> dict[str, int]:
        """Returns the rows of each split, and of users."""
        features = storage.join(self.plan.target, "features")
        dataset, state = self.plan.dataset(), FeatureState.load(features, with_counters=False)
        ranges = self.plan.config.splits.ranges_ms()
        logged_from, logged_until = next(iter(ranges.values()))[0], list(ranges.values())[-1][1]
        parts = Parts(self.plan.target, partition["number"], (*ranges, "users"), state.schema.utc_offset_hours)
        for requests in self._requests(partition, dataset, state):
            is_state = pc.equal(requests["request_id"].cast(pa.string()), NOW).to_numpy()
            time_ms = requests["time_ms"].to_numpy()
            logged = _chosen(requests, ~is_state & (time_ms >= logged_from) & (time_ms < logged_until))
            if len(logged):
                encoded = state.encode_requests(logged, where=f"partition {partition['number']}")
                time_ms = encoded["time_ms"].to_numpy()
                for split, (start, end) in ranges.items():
                    parts.add(split, _chosen(encoded, (time_ms >= start) & (time_ms < end)))
            if is_state.any():
                users = _chosen(requests, is_state).drop_columns(["candidates", *state.schema.labels])
                parts.add("users", state.encode_requests(users, where="users", strict=False))
        return parts.close()

    def _requests(self, partition: dict[str, Any], dataset: Dataset, state: FeatureState) -> Iterator[pa.Table]:
        rows = read_partition(self.plan.rows_uri, partition)
        if rows is None:
            return
        train = self.plan.config.splits.ranges_ms()["train"]
        last = _as_states(_last_per_user(rows, train), state.as_of_ms)
        if dataset.form == "requests":
            order = _order(rows, "time_ms", "user_id")  # what the files need, so that no list is moved again
            for start in range(0, len(rows), ENCODE_ROWS):
                yield rows.take(order[start:start + ENCODE_ROWS])
            if len(last):
                yield last
            return
        rows = pa.concat_tables([_with_text_ids(rows), last])
        history, log = state.schema.history, cast(ImpressionLog, dataset)
        yield from to_requests(rows, state.schema, history_len=history.max_len if history else 0,
                               exclude_seen=log.exclude_seen, duplicates=log.duplicates, gap_minutes=log.gap_minutes)


class Parts:
    """The files of one partition. Rows are sorted by day HELD_BYTES at a time; what goes beyond that gets files of its
    own, so that a partition which grows when it is encoded (long histories) stays within memory."""

    def __init__(self, target: str, number: int, names: tuple[str, ...], utc_offset_hours: float) -> None:
        self._target, self._number, self._offset = target, number, utc_offset_hours
        self._rows = dict.fromkeys(names, 0)
        self._held: dict[str, list[pa.Table]] = defaultdict(list)
        self._bytes = self._written = 0

    def add(self, name: str, table: pa.Table) -> None:
        """Encoded rows of a split, or of users."""
        if len(table):
            self._held[name].append(table)
            self._bytes += table.nbytes
        if self._bytes >= HELD_BYTES:
            self._write()

    def close(self) -> dict[str, int]:
        """Writes what is left; the rows by name."""
        self._write()
        return self._rows

    def _write(self) -> None:
        more = f"-{self._written}" if self._written else ""
        while self._held:
            name, tables = self._held.popitem()
            folder = "users" if name == "users" else f"requests/{name}"
            uri = storage.join(self._target, folder, f"part-{self._number:05d}{more}.parquet")
            self._rows[name] += write_part(uri, by_day(pa.concat_tables(tables), utc_offset_hours=self._offset))
        self._bytes, self._written = 0, self._written + 1


def _order(rows: pa.Table, *names: str) -> pa.Array:
    """The positions of the rows in the order of some columns."""
    return pc.sort_indices(rows.select(list(names)), sort_keys=[(name, "ascending") for name in names])


def _last_per_user(rows: pa.Table, train: tuple[int, int]) -> pa.Table:
    time_ms = rows["time_ms"].to_numpy()
    training = np.flatnonzero((time_ms >= train[0]) & (time_ms < train[1]))
    brief = rows.select(["user_id", "time_ms"]).take(pa.array(training))
    order = _order(brief, "user_id", "time_ms").to_numpy()
    keys = to_keys(brief["user_id"])[order]
    return rows.take(pa.array(training[order][np.append(keys[1:] != keys[:-1], True)[:len(keys)]]))


def _with_text_ids(rows: pa.Table) -> pa.Table:
    return rows.set_column(rows.column_names.index("request_id"), "request_id", rows["request_id"].cast(pa.string()))


def _as_states(last: pa.Table, as_of_ms: int) -> pa.Table:
    """Each user's last training row as a request of its own at the end of the training log.

    Impressions lose their item: such a row makes a request without candidates and never enters a history.
    """
    if "item_id" in last.column_names:
        nothing = pa.nulls(len(last), last.schema.field("item_id").type)
        last = last.set_column(last.column_names.index("item_id"), "item_id", nothing)
    now = pa.array([NOW] * len(last), pa.string())
    last = last.set_column(last.column_names.index("request_id"), "request_id", now)
    return last.set_column(last.column_names.index("time_ms"), "time_ms", pa.array(np.full(len(last), as_of_ms)))
