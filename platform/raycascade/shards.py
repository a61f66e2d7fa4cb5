"""Shards: encoded requests by split, encoded items, users and the fitted state; the manifest is published last.

    <root>/manifest.json              names the current version and every file of it
    <root>/v-<id>/requests/<split>/part-00000.parquet   users/part-00000.parquet   items/part-00000.parquet   features/
                  semantic_ids/<name>/            where the config declares some

Readers open only what the manifest names, so a half-written version is invisible. This file owns the format: writer
helpers, reader and version stand here.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycascade import storage
from raycascade.errors import ShardError
from raycascade.features import FeatureState

if TYPE_CHECKING:
    from raycascade.items import ItemTable

FORMAT_VERSION = 1
ROWS_PER_GROUP = 1024
WINDOW_GROUPS = 8  # row groups that are shuffled together
DAY_MS = 86_400_000


def write_part(uri: str, tables: Iterator[pa.Table]) -> int:
    """Streams tables of one schema into a Parquet file; no file for no rows. Each table starts a row group of its own
    (of at most ROWS_PER_GROUP), so that a reader can take the days of a log one after the other."""
    filesystem, path = storage.resolve(uri)
    writer, rows = None, 0
    try:
        for table in tables:
            if len(table) == 0:
                continue
            if writer is None:
                storage.make_folder(uri.rsplit("/", 1)[0])
                writer = pq.ParquetWriter(path, table.schema, filesystem=filesystem, compression="zstd")
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            rows += len(table)
    finally:
        if writer is not None:
            writer.close()
    return rows


def by_day(table: pa.Table, *, utc_offset_hours: float) -> Iterator[pa.Table]:
    """The rows of each day of a zone, in order of time."""
    time_ms = table["time_ms"].to_numpy()
    order = np.argsort(time_ms, kind="stable")
    days = (time_ms[order] + int(utc_offset_hours * 3_600_000)) // DAY_MS
    bounds = [0, *(np.flatnonzero(np.diff(days)) + 1), len(days)]
    in_order = bool((np.diff(order) == 1).all())
    for start, stop in pairwise(bounds):
        if stop > start:
            yield table.slice(start, stop - start) if in_order else table.take(pa.array(order[start:stop]))


def publish(root: str, version: str, facts: dict[str, object]) -> None:
    """Publishes a finished version: hashes its files, then replaces the manifest atomically. The version before the
    previous one is removed; the previous one stays for runs that still read it."""
    current = storage.join(root, "manifest.json")
    old = storage.read_json(current) if storage.exists(current) else {}
    folder = storage.join(root, version)
    files = {}
    for name in storage.list_files(folder):
        uri = storage.join(folder, name)
        files[name] = {"sha256": storage.sha256(uri), "bytes": _size(uri)}
        if name.endswith(".parquet"):
            filesystem, path = storage.resolve(uri)
            files[name]["row_groups"] = _groups(pq.read_metadata(path, filesystem=filesystem))
    manifest = {"format_version": FORMAT_VERSION, "version": version, "previous": old.get("version"), **facts,
                "files": files}
    storage.write_json(current, manifest)
    if old.get("previous"):
        storage.remove_folder(storage.join(root, old["previous"]))


def _groups(metadata: pq.FileMetaData) -> list[tuple[int, int]]:
    """(rows, first time_ms) of every row group; 0 where the rows have no time."""
    time_column = metadata.schema.names.index("time_ms") if "time_ms" in metadata.schema.names else None
    groups = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        statistics = None if time_column is None else group.column(time_column).statistics
        groups.append((group.num_rows, statistics.min if statistics is not None else 0))
    return groups


def _size(uri: str) -> int:
    filesystem, path = storage.resolve(uri)
    return filesystem.get_file_info(path).size


@dataclass(frozen=True)
class Shards:
    """A published version, opened. `manifest` is what `prepare` wrote."""

    folder: str
    manifest: dict

    @classmethod
    def open(cls, root: str) -> "Shards":
        """Reads the manifest; ShardError where there is none, of another format or where a file has another size."""
        uri = storage.join(root, "manifest.json")
        if not storage.exists(uri):
            raise ShardError(f"{root}: no manifest.json, so no finished shards; "
                             "run `raycascade prepare` with this config")
        try:
            manifest = storage.read_json(uri)
            seen, version = manifest["format_version"], manifest.get("version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{uri}: damaged ({type(error).__name__}); run prepare again") from None
        if seen != FORMAT_VERSION:
            raise ShardError(f"{uri}: format {seen}, "
                             f"this version reads {FORMAT_VERSION}; run prepare again")
        shards = cls(storage.join(root, version), manifest)
        for name, facts in manifest["files"].items():
            file = storage.join(shards.folder, name)
            if not storage.exists(file) or _size(file) != facts["bytes"]:
                seen = f"{_size(file)} bytes" if storage.exists(file) else "no file"
                raise ShardError(f"{file}: expected {facts['bytes']} bytes, found {seen}; run prepare again")
        return shards

    @cached_property
    def state(self) -> FeatureState:
        """The fitted features; ShardError if one of their files has changed."""
        for name, facts in self.manifest["files"].items():
            if name.startswith("features/") and storage.sha256(storage.join(self.folder, name)) != facts["sha256"]:
                raise ShardError(f"{self.folder}/{name}: changed since it was written; run prepare again")
        return FeatureState.load(storage.join(self.folder, "features"))

    @cached_property
    def items(self) -> "ItemTable":
        """The encoded catalogue in memory."""
        from raycascade.items import ItemTable  # needs torch, which those who write shards do without

        return ItemTable.from_encoded(self.table("items"), self.state)

    @property
    def semantic_ids(self) -> dict[str, str]:
        """Folders of the frozen semantic ids by name."""
        return {name: storage.join(self.folder, "semantic_ids", name) for name in self.manifest.get("semantic_ids", {})}

    def files(self, prefix: str) -> list[str]:
        """Names of the Parquet files below a prefix such as requests/train, in order."""
        return [name for name in self.manifest["files"] if name.startswith(f"{prefix}/") and name.endswith(".parquet")]

    def table(self, prefix: str) -> pa.Table:
        """All rows below a prefix (items, users) as one table."""
        return pa.concat_tables([self._read(name) for name in self.files(prefix)])

    @property
    def splits(self) -> dict[str, int]:
        """Rows of every split."""
        return self.manifest["requests"]

    def require_split(self, split: str) -> None:
        """ShardError if a split is not there or is empty."""
        if not self.splits.get(split):
            raise ShardError(f"{self.folder}: split {split!r} has no requests; splits are {self.splits}; set `splits` "
                             "and run prepare again")

    def _open(self, name: str) -> pq.ParquetFile:
        filesystem, path = storage.resolve(storage.join(self.folder, name))
        return pq.ParquetFile(path, filesystem=filesystem)

    def groups(self, split: str) -> list[tuple[str, int, int]]:
        """(file, row group, rows) of a split, in the files' order."""
        return [(name, group, rows) for name in self.files(f"requests/{split}")
                for group, (rows, _) in enumerate(self.manifest["files"][name]["row_groups"])]

    def day_of(self, name: str, group: int) -> int:
        """The day of a row group, in the schema's zone; a group never spans two."""
        first_ms = self.manifest["files"][name]["row_groups"][group][1]
        return (first_ms + int(self.state.schema.utc_offset_hours * 3_600_000)) // DAY_MS

    def days(self) -> dict[int, list[tuple[str, int, int]]]:
        """The row groups of all splits by day (counted from 1970-01-01 in the schema's zone), in order of time."""
        days: dict[int, list[tuple[str, int, int]]] = {}
        for name, group, rows in (found for split in self.splits for found in self.groups(split)):
            days.setdefault(self.day_of(name, group), []).append((name, group, rows))
        return dict(sorted(days.items()))

    def digest(self) -> str:
        """A hash of all that the shards hold; the same after another `prepare` that made the same files."""
        files = sorted((name, facts["sha256"]) for name, facts in self.manifest["files"].items())
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def read_group(self, name: str, group: int) -> pa.Table:
        """One row group; ShardError if the file is damaged."""
        return self._read(name, group)

    def _read(self, name: str, group: int | None = None) -> pa.Table:
        try:
            return self._open(name).read() if group is None else self._open(name).read_row_group(group)
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"{self.folder}/{name}: cannot be read ({error}); run prepare again") from None


@dataclass(frozen=True)
class ShardReader:
    """Batches of encoded requests for one worker: shuffled by seed and epoch, resumable to the exact batch.

    `in_time` takes the days in order and shuffles within each, so that a model is always ahead of what it has seen.
    Every worker reads its own row groups, and all workers make the same number of steps. `batch_size` is per worker.
    With `only`, these row groups are read instead of a split's, of which `split` is then a name for messages.
    """

    shards: Shards
    split: str
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    in_time: bool = False
    only: tuple[tuple[str, int, int], ...] | None = None

    def _plan(self, epoch: int) -> list[list[tuple[str, int, int]]]:
        """Row groups per worker for an epoch: the largest next group to the worker with the fewest rows."""
        groups = self.shards.groups(self.split) if self.only is None else list(self.only)
        order = range(len(groups))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(groups))
        if self.in_time:
            order = sorted(order, key=lambda i: self.shards.day_of(*groups[i][:2]))
        loads, plan = [0] * self.world_size, [[] for _ in range(self.world_size)]
        for i in order:
            worker = int(np.argmin(loads))
            plan[worker].append(groups[i])
            loads[worker] += groups[i][2]
        return plan

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch. A single worker reads every row; several leave out what does not fill a batch on all."""
        rows = [sum(size for _, _, size in groups) for groups in self._plan(epoch)]
        if self.world_size == 1:
            return -(-rows[0] // self.batch_size)
        steps = min(rows) // self.batch_size
        if steps == 0:
            raise ShardError(f"split {self.split!r} has too few rows for {self.world_size} workers with "
                             f"{self.batch_size} requests a step each (rows per worker: {rows}); use fewer workers "
                             "or a smaller batch")
        return steps

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[pa.Table]:
        """The batches of an epoch from step `start` on; the same ones whatever the start."""
        limit = self.num_steps(epoch)
        step, held = 0, []
        for window in self._windows(epoch):
            held.append(window)
            rows = pa.concat_tables(held)
            whole = len(rows) // self.batch_size
            for i in range(whole):
                if start <= step < limit:
                    yield rows.slice(i * self.batch_size, self.batch_size)
                step += 1
            held = [rows.slice(whole * self.batch_size)]
        rest = pa.concat_tables(held) if held else None
        if rest is not None and len(rest) and start <= step < limit:
            yield rest

    def _windows(self, epoch: int) -> Iterator[pa.Table]:
        groups = self._plan(epoch)[self.rank]
        days = [list(same) for _, same in groupby(groups, key=lambda g: self.shards.day_of(g[0], g[1]) * self.in_time)]
        windows = [day[first:first + WINDOW_GROUPS] for day in days for first in range(0, len(day), WINDOW_GROUPS)]
        for number, window in enumerate(windows):
            table = pa.concat_tables([self.shards.read_group(name, group) for name, group, _ in window])
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch, self.rank, number]).permutation(len(table))
                table = table.take(order)
            yield table
