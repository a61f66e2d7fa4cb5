"""Rows of a day on a local disk, by a hash of the request, so that one part at a time is put together in memory."""

import os
from types import TracebackType

import numpy as np
import pyarrow as pa

from raycascade.keys import fold

HELD_BYTES = 32 << 20
OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def bucket_of(request_id: np.ndarray, count: int) -> np.ndarray:
    """The bucket of each request."""
    return (fold([request_id], seed=3) % np.uint64(count)).astype(np.int64)


class Buckets:
    """`count` files of rows with a column `request_id`; the rows of a request are in one, in the order of `add`."""

    def __init__(self, folder: str, name: str, count: int) -> None:
        self._paths = [os.path.join(folder, f"{name}-{number}.arrow") for number in range(count)]
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}

    def __enter__(self) -> "Buckets":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if kind is None:
            self._flush()
        for writer in self._writers.values():
            writer.close()

    def add(self, table: pa.Table) -> None:
        """Some rows."""
        self._held.append(table)
        self._held_bytes += table.nbytes
        if self._held_bytes >= HELD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        table = pa.concat_tables(self._held)
        self._held, self._held_bytes = [], 0
        bucket = bucket_of(table["request_id"].to_numpy(), len(self._paths))
        order = np.argsort(bucket, kind="stable")
        sorted_rows = table.take(pa.array(order)).combine_chunks()
        bounds = np.searchsorted(bucket[order], np.arange(len(self._paths) + 1))
        for number, path in enumerate(self._paths):
            start, stop = int(bounds[number]), int(bounds[number + 1])
            if stop > start:
                if number not in self._writers:
                    self._writers[number] = pa.ipc.new_file(path, table.schema, options=OPTIONS)
                self._writers[number].write_table(sorted_rows.slice(start, stop - start))

    def read(self, number: int) -> pa.Table | None:
        """The rows of a bucket; None if there are none. Only after the block of `with`."""
        if not os.path.exists(self._paths[number]):
            return None
        with pa.OSFile(self._paths[number]) as source, pa.ipc.open_file(source) as reader:
            return reader.read_all().combine_chunks()
