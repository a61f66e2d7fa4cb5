"""Columns of any log as canonical ones: ids, moments, feedback and features, checked where they enter."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field as Option

from raycascade.errors import DataError
from raycascade.ragged import Ragged
from raycascade.schema import DenseFeature, Feature, Frozen, IdsFeature, VectorFeature, near_miss

PER_MS = {"ms": 1.0, "s": 1e-3, "us": 1e3}
LATEST_MS = 7_258_118_400_000  # the year 2200: a later time is a wrong unit
ZONE = r"(Z|[+-]\d\d:?\d\d)$"


class Threshold(Frozen):
    """A label that is 1 where a number of the log is larger than `above`, 0 where it is not, null where it is null."""

    column: str
    above: float = Option(allow_inf_nan=False)


def require(names: list[str], wanted: dict[str, str], *, where: str) -> None:
    """DataError for the first column (`wanted`: what for -> column) that a file does not have, with the nearest one."""
    for purpose, column in wanted.items():
        if column not in names:
            what = "" if purpose == column else f" (for {purpose})"
            raise DataError(f"{where}: column {column!r}{what} is missing{near_miss(column, set(names))}")


def without_nulls(array: pa.Array, name: str, *, where: str) -> pa.Array:
    """The array itself; DataError if it holds a null."""
    if array.null_count:
        row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"{where}: column {name!r} is null in row {row} ({array.null_count} such rows); drop or fill "
                        "the rows")
    return array


def ids(array: pa.Array, name: str, *, where: str) -> pa.Array:
    """Ids as 64-bit integers or text. Whole floats become integers, and so do columns without any value."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_string(kind):
        return array
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return array.cast(pa.int64())
    if pa.types.is_large_string(kind) or pa.types.is_temporal(kind):
        return array.cast(pa.string())
    if pa.types.is_floating(kind):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid:
            raise DataError(f"{where}: column {name!r} holds ids that are not whole numbers; cast it to text, or "
                            "declare it as dense") from None
    raise DataError(f"{where}: column {name!r} must hold integers or text, got {kind}; cast the column")


def numbers(array: pa.Array, name: str, *, where: str) -> pa.Array:
    """Numbers as float64; null stays null and NaN stays NaN."""
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return array.cast(pa.float64(), safe=False)
    if pa.types.is_null(kind) or pa.types.is_boolean(kind):
        return array.cast(pa.int8()).cast(pa.float64())
    raise DataError(f"{where}: column {name!r} must hold numbers, got {kind}; cast the column or declare it as an id")


def milliseconds(array: pa.Array, name: str, unit: str, *, utc_offset_hours: float, where: str) -> pa.Array:
    """Moments as Unix milliseconds; null stays null. Text is ISO 8601, in the offset's zone unless it names one."""
    kind = array.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        moments = array.cast(pa.timestamp("ms", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return moments if getattr(kind, "tz", None) else pc.subtract(moments, _offset_ms(utc_offset_hours))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if unit != "iso":
            raise DataError(f"{where}: column {name!r} must hold times as numbers ({unit}), got text; set time_unit: "
                            "iso")
        moments = _iso(array.cast(pa.string()), name, _offset_ms(utc_offset_hours), where=where)
    else:
        if unit == "iso":
            raise DataError(f"{where}: column {name!r} must hold times as text, got {kind}; set time_unit to ms, s or "
                            "us")
        values = numbers(array, name, where=where)
        moments = array.cast(pa.int64()) if unit == "ms" and pa.types.is_integer(kind) else pc.floor(
            pc.divide(values, PER_MS[unit]))
    seen = moments.drop_null().to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(~((seen >= 0) & (seen < LATEST_MS)))
    if len(bad):
        raise DataError(f"{where}: column {name!r} with time_unit {unit} gives {seen[bad[0]]:g} ms, which is not a "
                        "time from 1970 to 2200; check time_unit")
    return moments.cast(pa.int64())


def _iso(array: pa.Array, name: str, offset_ms: int, *, where: str) -> pa.Array:
    zoned = pc.fill_null(pc.match_substring_regex(array, ZONE), False)
    try:
        local = pc.if_else(zoned, pa.scalar(None, pa.string()), array).cast(pa.timestamp("us"))
        fixed = pc.if_else(zoned, array, pa.scalar(None, pa.string())).cast(pa.timestamp("us", "UTC"))
    except pa.ArrowInvalid:
        bad = next(value for value in array if not _parses(value, bool(pc.match_substring_regex(value, ZONE).as_py())))
        raise DataError(f"{where}: column {name!r} holds {bad.as_py()!r}, which is not a time; write ISO 8601 such as "
                        "2022-04-30T12:00:00") from None
    local_ms = pc.subtract(pc.floor(pc.divide(local.cast(pa.int64()).cast(pa.float64()), 1e3)), float(offset_ms))
    fixed_ms = pc.floor(pc.divide(fixed.cast(pa.int64()).cast(pa.float64()), 1e3))
    return pc.coalesce(local_ms, fixed_ms).cast(pa.int64())


def _parses(value: pa.Scalar, zoned: bool) -> bool:
    try:
        value.cast(pa.timestamp("us", "UTC") if zoned else pa.timestamp("us"))
    except pa.ArrowInvalid:
        return False
    return True


def _offset_ms(hours: float) -> int:
    return round(hours * 3_600_000)


def label(array: pa.Array, name: str, rule: "str | Threshold", *, where: str) -> pa.Array:
    """Feedback as int8: 0, 1 or null, or a threshold on a number."""
    column = rule if isinstance(rule, str) else rule.column
    values = numbers(array, column, where=where)
    known = values.drop_null().to_numpy(zero_copy_only=False)
    if isinstance(rule, Threshold):
        if np.isnan(known).any():
            raise DataError(f"{where}: label {name!r}: column {column!r} holds NaN; write null where a value is "
                            "missing")
        return pc.greater(values, rule.above).cast(pa.int8())
    bad = np.flatnonzero((known != 0) & (known != 1))
    if len(bad):
        raise DataError(f"{where}: label {name!r} must be 0, 1 or null, got {known[bad[0]]:g} in column {column!r}; "
                        f"make it a threshold: {{column: {column}, above: 0}}")
    return values.cast(pa.int8())


def lists(array: pa.Array, name: str, separator: str, *, where: str) -> Ragged:
    """A list column, or text that is split at a separator. A null is an empty list."""
    if pa.types.is_null(array.type):
        return Ragged(pa.nulls(0, pa.int64()), np.zeros(len(array), np.int64))
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        split = Ragged.from_arrow(pc.split_pattern(array.cast(pa.string()), separator))
        return split.with_values(pc.utf8_trim_whitespace(split.values))
    kind = array.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"{where}: column {name!r} must hold lists, got {array.type}; write a list or separated text")
    return Ragged.from_arrow(array)


def feature_column(array: pa.Array, feature: Feature, separator: str, *, where: str) -> pa.Array:
    """A raw column in the type its feature is fitted on."""
    name = feature.name
    if isinstance(feature, IdsFeature):
        parts = lists(array, name, separator, where=where)
        return parts.with_values(ids(parts.values, name, where=where)).to_arrow()
    if isinstance(feature, VectorFeature):
        if pa.types.is_null(array.type):
            return array
        parts = lists(array, name, separator, where=where)
        try:
            vectors = parts.with_values(parts.values.cast(pa.float32())).to_arrow()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(f"{where}: column {name!r} must hold lists of numbers, got {array.type}; cast it") from None
        return pc.if_else(array.is_null(), None, vectors)
    return numbers(array, name, where=where) if isinstance(feature, DenseFeature) else ids(array, name, where=where)
