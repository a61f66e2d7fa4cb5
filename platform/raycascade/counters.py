"""How often each item was exposed and got each label before a moment: point in time, in one sparse sorted array.

Time is cut into buckets of `bucket_hours`; a request sees strictly earlier buckets only, so a row's own outcome and
everything later can never reach it. A look-up is a binary search, so that training, evaluation and serving ask the
same function, and ten million items need no dense table.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Counters:
    """`keys_M` = item row * span + bucket, sorted; `totals_MT` the item's running totals including that bucket."""

    names: tuple[str, ...]  # "exposure", then the labels
    start_ms: int  # where bucket 0 begins
    bucket_ms: int
    span: int  # a bound on the number of buckets
    keys_M: np.ndarray
    totals_MT: np.ndarray

    @classmethod
    def empty(cls, names: tuple[str, ...]) -> "Counters":
        """No event was ever seen."""
        return cls(names, 0, HOUR_MS, 1, np.zeros(0, np.int64), np.zeros((0, len(names)), np.float32))

    @classmethod
    def from_events(
        cls, names: tuple[str, ...], rows_E: np.ndarray, bucket_E: np.ndarray, counts_ET: np.ndarray, *,
        bucket_ms: int, offset_ms: int = 0,
    ) -> "Counters":
        """From counts per item row and absolute bucket, (time + offset_ms) // bucket_ms; equal pairs are added up."""
        if len(rows_E) == 0:
            return cls.empty(names)
        start = int(bucket_E.min())
        span = int(bucket_E.max()) - start + 2
        keys, inverse = np.unique(rows_E.astype(np.int64) * span + (bucket_E - start), return_inverse=True)
        totals = np.zeros((len(keys), len(names)), np.float64)
        np.add.at(totals, inverse, counts_ET)
        totals = np.cumsum(totals, axis=0)
        owner = keys // span
        first = np.searchsorted(owner, owner)  # index of the item's first entry
        before = np.where(first[:, None] > 0, totals[first - 1], 0.0)
        return cls(names, start * bucket_ms - offset_ms, bucket_ms, span, keys, (totals - before).astype(np.float32))

    def as_of(
        self, rows: np.ndarray, time_ms: "np.ndarray | np.integer | int", name: str, window_ms: int | None = None
    ) -> np.ndarray:
        """Events of `name` for each item row in buckets strictly before the one of `time_ms`; shapes broadcast.

        With `window_ms`, only those of the last so many whole buckets.
        """
        bucket = (np.asarray(time_ms) - self.start_ms) // self.bucket_ms
        seen = self._until(rows, bucket, self.names.index(name))
        if window_ms is None:
            return seen
        return seen - self._until(rows, bucket - max(1, window_ms // self.bucket_ms), self.names.index(name))

    def volume(self, time_ms: "np.ndarray | np.integer | int", name: str, window_ms: int | None = None) -> np.ndarray:
        """Events of `name` over all items, in the same buckets as `as_of`."""
        bucket = (np.asarray(time_ms) - self.start_ms) // self.bucket_ms
        totals, last = self._volumes[:, self.names.index(name)], self.span - 1
        seen = totals[np.clip(bucket, 0, last)]
        if window_ms is None:
            return seen
        return seen - totals[np.clip(bucket - max(1, window_ms // self.bucket_ms), 0, last)]

    @cached_property
    def _volumes(self) -> np.ndarray:
        """[span, T]: events of all items in buckets strictly before each one."""
        owner, bucket = self.keys_M // self.span, self.keys_M % self.span
        follows = np.concatenate([[False], owner[1:] == owner[:-1]])[:len(owner)]
        added = self.totals_MT.astype(np.float64)
        added[follows] -= self.totals_MT[np.flatnonzero(follows) - 1]
        volumes = np.zeros((self.span + 1, len(self.names)), np.float64)
        np.add.at(volumes, bucket + 1, added)
        return np.cumsum(volumes, axis=0)[:self.span]

    def _until(self, rows: np.ndarray, bucket: np.ndarray, column: int) -> np.ndarray:
        rows, bucket = np.broadcast_arrays(np.asarray(rows, np.int64), np.clip(bucket, 0, self.span - 1))
        if len(self.keys_M) == 0:
            return np.zeros(rows.shape, np.float32)
        found = np.searchsorted(self.keys_M, rows * self.span + bucket) - 1
        same = (found >= 0) & (self.keys_M[found] // self.span == rows)
        return np.where(same, self.totals_MT[found, column], np.float32(0.0))

    def to_arrow(self) -> pa.Table:
        """One row per entry; the scalars travel as schema metadata."""
        columns = {"key": self.keys_M} | {f"total_{n}": self.totals_MT[:, i] for i, n in enumerate(self.names)}
        scalars = {"start_ms": self.start_ms, "bucket_ms": self.bucket_ms, "span": self.span}
        return pa.table(columns).replace_schema_metadata({k: str(v) for k, v in scalars.items()})

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "Counters":
        """The inverse of `to_arrow`."""
        scalars = {key.decode(): int(value) for key, value in (table.schema.metadata or {}).items()}
        names = tuple(name.removeprefix("total_") for name in table.column_names[1:])
        totals = [table[f"total_{name}"].to_numpy() for name in names]
        return cls(names, scalars["start_ms"], scalars["bucket_ms"], scalars["span"], table["key"].to_numpy(),
                   np.stack(totals, axis=1) if len(table) else np.zeros((0, len(names)), np.float32))
