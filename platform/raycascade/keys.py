"""Raw ids as 64-bit keys, hashes of keys, and vocabularies: the rows of embedding tables that raw ids have."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

from raycascade.errors import DataError
from raycascade.schema import FIRST_ROW, UNKNOWN

DIRECT_FACTOR = 4  # a vocabulary of integers is a table of rows where at least every fourth key is taken


def to_keys(array: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    """A 64-bit key per value: integers as they are, strings by a stable hash. Nulls get an arbitrary key."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        try:
            return pc.fill_null(array.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            raise DataError("ids must lie below 2^63; cast the column to text") from None
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_null(array.type):
        text = pc.fill_null(array.cast(pa.string()), "").to_numpy(zero_copy_only=False)
        hashed = cast(Callable[..., np.ndarray], hash_array)(text, categorize=False)  # pandas gives it no type
        return hashed.view(np.int64)
    raise DataError(f"ids must be integers or strings, got {array.type}; cast the column")


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 arrays."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(parts: "list[np.ndarray]", *, seed: int = 0) -> np.ndarray:
    """One uint64 hash of several integer arrays of one shape; order matters."""
    hashed = mix(np.full(1, seed, np.uint64))
    for part in parts:
        hashed = mix(hashed ^ part.astype(np.int64).view(np.uint64))
    return hashed


def hash_rows(keys: np.ndarray, buckets: int, *, seed: int = 0) -> np.ndarray:
    """Embedding rows 2 .. buckets + 1 for 64-bit keys."""
    return FIRST_ROW + (fold([keys], seed=seed) % np.uint64(buckets)).astype(np.int64)


def exact_ids(array: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    """A number from 2 to 2^63 - 1 per value, 0 for null: other values have other ones, up to a chance of 1e-19 a pair.
    Unlike a row of a vocabulary, it also tells values apart that share a bucket or are too rare for a row."""
    hashed = FIRST_ROW + (fold([to_keys(array)]) % np.uint64((1 << 63) - FIRST_ROW)).astype(np.int64)
    return np.where(array.is_null().to_numpy(zero_copy_only=False), 0, hashed)


@dataclass(frozen=True)
class Vocabulary:
    """Known values in row order: the value at position p has row p + 2. Rows of hashed vocabularies need no values;
    those of `given` ones are made elsewhere, and only their number is known."""

    values: pa.Array
    buckets: int | None = None
    given: int | None = None  # rows of the table, padding and unknown included

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        keys = to_keys(self.values)
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    @cached_property
    def _direct(self) -> tuple[int, np.ndarray]:
        """The smallest key, and the rows of it and all keys above it; empty where keys lie too far apart for that."""
        keys = to_keys(self.values)
        low, high = (int(keys.min()), int(keys.max())) if len(keys) else (0, 0)
        rows = np.full(high - low + 1 if high - low < DIRECT_FACTOR * len(keys) else 0, UNKNOWN, np.int64)
        if len(rows):
            rows[keys - low] = np.arange(FIRST_ROW, FIRST_ROW + len(keys))
        return low, rows

    @property
    def num_rows(self) -> int:
        """Rows of the embedding table, padding and unknown included."""
        return self.given or FIRST_ROW + (self.buckets or len(self.values))

    def lookup(self, array: "pa.Array | pa.ChunkedArray") -> np.ndarray:
        """Rows (int64) of raw values; 1 for null and for what the vocabulary does not know."""
        keys, missing = to_keys(array), array.is_null().to_numpy(zero_copy_only=False)
        if self.buckets:
            return np.where(missing, UNKNOWN, hash_rows(keys, self.buckets))
        low, rows = self._direct
        if len(rows):
            inside = (keys >= low) & (keys <= low + len(rows) - 1) & ~missing
            return np.where(inside, rows[np.where(inside, keys - low, 0)], UNKNOWN)
        known, order = self._sorted
        if len(known) == 0:
            return np.full(len(keys), UNKNOWN, np.int64)
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where((known[at] == keys) & ~missing, order[at] + FIRST_ROW, UNKNOWN)
