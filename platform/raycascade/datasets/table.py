"""Any log in Parquet or CSV files, described in YAML: `dataset: {name: table, ...}` needs no code.

    dataset:
      name: table
      log: "log_*.parquet"
      columns: {user_id: uid, item_id: vid, time: ts}
      time_unit: s
      request_by: gap
      features:
        - {kind: id, name: city, side: user}
        - {kind: history, max_len: 20}
        - {kind: id, name: action, side: event}
      labels: {long_view: {column: watch_ratio, above: 0.7}, click: clicked}
      positive: long_view
      event_columns: {action: long_view}
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field as Option, model_validator

from raycascade.datasets import _columns, _files
from raycascade.datasets._columns import Threshold
from raycascade.datasets._impressions import made_request_ids
from raycascade.errors import ConfigError, DataError
from raycascade.plugins import PluginConfig
from raycascade.ragged import Ragged
from raycascade.schema import (
    AgeFeature,
    ClockFeature,
    DenseFeature,
    Feature,
    FeatureSchema,
    HistoryFeature,
    IdsFeature,
    VectorFeature,
    near_miss,
)

OPTIONAL_LISTS = ("reached", "rank", "exposed", "relevance", "exclude")  # of layout requests, read where they are
ITEM_ROWS = 1 << 20  # rows gathered before the distinct items are taken


class TableDataset:
    """A log described by its options. Every problem of a file is a DataError of one line that names the file."""

    class Config(PluginConfig):
        """Options of `dataset: {name: table}`; a column that `columns` does not map has its canonical name."""

        log: str = "*.parquet"  # files below paths.raw: *.parquet, *.csv or *.csv.gz; a leading **/ is any folder
        items: str | None = None  # the items table; null: the log's distinct items, with their earliest features
        layout: Literal["impressions", "requests"] = "impressions"  # one row per shown item, or per request with lists
        # user_id, item_id, time, request_id, features, lists of layout requests -> the log's column
        columns: dict[str, str] = Option(default={})
        time_unit: Literal["ms", "s", "us", "iso"] = "ms"
        utc_offset_hours: float = Option(default=0.0, ge=-24, le=24)  # zone of days and of times without one
        request_by: Literal["id", "day", "gap", "row"] = "id"  # id: the column request_id; day, row: made of the user
        request_gap_minutes: float = Option(default=30.0, gt=0)
        features: tuple[Feature, ...] = Option(min_length=1)
        # label -> column of 0, 1 and null, or {column: ..., above: ...}
        labels: dict[str, str | Threshold] = Option(default={})
        positive: str = ""
        count_bucket_hours: int = Option(default=24, ge=1)  # see FeatureSchema
        event_columns: dict[str, str] = Option(default={})  # event feature -> a label above, or a column of the log
        exclude_seen: bool = False  # layout impressions: items seen before must not be recommended again
        duplicates: Literal["refuse", "drop"] = "refuse"  # layout impressions: rows equal in every column read
        list_separator: str = Option(default=",", min_length=1)  # splits text into values of ids and vector features
        text_columns: tuple[str, ...] = ()  # CSV: columns read as text although they may look like numbers

        @model_validator(mode="after")
        def _consistent(self) -> "TableDataset.Config":
            schema = self.schema()
            events = {f.name for f in schema.side("event") if not isinstance(f, AgeFeature)}
            for name in self.event_columns:
                if name not in events:
                    raise ConfigError(f"event_columns: {name!r} is not a feature of side "
                                      f"event{near_miss(name, events)}")
            known = {"user_id", "item_id", "time", "request_id"} | {f.name for f in self.features}
            known |= {f.source for f in self.features if isinstance(f, AgeFeature | ClockFeature) and f.source}
            if self.layout == "requests":
                known |= {"candidates", "history", "history_time_ms", *OPTIONAL_LISTS}
                known |= {f"history_{name}" for name in events}
            for name in self.columns:
                if name not in known:
                    raise ConfigError(f"columns: {name!r} is not a canonical column or a "
                                      f"feature{near_miss(name, known)}")
            return self

        def schema(self) -> FeatureSchema:
            """The declared features and labels, checked against each other."""
            return FeatureSchema(features=self.features, labels=tuple(self.labels), positive=self.positive,
                                 count_bucket_hours=self.count_bucket_hours, utc_offset_hours=self.utc_offset_hours)

    def __init__(self, config: Config, *, raw: str):
        self.config = config
        self.raw = raw
        self.form: Literal["requests", "impressions"] = config.layout
        self.exclude_seen = config.exclude_seen
        self.duplicates = config.duplicates
        self.gap_minutes = config.request_gap_minutes if config.request_by == "gap" else None

    @property
    def history_len(self) -> int:
        """Events that a request's history keeps; 0 without a history feature."""
        history = self.schema().history
        return history.max_len if history else 0

    def schema(self) -> FeatureSchema:
        """Features and labels as declared."""
        return self.config.schema()

    def slices(self) -> list[str]:
        """Parquet files by ranges of row groups of about 96 MB, CSV files whole."""
        return _files.pieces(self.raw, self._log_files())

    def read(self, piece: str) -> Iterator[pa.Table]:
        """The rows of a piece in the canonical form, times in milliseconds, labels as 0, 1 or null."""
        file = _files.file_of(piece)
        names = _files.column_names(self.raw, file)
        wanted = self._request_columns(names) if self.form == "requests" else self._impression_columns()
        if "request_id" in wanted and self.form == "impressions" and wanted["request_id"] not in names:
            raise DataError(f"{file}: column {wanted['request_id']!r} (for request_id) is missing"
                            f"{near_miss(wanted['request_id'], set(names))}; or set request_by to day, gap or row")
        _columns.require(names, wanted, where=file)
        for table in self._read(piece, wanted):
            raw = {purpose: table[column].combine_chunks() for purpose, column in wanted.items()}
            yield self._requests(raw, file) if self.form == "requests" else self._impressions(raw, file)

    def items(self) -> pa.Table:
        """`item_id` and the item features, one row an item: the items files, or what the log shows."""
        if self.config.items is None:
            return self._items_of_requests() if self.form == "requests" else self._items_of_impressions()
        files = _files.required(self.raw, self.config.items)
        wanted = self._item_columns()
        for file in files:
            _columns.require(_files.column_names(self.raw, file), wanted, where=file)
        table = _files.read_all(self.raw, files, columns=sorted(set(wanted.values())), types=self._types(wanted))
        items = self._item_features({n: table[c].combine_chunks() for n, c in wanted.items()}, files[0])
        counts = pc.value_counts(items["item_id"]).flatten()
        if len(counts[0]) < len(items):
            twice = counts[0][int(np.argmax(counts[1].to_numpy()))]
            raise DataError(f"{files[0]}: item {twice} has {pc.max(counts[1])} rows; keep one row per item")
        return items

    # ---- what is read from where
    def _log_files(self) -> list[str]:
        """The log's files; the items files may match its pattern too."""
        files = _files.required(self.raw, self.config.log)
        items = _files.matching(self.raw, self.config.items) if self.config.items else []
        if self.form == "requests" and not all(file.endswith(".parquet") for file in files):
            raise ConfigError("layout: requests needs Parquet files, CSV has no lists; convert the log or use "
                              "impressions")
        left = [file for file in files if file not in items]
        if not left:
            raise DataError(f"{self.raw}: {self.config.log!r} matches only the items table {items[0]}; check log and "
                            "items")
        return left

    def _column(self, name: str) -> str:
        return self.config.columns.get(name, "time_ms" if name == "time" else name)

    def _request_features(self) -> list[Feature]:
        return [f for f in self.schema().side("user", "context") if not isinstance(f, ClockFeature | HistoryFeature)]

    def _events(self) -> list[Feature]:
        return [feature for feature in self.schema().side("event") if not isinstance(feature, AgeFeature)]

    def _labels(self) -> dict[str, str]:
        """Purpose (kept apart from features by a prefix that no name needs) -> column."""
        return {f"label {n}": r if isinstance(r, str) else r.column for n, r in self.config.labels.items()}

    def _impression_columns(self) -> dict[str, str]:
        wanted = {"user_id": self._column("user_id"), "item_id": self._column("item_id"), "time": self._column("time")}
        if self.config.request_by == "id":
            wanted["request_id"] = self._column("request_id")
        wanted |= {feature.name: self._column(feature.name) for feature in self._request_features()} | self._labels()
        for feature in self._events():
            source = self.config.event_columns.get(feature.name, self._column(feature.name))
            if source not in self.config.labels:
                wanted[feature.name] = source
        return wanted

    def _request_columns(self, names: list[str]) -> dict[str, str]:
        wanted = {name: self._column(name) for name in ("request_id", "user_id", "time", "candidates")}
        wanted |= {feature.name: self._column(feature.name) for feature in self._request_features()} | self._labels()
        if self.schema().history:
            wanted["history"] = self._column("history")
            for feature in self._events():
                wanted[f"history_{feature.name}"] = self.config.event_columns.get(
                    feature.name, self._column(f"history_{feature.name}"))
        optional = (*OPTIONAL_LISTS, *(["history_time_ms"] if self.schema().history else []))
        return wanted | {n: self._column(n) for n in optional if n in self.config.columns or self._column(n) in names}

    def _item_columns(self) -> dict[str, str]:
        wanted = {"item_id": self._column("item_id")}
        for feature in self.schema().side("item"):
            if isinstance(feature, AgeFeature | ClockFeature):
                wanted[feature.source] = self._column(feature.source)
            elif feature.kind in ("id", "ids", "dense", "vector"):
                wanted[feature.name] = self._column(feature.name)
        return wanted

    def _types(self, wanted: dict[str, str]) -> dict[str, pa.DataType]:
        """How the columns of a CSV file are read, where the options say what they hold."""
        features = {feature.name: feature for feature in self.config.features}
        moments = {"time"} | {f.source for f in self.config.features if isinstance(f, AgeFeature | ClockFeature)}
        types = {column: kind for column, kind in self._guessed_types.items() if column in wanted.values()}
        for purpose, column in wanted.items():
            feature = features.get(purpose)
            if purpose in moments:
                types[column] = pa.string() if self.config.time_unit == "iso" else pa.float64()
            elif isinstance(feature, DenseFeature) or purpose.startswith("label "):
                types[column] = pa.float64()
            elif isinstance(feature, IdsFeature | VectorFeature):
                types[column] = pa.string()
        return types | dict.fromkeys(set(self.config.text_columns) & set(wanted.values()), pa.string())

    @cached_property
    def _guessed_types(self) -> dict[str, pa.DataType]:
        """Types of the first CSV file of the log, so that all of them are read alike."""
        first = next((file for file in self._log_files() if not file.endswith(".parquet")), None)
        guessed = _files.schema_of(self.raw, first) if first else []
        return {field.name: field.type for field in guessed if not pa.types.is_null(field.type)}

    def _read(self, piece: str, wanted: dict[str, str]) -> Iterator[pa.Table]:
        return _files.read(self.raw, piece, columns=sorted(set(wanted.values())), types=self._types(wanted))

    # ---- canonical tables
    def _moments(self, array: pa.Array, name: str, where: str) -> pa.Array:
        return _columns.milliseconds(array, name, self.config.time_unit, utc_offset_hours=self.config.utc_offset_hours,
                                     where=where)

    def _keys(self, raw: dict[str, pa.Array], names: list[str], where: str) -> dict[str, pa.Array]:
        keys = {name: _columns.ids(raw[name], self._column(name), where=where) for name in names}
        return {name: _columns.without_nulls(key, self._column(name), where=where) for name, key in keys.items()}

    def _time(self, raw: dict[str, pa.Array], where: str) -> pa.Array:
        column = self._column("time")
        return _columns.without_nulls(self._moments(raw["time"], column, where), column, where=where)

    def _features(self, raw: dict[str, pa.Array], features: list[Feature], where: str) -> dict[str, pa.Array]:
        separator = self.config.list_separator
        return {f.name: _columns.feature_column(raw[f.name], f, separator, where=where) for f in features}

    def _impressions(self, raw: dict[str, pa.Array], where: str) -> pa.Table:
        by = self.config.request_by
        columns = self._keys(raw, ["user_id", "item_id", *(["request_id"] if by == "id" else [])], where)
        columns["time_ms"] = self._time(raw, where)
        if by == "gap":
            columns["request_id"] = pa.nulls(len(columns["time_ms"]), pa.string())
        elif by != "id":
            columns["request_id"] = made_request_ids(by, columns["user_id"], columns["time_ms"], columns["item_id"],
                                                     utc_offset_hours=self.config.utc_offset_hours)
        columns |= self._features(raw, self._request_features(), where)
        for name, rule in self.config.labels.items():
            columns[name] = _columns.label(raw[f"label {name}"], name, rule, where=where)
        for feature in self._events():
            source = self.config.event_columns.get(feature.name, self._column(feature.name))
            event = columns[source] if source in self.config.labels else raw[feature.name]
            columns[feature.name] = _columns.feature_column(event, feature, self.config.list_separator, where=where)
        return pa.table(columns)

    def _requests(self, raw: dict[str, pa.Array], where: str) -> pa.Table:
        columns = self._keys(raw, ["request_id", "user_id"], where) | {"time_ms": self._time(raw, where)}
        columns |= self._features(raw, self._request_features(), where)
        events = {f"history_{feature.name}": feature for feature in self._events()}
        for name in raw:
            if name not in ("candidates", "history", "history_time_ms", *events, *OPTIONAL_LISTS):
                continue
            parts = _columns.lists(raw[name], self._column(name), self.config.list_separator, where=where)
            if name in ("candidates", "history", "exclude"):
                values = _columns.ids(parts.values, self._column(name), where=where)
                values = _columns.without_nulls(values, self._column(name), where=where)
            elif name in events:
                values = _columns.feature_column(parts.values, events[name], self.config.list_separator, where=where)
            else:
                values = self._moments(parts.values, name, where) if name == "history_time_ms" else parts.values
            columns[name] = parts.with_values(values).to_arrow()
        for name, rule in self.config.labels.items():
            parts = _columns.lists(raw[f"label {name}"], name, self.config.list_separator, where=where)
            columns[name] = parts.with_values(_columns.label(parts.values, name, rule, where=where)).to_arrow()
        return pa.table(columns)

    # ---- items
    def _item_features(self, raw: dict[str, pa.Array], where: str) -> pa.Table:
        columns = self._keys(raw, ["item_id"], where)
        for feature in self.schema().side("item"):
            if isinstance(feature, AgeFeature | ClockFeature):
                columns[feature.source] = self._moments(raw[feature.source], self._column(feature.source), where)
            elif feature.name in raw and feature.name != "item_id":
                columns |= self._features(raw, [feature], where)
        return pa.table(columns)

    def _items_of_impressions(self) -> pa.Table:
        """One pass over the log in bounded memory; an item's features are those of its earliest row."""
        wanted = self._item_columns() | {"time": self._column("time")}

        def rows() -> Iterator[pa.Table]:
            for piece in self.slices():
                file = _files.file_of(piece)
                _columns.require(_files.column_names(self.raw, file), wanted, where=file)
                for table in self._read(piece, wanted):
                    raw = {purpose: table[column].combine_chunks() for purpose, column in wanted.items()}
                    yield self._item_features(raw, file).append_column("first seen", self._time(raw, file))

        return _earliest(rows(), self.raw).drop_columns(["first seen"])

    def _items_of_requests(self) -> pa.Table:
        """The distinct items of candidates and histories; their features are nowhere in such a log."""
        missing = [name for name in self._item_columns() if name != "item_id"]
        if missing:
            raise ConfigError(f"items: feature {missing[0]!r} needs an items table, since layout requests logs ids "
                              "alone; name its file in items")

        def rows() -> Iterator[pa.Table]:
            for piece in self.slices():
                for table in self.read(piece):
                    for name in [name for name in ("candidates", "history") if name in table.column_names]:
                        values = Ragged.from_arrow(table[name]).values
                        yield pa.table({"item_id": values, "first seen": pa.array(np.zeros(len(values), np.int64))})

        return _earliest(rows(), self.raw).drop_columns(["first seen"])


def _earliest(tables: Iterator[pa.Table], where: str) -> pa.Table:
    """The row of each item that was seen first, by item id; at most about twice the catalogue is held."""
    kept: list[pa.Table] = []
    num_items, num_rows = 0, 0
    for table in tables:
        kept.append(table)
        num_rows += len(table)
        if num_rows > max(ITEM_ROWS, 2 * num_items):
            kept = [_distinct(kept, where)]
            num_items = num_rows = len(kept[0])
    if not num_rows:
        raise DataError(f"{where}: the log has no rows, so there are no items; check the log")
    return _distinct(kept, where).sort_by("item_id")


def _distinct(tables: list[pa.Table], where: str) -> pa.Table:
    try:
        table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    except pa.ArrowException as error:
        raise DataError(f"{where}: files disagree on a column's type ({' '.join(str(error).split())}); cast it, or "
                        "name it in text_columns") from None
    codes = table["item_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    order = np.lexsort((table["first seen"].to_numpy(), codes))
    _, first = np.unique(codes[order], return_index=True)
    return table.take(pa.array(order[first]))
