"""Rows of a log on disk between the two passes of `prepare`: written piece by piece, read back by partition of users.

A spilled file is Arrow IPC. Its rows are sorted by the user's bucket, SORT_BYTES at a time, and cut into batches of
about BATCH_BYTES; every batch is known by its first and last bucket. How many partitions there are is decided after
the first pass, when the size of the log is known: a partition is a range of buckets of about PARTITION_BYTES.
"""

from collections.abc import Callable, Iterable
from itertools import groupby
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from raycascade import storage
from raycascade.errors import DataError
from raycascade.keys import fold, to_keys

NUM_BUCKETS = 1 << 16  # of users, by hash
SORT_BYTES = 64 << 20
BATCH_BYTES = 128 << 10
PARTITION_BYTES = 64 << 20
SMALL_LOG_PARTITIONS = 16  # at most so many where fewer would do, so that a small log keeps every core busy


def buckets_of(user_id: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    """The bucket of each user, uint16."""
    return (fold([to_keys(user_id)], seed=1) % np.uint64(NUM_BUCKETS)).astype(np.uint16)


class SpillFile:
    """Writes tables of one schema; holds SORT_BYTES and one table. `batches`: [first bucket, last bucket, bytes]."""

    def __init__(self, uri: str, *, sort_bytes: int = SORT_BYTES, batch_bytes: int = BATCH_BYTES) -> None:
        self.batches: list[list[int]] = []
        self._uri, self._sort_bytes, self._batch_bytes = uri, sort_bytes, batch_bytes
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._schema: pa.Schema | None = None
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> "SpillFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            self._sink.close()

    def add(self, table: pa.Table) -> None:
        """Some rows of the log; DataError if their columns have other types than those before."""
        self._schema = self._schema or table.schema
        check_same(self._schema, table.schema)
        if len(table):
            self._held.append(table)
            self._held_bytes += table.nbytes
        if self._held_bytes >= self._sort_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        table = pa.concat_tables(self._held).combine_chunks()
        self._held, self._held_bytes = [], 0
        buckets = buckets_of(table["user_id"])
        order = np.argsort(buckets, kind="stable")
        buckets, table = buckets[order], table.take(pa.array(order)).combine_chunks()
        step = max(1, self._batch_bytes * len(table) // max(table.nbytes, 1))
        for start, batch in zip(range(0, len(table), step), table.to_batches(step), strict=True):
            self._open().write_batch(batch)
            self.batches.append([int(buckets[start]), int(buckets[start + len(batch) - 1]), batch.nbytes])

    def _open(self) -> pa.ipc.RecordBatchFileWriter:
        if self._writer is None:
            filesystem, path = storage.resolve(self._uri)
            storage.make_folder(self._uri.rsplit("/", 1)[0])
            self._sink = filesystem.open_output_stream(path)
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writer = pa.ipc.new_file(self._sink, self._schema, options=options)
        return self._writer


def spilled_bytes(spilled: list[dict[str, Any]]) -> int:
    """The size of a log as Arrow tables, uncompressed."""
    return sum(batch[2] for spill in spilled for batch in spill["batches"])


def partitions(
    spilled: list[dict[str, Any]], *, partition_bytes: int = PARTITION_BYTES, least: int = SMALL_LOG_PARTITIONS
) -> list[dict[str, Any]]:
    """Ranges of buckets, and the (file, batch) pairs that hold rows of each; JSON values."""
    batches = [(file, number, *batch) for file, spill in enumerate(spilled)
               for number, batch in enumerate(spill["batches"])]
    file_B, number_B, first_B, last_B, _ = np.array(batches, np.int64).reshape(-1, 5).T
    needed = -(-spilled_bytes(spilled) // partition_bytes)
    count = min(max(needed, min(2 * len(spilled), least), 2), NUM_BUCKETS)
    bounds = np.arange(count + 1) * NUM_BUCKETS // count
    ranges = []
    for number in range(count):
        low, behind = int(bounds[number]), int(bounds[number + 1])
        inside_B = (first_B < behind) & (last_B >= low)
        pairs = np.stack([file_B[inside_B], number_B[inside_B]], axis=1).tolist()
        ranges.append({"number": number, "buckets": [low, behind], "batches": pairs})
    return ranges


def read_partition(uri_of: Callable[[int], str], partition: dict[str, Any]) -> pa.Table | None:
    """The rows of a partition in one chunk, in the order of the files; None if there are none. DataError if two files
    have columns of other types."""
    batches: list[pa.RecordBatch] = []
    schema: pa.Schema | None = None
    for file, pairs in groupby(partition["batches"], key=lambda pair: pair[0]):
        filesystem, path = storage.resolve(uri_of(file))
        with filesystem.open_input_file(path) as source, pa.ipc.open_file(source) as reader:
            schema = schema or reader.schema
            check_same(schema, reader.schema)
            batches += _inside((reader.get_batch(number) for _, number in pairs), *partition["buckets"])
    return pa.Table.from_batches(batches, schema).combine_chunks() if batches else None


def _inside(batches: Iterable[pa.RecordBatch], low: int, behind: int) -> list[pa.RecordBatch]:
    """The rows of a range of buckets; batches are sorted by bucket, so they are a slice of each."""
    kept = []
    for batch in batches:
        start, stop = np.searchsorted(buckets_of(batch["user_id"]), [low, behind])
        if stop - start == len(batch):
            kept.append(batch)
        elif stop > start:
            kept.append(batch.take(pa.array(np.arange(start, stop))))  # a slice would keep the whole batch in memory
    return kept


def check_same(schema: pa.Schema, other: pa.Schema) -> None:
    """DataError if two parts of a log differ in the name or type of a column."""
    if schema == other:
        return
    if schema.names != other.names:
        only = sorted(set(schema.names) ^ set(other.names)) or schema.names
        raise DataError(f"column {only[0]!r} is not in the same place in all files of the log; write the same columns")
    name = next(one.name for one, two in zip(schema, other, strict=True) if one != two)
    raise DataError(f"column {name!r} is {schema.field(name).type} in one file of the log and "
                    f"{other.field(name).type} in another; write one type")
