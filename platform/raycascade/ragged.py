"""Lists of different lengths as one flat array and lengths: between Arrow's list columns and padded arrays."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade.errors import DataError


@dataclass(frozen=True)
class Ragged:
    """`values` of all lists one after the other; `lengths_Q` says where each list ends."""

    values: pa.Array
    lengths_Q: np.ndarray

    @classmethod
    def from_arrow(cls, column: "pa.ChunkedArray | pa.Array") -> "Ragged":
        """From a list column; a null list is an empty one."""
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_null(array.type):
            return cls(pa.nulls(0), np.zeros(len(array), np.int64))
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(array.flatten(), lengths)

    @property
    def offsets_Q1(self) -> np.ndarray:
        """Where each list starts, and the total length at the end: Q + 1 numbers."""
        return np.concatenate([[0], np.cumsum(self.lengths_Q)])

    def to_arrow(self) -> pa.Array:
        """The list column again."""
        return pa.ListArray.from_arrays(pa.array(self.offsets_Q1, pa.int32()), self.values)

    def with_values(self, values: np.ndarray | pa.Array) -> "Ragged":
        """Other values in the same lists."""
        return Ragged(values if isinstance(values, pa.Array) else pa.array(values), self.lengths_Q)

    def positions(self, width: int, *, newest: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, column and flat position of every value that fits into `width` columns: the first ones of each list,
        or with `newest` the last ones, left-aligned in their order."""
        kept = np.minimum(self.lengths_Q, width)
        rows = np.repeat(np.arange(len(kept)), kept)
        columns = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
        starts = self.offsets_Q1[:-1] + (self.lengths_Q - kept if newest else 0)
        return rows, columns, np.repeat(starts, kept) + columns

    def pad(self, width: int, dtype: type, *, newest: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Values [Q, width] with zeros behind each list, and the mask of what is real."""
        rows, columns, flat = self.positions(width, newest=newest)
        padded = np.zeros((len(self.lengths_Q), width), dtype)
        mask = np.zeros((len(self.lengths_Q), width), bool)
        padded[rows, columns] = self.values.to_numpy(zero_copy_only=False)[flat]
        mask[rows, columns] = True
        return padded, mask


def parallel_lists(
    table: pa.Table, name: str, other: Ragged, other_name: str, *, where: str, kind: pa.DataType | None = None
) -> Ragged:
    """A list column that is as long as another one in every row, cast to `kind`; DataError otherwise."""
    lists = Ragged.from_arrow(table[name])
    if not np.array_equal(lists.lengths_Q, other.lengths_Q):
        row = int(np.argmax(lists.lengths_Q != other.lengths_Q))
        raise DataError(f"{where}: {name!r} has {lists.lengths_Q[row]} values for {other.lengths_Q[row]} of "
                        f"{other_name!r} in row {row}; lists must be parallel")
    try:
        return lists if kind is None else lists.with_values(lists.values.cast(kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"{where}: {name!r} does not fit {kind}, got {lists.values.type}; check the column") from None


def id_lists(column: pa.Array, name: str, *, where: str) -> Ragged:
    """The lists of a multi-valued id; a null one is empty, and a column of any other type a DataError."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list or pa.types.is_null(kind)):
        raise DataError(f"{where}: column {name!r} must hold lists, got {kind}; declare it as an id")
    return Ragged.from_arrow(column)
