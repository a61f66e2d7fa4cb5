"""The catalogue in memory: encoded fields by item row, stored once and gathered where they are needed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raycascade.errors import DataError
from raycascade.features import KEY, FeatureState
from raycascade.ragged import Ragged
from raycascade.schema import (
    FIRST_ROW,
    NUM_AGE_BUCKETS,
    UNKNOWN,
    AgeFeature,
    ClockFeature,
    CountFeature,
    DenseFeature,
    IdFeature,
    IdsFeature,
    VectorFeature,
)


@dataclass(frozen=True)
class ItemTable:
    """Static fields as arrays [N + 2, ...] indexed by item row (rows 0 and 1 are padding and unknown), and what
    changes with time (ages, counts) computed from the fitted state at the moment asked for."""

    state: FeatureState
    static: Mapping[str, np.ndarray]
    source_ms: Mapping[str, np.ndarray]  # of age features
    keys: pa.Array  # raw item ids, position p is row p + 2
    count_stats: Mapping[str, tuple[float, float]]
    num_counted: int | None = None  # items that the catalogue's mean counts are over; None: all

    @classmethod
    def from_encoded(cls, table: pa.Table, state: FeatureState) -> "ItemTable":
        """From the encoded items table of shards or a bundle."""
        static: dict[str, np.ndarray] = {}
        source_ms: dict[str, np.ndarray] = {}
        for feature in state.schema.side("item"):
            if isinstance(feature, AgeFeature):
                source_ms[feature.name] = _with_special_rows(table[f"{feature.name}_source_ms"].to_numpy(), 0)
            elif isinstance(feature, IdsFeature):
                values, mask = Ragged.from_arrow(table[feature.name]).pad(feature.max_len, np.int32)
                static[feature.name] = _with_special_rows(values, 0)
                if feature.given:
                    static[f"{feature.name}_missing"] = _with_special_rows(np.asarray((~mask).all(1), np.float32), 1)
            elif isinstance(feature, IdFeature | ClockFeature):
                static[feature.name] = _with_special_rows(table[feature.name].to_numpy(), 1)
            elif isinstance(feature, VectorFeature):
                flat = table[feature.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                static[feature.name] = _with_special_rows(flat.reshape(-1, feature.dim), 0)
            elif isinstance(feature, DenseFeature):
                static[feature.name] = _with_special_rows(table[feature.name].to_numpy(), 0)
                if state.dense[feature.name].missing:
                    indicator = f"{feature.name}_missing"
                    static[indicator] = _with_special_rows(table[indicator].to_numpy(), 1)
            if (name := f"{feature.name}{KEY}") in table.column_names:
                static[name] = _with_special_rows(_key_values(table[name], feature), 0)
        keys = table["item_key"].combine_chunks()
        bare = cls(state, static, source_ms, keys, {})
        return cls(state, static, source_ms, keys, bare._fit_counts())

    def with_items(self, encoded: pa.Table) -> "ItemTable":
        """The same catalogue with more items behind it, which have no counts; what was fitted stays as it is.
        DataError for an item that is there already."""
        more = ItemTable.from_encoded(encoded, self.state)
        known = pa.concat_arrays([self.keys, more.keys.cast(self.keys.type)])
        counts = pc.value_counts(known)
        if len(twice := counts.filter(pc.greater(counts.field(1), 1))):
            raise DataError(f"items: {twice[0]['values']} is in the catalogue already; leave it out")

        def behind(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: np.concatenate([values, new[name][FIRST_ROW:]]) for name, values in old.items()}

        return ItemTable(self.state, behind(self.static, more.static), behind(self.source_ms, more.source_ms), known,
                         self.count_stats, self.num_counted or self.num_items)

    @property
    def num_items(self) -> int:
        """N, without the two special rows."""
        return len(self.keys)

    @property
    def all_rows(self) -> np.ndarray:
        """The item rows of the whole catalogue [N]."""
        return np.arange(FIRST_ROW, FIRST_ROW + self.num_items)

    def with_keys(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of static fields, and of the exact ids of their values where there are any."""
        names = tuple(names)
        return (*names, *(f"{name}{KEY}" for name in names if f"{name}{KEY}" in self.static))

    def ids_of(self, rows: np.ndarray) -> list[object]:
        """Raw ids of item rows; None for padding and unknown."""
        flat = np.asarray(rows, np.int64).reshape(-1)
        return self.keys.take(pa.array(flat - FIRST_ROW, mask=flat < FIRST_ROW)).to_pylist()

    def fields(self, rows: "np.ndarray | Tensor", time_ms: "np.ndarray | int", *, names: "tuple[str, ...] | None" = None
               ) -> dict[str, Tensor]:
        """Item-side fields of rows of any shape, as of `time_ms` (which broadcasts against rows).

        `names` restricts to some static fields (for history events).
        """
        rows = rows.numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        gathered: dict[str, Tensor] = {}
        for name, values in self.static.items():
            if names is None or name in names:
                picked = torch.from_numpy(np.take(values, rows, axis=0))
                gathered[name] = picked.long() if picked.dtype == torch.int32 else picked
        if names is None:
            gathered |= self._timed(rows, np.asarray(time_ms))
        return gathered

    def _timed(self, rows: np.ndarray, time_ms: np.ndarray) -> dict[str, Tensor]:
        timed: dict[str, Tensor] = {}
        for name, source in self.source_ms.items():
            born = np.take(source, rows)
            timed[name] = torch.from_numpy(np.where(rows == 0, 0, age_rows(time_ms - born, born > 0)))
        for feature in self.state.schema.side("item"):
            if isinstance(feature, CountFeature):
                mean, std = self.count_stats[feature.name]
                scaled = (self.count(feature, rows, time_ms) - mean) / std
                timed[feature.name] = torch.from_numpy(scaled.astype(np.float32))
        return timed

    def count(self, feature: CountFeature, rows: np.ndarray, time_ms: "np.ndarray | int") -> np.ndarray:
        """The raw value of a count feature before standardisation: log1p(count), or a smoothed rate."""
        window_ms = None if feature.window_hours is None else feature.window_hours * 3_600_000
        counts = self.state.counters.as_of(rows, np.asarray(time_ms), feature.label, window_ms)
        if feature.relative:
            num_items = max(1, self.num_counted or self.num_items)
            mean = self.state.counters.volume(time_ms, feature.label, window_ms) / num_items
            return np.log1p(counts) - np.log1p(mean)
        if not feature.rate:
            return np.log1p(counts)
        shows = self.state.counters.as_of(rows, np.asarray(time_ms), "exposure", window_ms)
        prior = self.state.label_rates.get(feature.label, 1.0)
        return (counts + feature.smoothing * prior) / (shows + feature.smoothing)

    def _fit_counts(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation over the catalogue at the end of the training log."""
        stats: dict[str, tuple[float, float]] = {}
        for feature in self.state.schema.side("item"):
            if isinstance(feature, CountFeature):
                values = self.count(feature, self.all_rows, self.state.as_of_ms).astype(np.float64)
                spread = (float(values.mean()), float(max(values.std(), 1e-3))) if len(values) else (0.0, 1.0)
                stats[feature.name] = spread
        return stats


def age_rows(age_ms: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Embedding rows of ages: 2 + min(31, floor(log2(1 + seconds))), 1 where the time is not known."""
    seconds = np.maximum(age_ms, 0) / 1000.0
    bucket = np.minimum(NUM_AGE_BUCKETS - 1, np.floor(np.log2(1.0 + seconds))).astype(np.int64)
    return np.where(known, bucket + FIRST_ROW, UNKNOWN)


def _key_values(column: pa.ChunkedArray, feature: object) -> np.ndarray:
    """Exact ids [N], or [N, V] of lists."""
    if isinstance(feature, IdsFeature):
        return Ragged.from_arrow(column).pad(feature.max_len, np.int64)[0]
    return column.to_numpy()


def _with_special_rows(values: np.ndarray, unknown: int) -> np.ndarray:
    """Rows for padding (zeros) and unknown in front of the catalogue's."""
    special = np.zeros((FIRST_ROW, *values.shape[1:]), values.dtype)
    special[1] = unknown
    return np.concatenate([special, values])
