"""What encoded requests say: raw values, as far as the encoding can be undone, and how much of them is missing."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade.features import DenseStats, FeatureState
from raycascade.keys import Vocabulary
from raycascade.ragged import Ragged
from raycascade.schema import (
    FIRST_ROW,
    UNKNOWN,
    ClockFeature,
    CrossFeature,
    DenseFeature,
    Feature,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    VectorFeature,
)


# ---------------------------------------------------------------- raw again
def raw_column(encoded: pa.Table, feature: Feature, state: FeatureState, *, prefix: str = "") -> pa.Array:
    """An encoded id, ids, dense or vector column as the log's values; `prefix` stands before the column's name.

    Null where it is missing, unknown to the vocabulary, or hashed, which cannot be undone. Numbers come back up to
    rounding, and cut where encoding cut them; a vector has length 1. A column that is not there is all null.
    """
    name = f"{prefix}{feature.name}"
    if name not in encoded.column_names:
        return pa.nulls(len(encoded))
    column = encoded[name].combine_chunks()
    if isinstance(feature, VectorFeature):
        missing = np.linalg.norm(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, feature.dim), axis=1) == 0
        return pc.if_else(pa.array(missing), None, column.cast(pa.list_(pa.float32())))
    lists = Ragged.from_arrow(column) if isinstance(feature, IdsFeature) or prefix else None
    flat = column if lists is None else lists.values
    if isinstance(feature, DenseFeature):
        absent = encoded[f"{name}_missing"].combine_chunks() if f"{name}_missing" in encoded.column_names else None
        absent = absent if absent is None or lists is None else Ragged.from_arrow(absent).values
        values = _number(flat, absent, feature, state.dense[feature.name])
    else:
        assert isinstance(feature, IdFeature), feature
        values = _value(flat, state.vocabularies[feature.vocabulary or feature.name])
    if lists is None:
        return values
    if not isinstance(feature, IdsFeature):
        return lists.with_values(values).to_arrow()
    known = values.is_valid().to_numpy(zero_copy_only=False)  # a value nobody knows is left out of several
    lengths_Q = np.bincount(np.repeat(np.arange(len(lists.lengths_Q)), lists.lengths_Q)[known],
                            minlength=len(lists.lengths_Q))
    return Ragged(values.drop_null(), lengths_Q).to_arrow()


def _value(rows: pa.Array, vocabulary: Vocabulary) -> pa.Array:
    """Values of embedding rows."""
    if vocabulary.buckets or vocabulary.given:
        return pa.nulls(len(rows))
    row = pc.fill_null(rows, UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int64)
    return vocabulary.values.take(pa.array(row - FIRST_ROW, mask=row < FIRST_ROW))


def _number(column: pa.Array, absent: pa.Array | None, feature: DenseFeature, stats: DenseStats) -> pa.Array:
    """The inverse of normalising."""
    scaled = pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False).astype(np.float64)
    if feature.normalise == "quantile":
        values = np.interp(scaled, np.linspace(-1.0, 1.0, len(stats.edges)), stats.edges)
    elif feature.normalise == "none":
        values = scaled
    else:
        values = scaled * stats.std + stats.mean
        values = np.sign(values) * np.expm1(np.abs(values)) if feature.normalise == "log" else values
    missing = column.is_null().to_numpy(zero_copy_only=False)
    if absent is not None:
        missing |= pc.fill_null(absent, 1.0).to_numpy(zero_copy_only=False) > 0
    return pa.array(values, pa.float64(), mask=missing)


# ---------------------------------------------------------------- missing
def missing_share(encoded: pa.Table, state: FeatureState) -> np.ndarray:
    """The share, 0 to 1, of the declared user and context features that each encoded request [Q] lacks: null, unknown
    to the vocabulary, or marked as missing. An empty history counts as one; clocks are never missing."""
    columns = dict(zip(encoded.column_names, encoded.columns, strict=True))
    lacking_FQ = [_lacks(columns, feature, len(encoded)) for feature in state.schema.side("user", "context")
                  if not isinstance(feature, ClockFeature | CrossFeature)]
    return np.mean(lacking_FQ, axis=0) if lacking_FQ else np.zeros(len(encoded))


def _lacks(columns: dict[str, pa.ChunkedArray], feature: Feature, num_requests: int) -> np.ndarray:
    """Bool [Q]. Plain numpy: on the few rows of a request a kernel of Arrow takes longer to find than to run."""
    name = f"{feature.name}_missing" if isinstance(feature, DenseFeature) else feature.name
    if name not in columns:
        return np.full(num_requests, feature.name not in columns)
    column = columns[name].chunk(0) if columns[name].num_chunks == 1 else columns[name].combine_chunks()
    if isinstance(feature, HistoryFeature | IdsFeature):
        return np.diff(column.offsets.to_numpy()) == 0  # null lists are empty ones
    if isinstance(feature, IdFeature):
        return ~(column.to_numpy(zero_copy_only=False) > UNKNOWN)  # null is NaN
    if isinstance(feature, DenseFeature):
        return ~(column.to_numpy(zero_copy_only=False) <= 0)
    return ~column.flatten().to_numpy(zero_copy_only=False).reshape(num_requests, -1).any(axis=1)
