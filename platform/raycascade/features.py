"""Fitted features: vocabularies, statistics and counters, and the one encoder that turns raw columns into numbers.

`FeatureState` is fitted by `prepare`, saved as Arrow and JSON in the shards and in every bundle, and used unchanged
by training, batch scoring and serving.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade import storage
from raycascade.counters import Counters
from raycascade.errors import DataError
from raycascade.keys import Vocabulary, exact_ids
from raycascade.ragged import Ragged, id_lists, parallel_lists
from raycascade.schema import (
    FIRST_ROW,
    NUM_AGE_BUCKETS,
    OF_HISTORY,
    UNKNOWN,
    AgeFeature,
    ClockFeature,
    CrossFeature,
    DenseFeature,
    Feature,
    FeatureSchema,
    FeatureSpace,
    Field,
    FieldSide,
    Frozen,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    MatchFeature,
    VectorFeature,
    near_miss,
)

CLOCK_SIZES = {"weekday": 7, "hour": 24, "minute": 60}
DENSE_LIMIT = 5.0  # normalised values are clipped to +-5
KEY = "_key"  # behind the name of a field: exact ids of its values
MOST_LISTED = 64  # values of an event's id that models know by name


class DenseStats(Frozen):
    """Fitted normalisation of a dense feature. `edges` are quantiles (for `normalise: quantile`), else empty."""

    mean: float = 0.0
    std: float = 1.0
    missing: bool = False
    edges: tuple[float, ...] = ()


def normalise(values: np.ndarray, how: str, stats: DenseStats) -> np.ndarray:
    """Normalised float32 values; missing ones (NaN) become 0."""
    if how == "none":
        scaled = values
    elif how == "quantile":
        scaled = np.interp(values, stats.edges, np.linspace(-1.0, 1.0, len(stats.edges)))
    else:
        scaled = (signed_log(values) if how == "log" else values) - stats.mean
        scaled = np.clip(scaled / stats.std, -DENSE_LIMIT, DENSE_LIMIT)
    return np.nan_to_num(scaled, nan=0.0).astype(np.float32)


def signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|)."""
    return np.sign(values) * np.log1p(np.abs(values))


def clock_rows(time_ms: np.ndarray, feature: ClockFeature) -> np.ndarray:
    """Embedding rows of the weekday (0 = Monday), the hour or the minute of a time."""
    if feature.part == "minute":
        return FIRST_ROW + np.floor(time_ms / 60_000 + feature.utc_offset_hours * 60).astype(np.int64) % 60
    hours = np.floor(time_ms / 3_600_000 + feature.utc_offset_hours).astype(np.int64)
    return FIRST_ROW + (hours % 24 if feature.part == "hour" else (hours // 24 + 3) % 7)


# ---------------------------------------------------------------- raw columns, checked
def dense_column(table: pa.Table, name: str, *, where: str) -> np.ndarray:
    """Floats with NaN for null. A NaN or infinity in the data is an error that names column and row."""
    column = table[name].combine_chunks()
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise DataError(f"{where}: column {name!r} must hold numbers, got {column.type}; "
                        "cast it or declare it as an id")
    missing = column.is_null().to_numpy(zero_copy_only=False)
    values = pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"{where}: column {name!r} holds {values[bad[0]]} in row {bad[0]} ({len(bad)} such rows); "
                        "write null where a value is missing")
    return np.where(missing, np.nan, values)


def require_columns(table: pa.Table, names: "list[str]", *, where: str) -> None:
    """DataError naming the first missing column and the nearest one that is there."""
    for name in names:
        if name not in table.column_names:
            raise DataError(f"{where}: column {name!r} is missing{near_miss(name, set(table.column_names))}")


# ---------------------------------------------------------------- the fitted state
@dataclass(frozen=True)
class FeatureState:
    """All that was learned from the training log about the features; everything else is derived from it.

    `item_ids` maps raw item ids to item rows; `as_of_ms` is the end of the training log, the moment that item
    vectors and the catalogue's counts refer to when nothing else is said. By label, `label_rates` holds positives per
    exposure, `label_counts` the candidates whose label is observed and those of them that are positive.
    """

    schema: FeatureSchema
    vocabularies: Mapping[str, Vocabulary]
    dense: Mapping[str, DenseStats]
    counters: Counters
    item_ids: Vocabulary
    as_of_ms: int
    label_rates: Mapping[str, float] = field(default_factory=dict)
    label_counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def space(self) -> FeatureSpace:
        """The fields that models see."""
        fields = tuple(f for feature in self.schema.features for f in self._fields(feature))
        history = self.schema.history
        static = tuple(f.name for f in self.schema.features if isinstance(f, IdFeature) and f.side == "item")
        chosen = static if history is None or history.fields is None else history.fields
        return FeatureSpace(fields=fields, history_len=history.max_len if history else 0,
                            history_fields=chosen if history else (), labels=self.schema.labels)

    def _fields(self, feature: Feature) -> list[Field]:
        side = self.side_of(feature)
        name = feature.name
        if isinstance(feature, IdsFeature):
            table = feature.vocabulary or name
            field = Field(name=name, side=side, form="ids", table=table, num_rows=self.vocabularies[table].num_rows,
                          width=feature.max_len, pool=feature.pool)
            return [field, Field(name=f"{name}_missing", side=side, form="dense")] if feature.given else [field]
        if isinstance(feature, IdFeature):
            table = feature.vocabulary or name
            return [Field(name=name, side=side, form="id", table=table, num_rows=self.vocabularies[table].num_rows,
                          values=_listed(self.vocabularies[table]) if side == "event" else ())]
        if isinstance(feature, CrossFeature):
            width = math.prod(self._num_values(part, feature) for part in feature.parts)
            return [Field(name=name, side=side, form="id" if width == 1 else "ids", table=name,
                          num_rows=FIRST_ROW + feature.buckets, width=width, pool="mean" if width == 1 else "sum")]
        if isinstance(feature, ClockFeature):
            return [Field(name=name, side=side, form="id", table=feature.table or name,
                          num_rows=FIRST_ROW + CLOCK_SIZES[feature.part])]
        if isinstance(feature, AgeFeature):
            return [Field(name=name, side=side, form="id", table=name, num_rows=FIRST_ROW + NUM_AGE_BUCKETS)]
        if isinstance(feature, VectorFeature):
            return [Field(name=name, side=side, form="vector", width=feature.dim)]
        if isinstance(feature, HistoryFeature):
            return []
        indicator = isinstance(feature, DenseFeature) and self.dense[name].missing
        return [Field(name=n, side=side, form="dense") for n in ([name, f"{name}_missing"] if indicator else [name])]

    def _num_values(self, part: str, cross: CrossFeature) -> int:
        """The most values that a part of a cross has."""
        feature = next(f for f in self.schema.features if f.name == part.removeprefix(OF_HISTORY))
        history = self.schema.history
        events = min(cross.max_events, history.max_len) if history and part.startswith(OF_HISTORY) else 1
        return events * (feature.max_len if isinstance(feature, IdsFeature) else 1)

    def side_of(self, feature: Feature) -> FieldSide:
        """Which side of a model a declared feature feeds: request, item, pair or event."""
        if isinstance(feature, CrossFeature):
            parts = [f for f in self.schema.features if f.name in feature.parts]
            sides = {part.side for part in parts if not isinstance(part, CrossFeature)}
            of_history = any(part.startswith(OF_HISTORY) for part in feature.parts)
            request, item = of_history or bool(sides & {"user", "context"}), "item" in sides
            return "pair" if request and item else "item" if item else "request"
        if isinstance(feature, MatchFeature):
            return "pair"
        return "request" if feature.side in ("user", "context") else feature.side

    def with_given(self, feature: IdsFeature, num_rows: int) -> "FeatureState":
        """The same state with one more feature of the items, whose rows are made elsewhere: the caller appends the
        column (lists of int32) to what `encode_items` returns. Events of the history carry it, too."""
        assert feature.given
        assert feature.side == "item"
        declared = [*self.schema.features, feature]
        for place, other in enumerate(declared):
            if isinstance(other, HistoryFeature) and other.fields is not None:
                declared[place] = other.model_copy(update={"fields": (*other.fields, feature.name)})
        schema = FeatureSchema.model_validate(
            {**self.schema.model_dump(), "features": [f.model_dump() for f in declared]})
        table = feature.vocabulary or feature.name
        given = Vocabulary(pa.array([], pa.int64()), given=num_rows)
        return replace(self, schema=schema, vocabularies={**self.vocabularies, table: given})

    # ---- encoding
    def encode_column(self, table: pa.Table, feature: Feature, *, where: str, column: str = "") -> dict[str, pa.Array]:
        """Encoded columns of one id, ids, dense or vector feature; a column that is absent counts as missing."""
        raw = _column(table, column or feature.name)
        if isinstance(feature, IdsFeature):
            lists = id_lists(raw, feature.name, where=where)
            rows = self.vocabularies[feature.vocabulary or feature.name].lookup(lists.values)
            return {feature.name: lists.with_values(rows.astype(np.int32)).to_arrow()}
        if isinstance(feature, IdFeature):
            try:
                rows = self.vocabularies[feature.vocabulary or feature.name].lookup(raw)
            except DataError as error:
                raise DataError(f"{where}: column {feature.name!r}: {error}") from None
            return {feature.name: pa.array(rows.astype(np.int32))}
        if isinstance(feature, DenseFeature):
            values = dense_column(table, feature.name, where=where) if feature.name in table.column_names else np.full(
                len(table), np.nan)
            stats = self.dense[feature.name]
            encoded = {feature.name: pa.array(normalise(values, feature.normalise, stats))}
            if stats.missing:
                encoded[f"{feature.name}_missing"] = pa.array(np.isnan(values).astype(np.float32))
            return encoded
        assert isinstance(feature, VectorFeature), feature
        flat = vector_column(raw, feature, where=where).reshape(-1)
        return {feature.name: pa.FixedSizeListArray.from_arrays(pa.array(flat), feature.dim)}

    def encode_requests(self, table: pa.Table, *, where: str, strict: bool = True) -> pa.Table:
        """Raw canonical requests -> the encoded form of the shards; same row order, the raw user id kept as `user_key`.

        `strict` (prepare): an absent feature column or a candidate that is not in the items table is an error.
        Otherwise (serving) both are unknown.
        """
        if strict:
            request_features = [f.name for f in self.schema.side("user", "context") if not isinstance(f, ClockFeature)]
            require_columns(table, ["request_id", "user_id", "time_ms", "candidates", *request_features], where=where)
        renamed = {"request_id": "request_id", "user_id": "user_key", "time_ms": "time_ms"}
        columns: dict[str, object] = {new: table[old] for old, new in renamed.items() if old in table.column_names}
        for feature in self.schema.side("user", "context"):
            if not isinstance(feature, ClockFeature | HistoryFeature):
                columns |= self.encode_column(table, feature, where=where)
        if self.schema.history:
            columns |= self._encode_history(table, where=where)
        if "candidates" in table.column_names:
            columns |= self._encode_candidates(table, where=where, strict=strict)
        if "exclude" in table.column_names:
            exclude = Ragged.from_arrow(table["exclude"])
            columns["exclude"] = exclude.with_values(self.item_ids.lookup(exclude.values).astype(np.int32)).to_arrow()
        return pa.table(columns)

    def _encode_history(self, table: pa.Table, *, where: str) -> dict[str, object]:
        history = Ragged.from_arrow(_column(table, "history", pa.list_(pa.int64())))
        rows = self.item_ids.lookup(history.values).astype(np.int32)
        columns: dict[str, object] = {"history": history.with_values(rows).to_arrow()}
        if "history_time_ms" in table.column_names:
            columns["history_time_ms"] = table["history_time_ms"]
        for feature in self.schema.side("event"):
            if isinstance(feature, AgeFeature):
                continue
            name = f"history_{feature.name}"
            if name in table.column_names:
                lists = parallel_lists(table, name, history, "history", where=where)
            else:
                lists = history.with_values(pa.nulls(len(history.values), pa.int64()))
            flat = self.encode_column(pa.table({feature.name: lists.values}), feature, where=f"{where}, {name}")
            columns |= {f"history_{key}": lists.with_values(value).to_arrow() for key, value in flat.items()}
        return columns

    def _encode_candidates(self, table: pa.Table, *, where: str, strict: bool) -> dict[str, object]:
        candidates = Ragged.from_arrow(table["candidates"])
        rows = self.item_ids.lookup(candidates.values)
        if strict and (rows == UNKNOWN).any():
            unknown = candidates.values[int(np.argmax(rows == UNKNOWN))]
            raise DataError(f"{where}: candidate {unknown} is not in the items table ({(rows == UNKNOWN).sum()} such); "
                            "add the item or drop the rows")
        columns: dict[str, object] = {"candidates": candidates.with_values(rows.astype(np.int32)).to_arrow()}
        for name in ("reached", "rank", "relevance", *self.schema.labels):
            if name in table.column_names:
                kind = {"reached": pa.int8(), "rank": pa.int16()}.get(name, pa.float32())
                lists = parallel_lists(table, name, candidates, "candidates", kind=kind, where=where)
                if name in ("reached", "relevance") and lists.values.null_count:
                    raise DataError(f"{where}: {name!r} is null for {lists.values.null_count} candidates; fill it")
                columns[name] = lists.to_arrow()
        for name in self.schema.labels if strict else ():
            _check_label(table, name, where=where)
        return columns

    def encode_items(self, table: pa.Table, *, where: str) -> pa.Table:
        """Raw items -> encoded items, same row order (position p is item row p + 2), the raw id kept as `item_key`.

        Ids whose rows do not tell all values apart also have `<name>_key` (`exact_ids`), for counting equal ones."""
        columns: dict[str, object] = {"item_key": table["item_id"]}
        for feature in self.schema.side("item"):
            if isinstance(feature, IdsFeature) and feature.given:
                continue  # `with_given` says how they come in
            if isinstance(feature, IdFeature | DenseFeature | VectorFeature):
                require_columns(table, [feature.name], where=where)
                columns |= self.encode_column(table, feature, where=where)
                if isinstance(feature, IdFeature) and self._is_blurred(feature):
                    columns[f"{feature.name}{KEY}"] = _exact_column(table, feature)
            elif isinstance(feature, AgeFeature):
                require_columns(table, [feature.source], where=where)
                columns[f"{feature.name}_source_ms"] = pc.fill_null(table[feature.source].cast(pa.int64()), 0)
            elif isinstance(feature, ClockFeature):
                require_columns(table, [feature.source], where=where)
                source_ms = pc.fill_null(table[feature.source].cast(pa.int64()), 0).to_numpy()
                rows = np.where(source_ms > 0, clock_rows(source_ms, feature), UNKNOWN)
                columns[feature.name] = pa.array(rows.astype(np.int32))
        return pa.table(columns)

    def _is_blurred(self, feature: IdFeature) -> bool:
        """Whether different values can have one row: that of their bucket, or of all that are rare."""
        return bool(self.vocabularies[feature.vocabulary or feature.name].buckets) or feature.min_count > 1

    # ---- files
    def save(self, uri: str) -> None:
        """Writes schema.json, state.json, counters.arrow and one Arrow file per vocabulary below a folder."""
        storage.write_json(storage.join(uri, "schema.json"), self.schema.model_dump(mode="json"))
        storage.write_json(storage.join(uri, "state.json"), {
            "as_of_ms": self.as_of_ms,
            "label_rates": dict(self.label_rates),
            "label_counts": {name: list(counts) for name, counts in self.label_counts.items()},
            "dense": {name: stats.model_dump() for name, stats in self.dense.items()},
            "vocabularies": {name: vocabulary.buckets for name, vocabulary in self.vocabularies.items()},
            "given": {name: vocabulary.given for name, vocabulary in self.vocabularies.items() if vocabulary.given},
        })
        storage.write_arrow(storage.join(uri, "counters.arrow"), self.counters.to_arrow())
        for name, vocabulary in {**self.vocabularies, "": self.item_ids}.items():
            file = f"vocabulary.{name}.arrow" if name else "item_ids.arrow"
            storage.write_arrow(storage.join(uri, file), pa.table({"value": vocabulary.values}))

    @classmethod
    def load(cls, uri: str, *, with_counters: bool = True) -> "FeatureState":
        """The inverse of `save`; Arrow files on a local disk are memory-mapped. Encoding needs no counters, the largest
        part."""
        state = storage.read_json(storage.join(uri, "state.json"))

        def vocabulary(file: str, buckets: int | None, given: int | None = None) -> Vocabulary:
            return Vocabulary(storage.read_arrow(storage.join(uri, file))["value"].combine_chunks(), buckets, given)

        schema = FeatureSchema.model_validate(storage.read_json(storage.join(uri, "schema.json")))
        counters = Counters.empty(("exposure", *schema.labels))
        if with_counters:
            counters = Counters.from_arrow(storage.read_arrow(storage.join(uri, "counters.arrow")))
        return cls(
            schema=schema,
            vocabularies={n: vocabulary(f"vocabulary.{n}.arrow", b, state.get("given", {}).get(n))
                          for n, b in state["vocabularies"].items()},
            dense={name: DenseStats.model_validate(stats) for name, stats in state["dense"].items()},
            counters=counters,
            item_ids=vocabulary("item_ids.arrow", None),
            as_of_ms=state["as_of_ms"],
            label_rates=state["label_rates"],
            label_counts={n: (observed, ones) for n, (observed, ones) in state.get("label_counts", {}).items()},
        )


def _exact_column(table: pa.Table, feature: IdFeature) -> pa.Array:
    if not isinstance(feature, IdsFeature):
        return pa.array(exact_ids(table[feature.name]))
    lists = Ragged.from_arrow(table[feature.name])
    return lists.with_values(exact_ids(lists.values)).to_arrow()


def _listed(vocabulary: Vocabulary) -> tuple[str, ...]:
    """The values as text, where they are few and each has a row of its own."""
    few = vocabulary.buckets is None and len(vocabulary.values) <= MOST_LISTED
    return tuple(str(value) for value in vocabulary.values.to_pylist()) if few else ()


def _column(table: pa.Table, name: str, kind: pa.DataType | None = None) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(len(table), kind or pa.null())
    return table[name].combine_chunks()


def _check_label(table: pa.Table, name: str, *, where: str) -> None:
    if name not in table.column_names:
        raise DataError(f"{where}: label {name!r} is missing{near_miss(name, set(table.column_names))}")
    values = Ragged.from_arrow(table[name]).values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero((values < 0) | (values > 1))
    if len(bad):
        raise DataError(f"{where}: label {name!r} must be 0 or 1 (or null), got {values[bad[0]]:g}; check the log")


def vector_column(column: pa.Array, feature: VectorFeature, *, where: str) -> np.ndarray:
    """Rows of a list column as float32 [rows, dim], L2-normalised; null is the zero vector."""
    if pa.types.is_null(column.type):
        return np.zeros((len(column), feature.dim), np.float32)
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        raise DataError(f"{where}: vector {feature.name!r} must be a list of numbers, got {column.type}")
    missing = column.is_null().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(column), feature.dim).to_numpy(zero_copy_only=False)
    wrong = lengths[lengths != feature.dim]
    if len(wrong):
        raise DataError(f"{where}: vector {feature.name!r} must have {feature.dim} numbers, got {wrong[0]}")
    vectors = np.zeros((len(column), feature.dim), np.float32)
    flat = column.drop_null().flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    vectors[~missing] = flat.reshape(-1, feature.dim)
    if not np.isfinite(vectors).all():
        raise DataError(f"{where}: vector {feature.name!r} holds NaN or infinity; write null where it is missing")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
