"""prepare: raw log -> shards, with Ray Data.

Two distributed passes. The first reads every piece of the log once, fits its part of the feature state and spills the
rows by a hash of the user. The second takes one user partition at a time, groups impressions into requests, encodes
and writes the splits. Both hold one piece or partition in memory, however large the log is.
"""

import time
import uuid
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
from raycascade.features import FeatureState, fold, require_columns, to_keys
from raycascade.fitting import FitPart, required_columns
from raycascade.flows._cluster import each
from raycascade.schema import FeatureSchema
from raycascade.shards import by_day, publish, write_part

NOW = "\x00now"  # request id of the synthetic request that carries a user's state at the end of the training log
ENCODE_ROWS = 4096


@dataclass(frozen=True)
class Plan:
    """What every task needs to know; small and serialisable."""

    config: Config
    work: str  # spilled rows and fitted parts
    target: str  # the version being written
    num_partitions: int

    def dataset(self) -> Dataset:
        """The dataset plug-in, made anew in each task."""
        return open_dataset(self.config)


def open_dataset(config: Config) -> Dataset:
    """The config's dataset over `paths.raw`."""
    plugin, options = plugins.options("datasets", config.dataset, "dataset")
    return plugin(options, raw=config.paths.raw)


def prepare(config: Config) -> dict[str, Any]:
    """Builds and publishes shards; returns {"shards", "requests", "items", "seconds"}. A failed run leaves nothing."""
    started = time.monotonic()
    version = f"v-{uuid.uuid4().hex[:12]}"
    root = config.paths.shards
    dataset = open_dataset(config)
    pieces = dataset.slices()
    plan = Plan(config, storage.join(root, f"_work-{version}"), storage.join(root, version),
                num_partitions=max(2, 2 * len(pieces)))
    try:
        items = check_items(dataset.items())
        spilled = each(Spill(plan), [list(piece) for piece in enumerate(pieces)])
        state = fit(plan, dataset.schema(), items, len(pieces))
        state.save(storage.join(plan.target, "features"))
        encoded = state.encode_items(items, where="items table")
        write_part(storage.join(plan.target, "items", "part-00000.parquet"), iter([encoded]))
        written = each(Encode(plan, spilled), list(range(plan.num_partitions)))
        rows = {split: sum(part[split] for part in written) for split in config.splits.ranges_ms()}
        for split, count in rows.items():
            if count == 0:
                raise DataError(f"split {split!r} is empty: no request lies in its time range; the log covers "
                                f"{_covered(spilled)}; move the dates of `splits`")
        publish(root, version, {
            "requests": rows, "items": len(items), "users": sum(part["users"] for part in written),
            "fingerprint": dataset.schema().fingerprint(), "as_of_ms": state.as_of_ms,
            "config": config.model_dump(mode="json"), "raycascade": __version__,
        })
    except BaseException:
        storage.remove_folder(plan.target)
        raise
    finally:
        storage.remove_folder(plan.work)
    return {"shards": root, "requests": rows, "items": len(items), "seconds": round(time.monotonic() - started, 2)}


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


@dataclass(frozen=True)
class Spill:
    """First pass over one piece: fits its part, spills its rows by user partition into one Arrow file."""

    plan: Plan

    def __call__(self, task: list[Any]) -> dict[str, Any]:
        """Returns where the batches of each partition lie, the number of rows and the time range."""
        number, piece = task
        dataset = self.plan.dataset()
        part = FitPart(dataset.schema())
        filesystem, path = storage.resolve(storage.join(self.plan.work, f"rows-{number:05d}.arrow"))
        storage.make_folder(self.plan.work)
        batches: list[list[int]] = [[] for _ in range(self.plan.num_partitions)]
        rows, written, first_ms, last_ms, writer = 0, 0, 1 << 62, -(1 << 62), None
        lz4 = pa.ipc.IpcWriteOptions(compression="lz4")
        with filesystem.open_output_stream(path) as sink:
            for table in dataset.read(piece):
                self._check(table, dataset, piece)
                self._fit(part, table, dataset.form, piece)
                table = table.combine_chunks()
                writer = writer or pa.ipc.new_file(sink, table.schema, options=lz4)
                for partition, share in self._shares(table):
                    batches[partition].append(written)
                    writer.write_batch(share.combine_chunks().to_batches()[0])
                    written += 1
                rows += len(table)
                if len(table):
                    low_high = pc.min_max(table["time_ms"])
                    first_ms, last_ms = min(first_ms, low_high["min"].as_py()), max(last_ms, low_high["max"].as_py())
            if writer is not None:
                writer.close()
        part.save(storage.join(self.plan.work, f"fit-{number:05d}"))
        return {"batches": batches, "rows": rows, "first_ms": first_ms, "last_ms": last_ms}

    def _check(self, table: pa.Table, dataset: Dataset, piece: str) -> None:
        require_columns(table, required_columns(dataset.schema(), dataset.form), where=piece)
        made_later = {"request_id"} if getattr(dataset, "gap_minutes", None) else set()
        for name in ("user_id", "time_ms", "request_id", "item_id"):
            if name not in made_later and name in table.column_names and table[name].null_count:
                raise DataError(f"{piece}: {name!r} is null in {table[name].null_count} rows; drop or fill them")
        if table["time_ms"].type != pa.int64():
            raise DataError(f"{piece}: time_ms must be int64 Unix milliseconds, got {table['time_ms'].type}")

    def _fit(self, part: FitPart, table: pa.Table, form: str, piece: str) -> None:
        start, end = self.plan.config.splits.ranges_ms()["train"]
        moments = pc.field("time_ms")
        training = table.filter((moments >= start) & (moments < end))
        (part.add_requests if form == "requests" else part.add_impressions)(training, where=piece)

    def _shares(self, table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        owner = (fold([to_keys(table["user_id"])], seed=1) % np.uint64(self.plan.num_partitions)).astype(np.int64)
        order = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[order], np.arange(self.plan.num_partitions + 1))
        for partition in np.flatnonzero(np.diff(bounds)):
            yield int(partition), table.take(order[bounds[partition]:bounds[partition + 1]])


def fit(plan: Plan, schema: FeatureSchema, items: pa.Table, num_pieces: int) -> FeatureState:
    """Merges the fitted parts in order and freezes the state."""
    merged = FitPart(schema)
    for number in range(num_pieces):
        merged.merge(FitPart.load(storage.join(plan.work, f"fit-{number:05d}"), schema))
    merged.add_items(items, where="items table")
    if merged.events is None or len(merged.events) == 0:
        raise DataError("split 'train' is empty: no row of the log lies in its time range; move the dates of `splits`")
    end = plan.config.splits.ranges_ms()["train"][1]
    bucket_ms = schema.count_bucket_hours * 3_600_000
    offset_ms = int(schema.utc_offset_hours * 3_600_000)
    last = (pc.max(merged.events["bucket"]).as_py() + 1) * bucket_ms - offset_ms
    return merged.finish(items, as_of_ms=min(end, last))


@dataclass(frozen=True)
class Encode:
    """Second pass over one user partition: requests, encoded, written by split; and the users' final states."""

    plan: Plan
    spilled: list[dict[str, Any]]

    def __call__(self, partition: int) -> dict[str, int]:
        """Returns the rows of each split, and of users."""
        dataset, state = self.plan.dataset(), FeatureState.load(storage.join(self.plan.target, "features"))
        ranges = self.plan.config.splits.ranges_ms()
        held: dict[str, list[pa.Table]] = {name: [] for name in (*ranges, "users")}
        for requests in self._requests(partition, dataset, state):
            is_state = pa.array([], pa.bool_())
            if len(requests):
                is_state = pc.equal(requests["request_id"].cast(pa.string()), NOW)
            logged = requests.filter(pc.invert(is_state))
            for split, (start, end) in ranges.items():
                moments = pc.field("time_ms")
                share = logged.filter((moments >= start) & (moments < end))
                if len(share):
                    held[split].append(state.encode_requests(share, where=f"partition {partition}"))
            if pc.any(is_state).as_py():
                users = requests.filter(is_state).drop_columns(["candidates", *state.schema.labels])
                held["users"].append(state.encode_requests(users, where="users", strict=False))
        counts = {}
        offset = state.schema.utc_offset_hours
        for name, tables in held.items():
            days = by_day(pa.concat_tables(tables), utc_offset_hours=offset) if tables else iter(())
            folder = "users" if name == "users" else f"requests/{name}"
            part = storage.join(self.plan.target, folder, f"part-{partition:05d}.parquet")
            counts[name] = write_part(part, days)
        return counts

    def _requests(self, partition: int, dataset: Dataset, state: FeatureState) -> Iterator[pa.Table]:
        rows = self._rows(partition)
        if rows is None:
            return
        if dataset.form == "requests":
            train = self.plan.config.splits.ranges_ms()["train"]
            yield from _slices(rows.sort_by([("user_id", "ascending"), ("time_ms", "ascending")]))
            yield _as_states(_last_per_user(rows, train), state.as_of_ms)
            return
        last = _last_per_user(rows, self.plan.config.splits.ranges_ms()["train"])
        rows = pa.concat_tables([_with_text_ids(rows), _as_states(last, state.as_of_ms)])
        history, log = state.schema.history, cast(ImpressionLog, dataset)
        yield from to_requests(rows, state.schema, history_len=history.max_len if history else 0,
                               exclude_seen=log.exclude_seen, duplicates=log.duplicates, gap_minutes=log.gap_minutes)

    def _rows(self, partition: int) -> pa.Table | None:
        batches, schema = [], None
        for number, spill in enumerate(self.spilled):
            if spill["batches"][partition]:
                filesystem, path = storage.resolve(storage.join(self.plan.work, f"rows-{number:05d}.arrow"))
                with pa.ipc.open_file(filesystem.open_input_file(path)) as reader:
                    if schema is not None and reader.schema != schema:
                        differs = next(f.name for f, g in zip(schema, reader.schema, strict=False) if f != g)
                        raise DataError(f"column {differs!r} is {schema.field(differs).type} in one file of the log "
                                        f"and {reader.schema.field(differs).type} in another; write one type")
                    schema = reader.schema
                    batches += [reader.get_batch(i) for i in spill["batches"][partition]]
        return pa.Table.from_batches(batches, schema) if batches else None


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(table), ENCODE_ROWS):
        yield table.slice(start, ENCODE_ROWS)


def _last_per_user(rows: pa.Table, train: tuple[int, int]) -> pa.Table:
    moments = pc.field("time_ms")
    rows = rows.filter((moments >= train[0]) & (moments < train[1]))
    rows = rows.sort_by([("user_id", "ascending"), ("time_ms", "ascending")])
    keys = to_keys(rows["user_id"])
    return rows.take(np.flatnonzero(np.append(keys[1:] != keys[:-1], True))) if len(rows) else rows


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
