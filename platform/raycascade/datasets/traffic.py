"""The platform's own traffic, as the gateway logs it: every stage's survivors, labelled by the events that followed.

    paths:   {raw: s3://logs/traffic}
    dataset:
      name: traffic
      items: s3://logs/items.parquet
      features: [{kind: id, name: item_id, side: item}, {kind: history}, {kind: id, name: action, side: event}]
      labels: {click: {feature: action, values: [click]}, long_view: {feature: seconds, above: 30}}
      positive: click

`_traffic_files.py` owns the format, `_traffic_credit.py` says which event belongs to which shown item.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field as Option, model_validator

from raycascade.datasets import _columns, _traffic_files as files
from raycascade.datasets._traffic_feedback import EventLabel, Feedback
from raycascade.datasets._traffic_files import TrafficFile
from raycascade.datasets._traffic_items import item_ids, read_items
from raycascade.datasets._traffic_lists import Lists
from raycascade.errors import ConfigError, DataError
from raycascade.keys import Vocabulary
from raycascade.plugins import PluginConfig
from raycascade.ragged import Ragged
from raycascade.schema import (
    AgeFeature,
    ClockFeature,
    Feature,
    FeatureSchema,
    HistoryFeature,
    IdFeature,
    near_miss,
)

MINUTE_MS = 60_000
PIECE_BYTES = 16 << 20  # of compressed files in one piece
MOST_FILES = 64  # in one piece
MOST_LOOKED_AT = 32  # files, for the types of columns
TABLE_BYTES = 48 << 20
SEPARATOR = ","  # the log has lists; no text is ever split


class TrafficDataset:
    """Requests that the gateway answered, over what its stages let through. `notes` counts what was left out."""

    form: Literal["requests"] = "requests"

    class Config(PluginConfig):
        """Options of `dataset: {name: traffic}`."""

        items: str = Option(min_length=1)  # Parquet or CSV files of the catalogue: a URI, or below paths.raw
        features: tuple[Feature, ...] = Option(min_length=1)
        labels: dict[str, EventLabel] = Option(default={})
        positive: str = ""
        window_minutes: float = Option(default=60.0, gt=0)  # so long after a request an event can belong to it
        unfinished: Literal["drop", "keep"] = "drop"  # requests whose window ends after the log
        degraded: Literal["drop", "keep"] = "drop"  # requests that a stage did not answer
        per_level: int | None = Option(default=10, ge=1)  # candidates of each level beside the shown ones; None: all
        gains: dict[str, float] = Option(default={})  # label -> what it adds to the relevance of a shown item
        exclude: Literal["ignore", "keep"] = "ignore"  # what requests excluded
        missing_items: Literal["drop", "refuse"] = "drop"  # candidates that the catalogue does not have any more
        text_columns: tuple[str, ...] = ()  # ids read as text where some files hold whole numbers
        count_bucket_hours: int = Option(default=24, ge=1)  # see FeatureSchema
        utc_offset_hours: float = Option(default=0.0, ge=-24, le=24)

        @model_validator(mode="after")
        def _consistent(self) -> "TrafficDataset.Config":
            self.schema()
            for name in self.gains:
                if name not in self.labels:
                    raise ConfigError(f"gains: {name!r} is not a label{near_miss(name, set(self.labels))}")
            return self

        def schema(self) -> FeatureSchema:
            """The declared features and labels, checked against each other."""
            return FeatureSchema(features=self.features, labels=tuple(self.labels), positive=self.positive,
                                 count_bucket_hours=self.count_bucket_hours, utc_offset_hours=self.utc_offset_hours)

    def __init__(self, config: Config, *, raw: str) -> None:
        self.config, self.raw = config, raw
        self.notes: Counter[str] = Counter()
        self._window_ms = round(config.window_minutes * MINUTE_MS)

    def schema(self) -> FeatureSchema:
        """Features and labels as declared."""
        return self.config.schema()

    def items(self) -> pa.Table:
        """`item_id` and the declared item features, one row an item."""
        return read_items(self.raw, self.config.items, self.schema())

    def slices(self) -> list[str]:
        """Files that follow one another in time, about 16 MB together, and the end of the log as it is now."""
        if not self._requests:
            raise DataError(f"{self.raw}: holds no requests of a traffic log; set paths.raw to the folder that the "
                            "gateway logs to (traffic.uri), and send it requests")
        end_ms = max(file.last_ms for file in (*self._requests, *self._events))
        first_ms = self._requests[0].first_ms
        if self.config.unfinished == "drop" and first_ms > end_ms - self._window_ms:
            raise DataError(f"{self.raw}: the log covers {(end_ms - first_ms) / MINUTE_MS:.1f} minutes, less than "
                            f"window_minutes {self.config.window_minutes:g}, so every request may get more events; "
                            "wait, shorten the window or set unfinished: keep")
        pieces: list[list[TrafficFile]] = [[]]
        for file in self._requests:
            if pieces[-1] and (len(pieces[-1]) == MOST_FILES
                               or sum(one.num_bytes for one in pieces[-1]) + file.num_bytes > PIECE_BYTES):
                pieces.append([])
            pieces[-1].append(file)
        return [f"{'|'.join(file.path for file in piece)}@{end_ms}" for piece in pieces]

    def read(self, piece: str) -> Iterator[pa.Table]:
        """The requests of the files of a piece, labelled."""
        paths, _, end = piece.rpartition("@")
        own = [file for file in self._requests if file.path in set(paths.split("|"))]
        feedback = Feedback.of(self.raw, own, self._requests, self._events, self.config.labels, self._window_ms)
        for file in own:
            table = files.read(self.raw, file.path)
            table = table.append_column("row", pa.array(np.arange(len(table))))
            step = max(1, len(table) * TABLE_BYTES // max(table.nbytes, 1))
            for start in range(0, len(table), step):
                kept = self._kept(table.slice(start, step), int(end))
                if len(kept):
                    yield self._canonical(kept, feedback, file.path)

    # ---- what there is
    @cached_property
    def _requests(self) -> list[TrafficFile]:
        if not self.raw:
            raise ConfigError("paths.raw: is empty; set it to the folder that the gateway logs to (traffic.uri)")
        return files.find(self.raw, "requests")

    @cached_property
    def _events(self) -> list[TrafficFile]:
        return files.find(self.raw, "events")

    @cached_property
    def _catalogue(self) -> Vocabulary:
        return Vocabulary(item_ids(self.raw, self.config.items))

    def _stored(self) -> list[Feature]:
        """The features of a request that are columns of the log."""
        return [f for f in self.schema().side("user", "context")
                if not isinstance(f, ClockFeature | HistoryFeature) and f.name != "user_id"]

    def _events_stored(self) -> list[Feature]:
        return [feature for feature in self.schema().side("event") if not isinstance(feature, AgeFeature)]

    @cached_property
    def _whole_numbers(self) -> dict[str, bool]:
        """For every column of ids whether it holds whole numbers; else it is text. All files must agree, so the same
        few of them, spread over the log, are looked at by every task."""
        step = -(-len(self._requests) // MOST_LOOKED_AT)
        seen: dict[str, set[bool]] = {}
        for file in self._requests[::step]:
            for field in files.schema_of(self.raw, file.path):
                kind = field.type.value_type if pa.types.is_list(field.type) else field.type
                values = seen.setdefault(field.name, set())
                if not pa.types.is_null(kind):
                    values.add(pa.types.is_integer(kind))
        declared = [feature.name for feature in self._stored()]
        declared += [f"history_{feature.name}" for feature in self._events_stored()]
        for name in declared:
            if name not in seen:
                raise DataError(f"{self.raw}: the requests of the log have no {name!r}{near_miss(name, set(seen))}")
        return {name: values == {True} and name not in self.config.text_columns for name, values in seen.items()}

    # ---- canonical tables
    def _kept(self, table: pa.Table, end_ms: int) -> pa.Table:
        if self.config.unfinished == "drop":
            table = self._without(table, pc.greater(table["time_ms"], end_ms - self._window_ms),
                                  "requests are so new that events of theirs may be missing (unfinished: drop)")
        if self.config.degraded == "drop":
            table = self._without(table, table["served_degraded"],
                                  "requests were answered without one of the stages (degraded: drop)")
        return table

    def _without(self, table: pa.Table, left_out: pa.ChunkedArray, reason: str) -> pa.Table:
        kept = table.filter(pc.invert(left_out))
        if len(kept) < len(table):
            self.notes[reason] += len(table) - len(kept)
        return kept

    def _canonical(self, table: pa.Table, feedback: Feedback, where: str) -> pa.Table:
        columns: dict[str, pa.Array] = {
            "request_id": table["request_id"].combine_chunks(),
            "user_id": self._ids(table["user_id"].combine_chunks(), "user_id", where),
            "time_ms": table["time_ms"].combine_chunks()}
        columns |= self._candidates(table, feedback, where)
        for feature in self._stored():
            columns[feature.name] = self._feature(table, feature.name, feature, where)
        if self.schema().history:
            columns |= self._history(table, where)
        if self.config.exclude == "keep" and "exclude" in table.column_names:
            columns["exclude"] = self._id_lists(table, "exclude", where)
        return pa.table(columns)

    def _candidates(self, table: pa.Table, feedback: Feedback, where: str) -> dict[str, pa.Array]:
        lists = Lists.of(table, where=where)
        if self.config.missing_items == "drop":
            gone_C = self._gone(lists, where)
            if gone_C.any():
                self.notes["candidates are not in the catalogue any more (missing_items: drop)"] += int(gone_C.sum())
                lists = lists.without(gone_C)
        lists = lists.sampled(table["request_id"], self.config.per_level)
        rows_C = table["row"].to_numpy()[lists.owner_C]
        labels = {name: feedback.label(name, where, rows_C, lists.items, lists.exposed_C)
                  for name in self.config.labels}
        columns = {"candidates": self._ids(lists.items, "candidates", where), "reached": lists.reached_C,
                   "rank": lists.rank_C, "exposed": lists.exposed_C, **labels}
        if self.config.gains:
            columns["relevance"] = lists.relevance(labels, self.config.gains)
        return {name: lists.column(values) for name, values in columns.items()}

    def _gone(self, lists: Lists, where: str) -> np.ndarray:
        logged, known = lists.items.type, self._catalogue.values.type
        if len(lists.items) and pa.types.is_integer(logged) != pa.types.is_integer(known):
            raise DataError(f"{where}: candidates are {logged}, but item_id of the catalogue is {known}; cast it to "
                            "what the training log of the served bundle had")
        return lists.unknown(self._catalogue)

    def _history(self, table: pa.Table, where: str) -> dict[str, pa.Array]:
        columns = {"history": self._id_lists(table, "history", where)}
        lengths_Q = Ragged.from_arrow(columns["history"]).lengths_Q
        if "history_time_ms" in table.column_names:
            columns["history_time_ms"] = _padded(table["history_time_ms"], lengths_Q, pa.int64())
        for feature in self._events_stored():
            name = f"history_{feature.name}"
            lists = Ragged.from_arrow(self._column(table, name, many=True))
            flat = pa.table({name: lists.values})
            values = lists.with_values(self._feature(flat, name, feature, where))
            columns[name] = _padded(values.to_arrow(), lengths_Q, values.values.type)
        return columns

    def _feature(self, table: pa.Table, name: str, feature: Feature, where: str) -> pa.Array:
        """A raw column in the type that its feature is fitted on, the same in every file."""
        column = self._column(table, name, many=feature.kind == "ids")
        if not isinstance(feature, IdFeature):
            return _columns.feature_column(column, feature, SEPARATOR, where=where)
        if feature.kind == "ids":
            lists = Ragged.from_arrow(column)
            return lists.with_values(self._ids(lists.values, name, where)).to_arrow()
        return self._ids(column, name, where)

    def _column(self, table: pa.Table, name: str, *, many: bool) -> pa.Array:
        """A column; all null in a file that is older than the feature."""
        if name in table.column_names:
            return table[name].combine_chunks()
        return pa.nulls(len(table), pa.list_(pa.null()) if many else pa.null())

    def _id_lists(self, table: pa.Table, name: str, where: str) -> pa.Array:
        lists = Ragged.from_arrow(self._column(table, name, many=True))
        return lists.with_values(self._ids(lists.values, name, where)).to_arrow()

    def _ids(self, values: pa.Array, name: str, where: str) -> pa.Array:
        whole = self._whole_numbers.get(name, False)
        if whole and pa.types.is_string(values.type):
            raise DataError(f"{where}: {name!r} holds text, in other files whole numbers; add it to text_columns")
        if not whole and pa.types.is_integer(values.type) and name not in self.config.text_columns:
            raise DataError(f"{where}: {name!r} holds whole numbers, in other files text; add it to text_columns")
        return values.cast(pa.int64() if whole else pa.string())


def _padded(column: "pa.Array | pa.ChunkedArray", lengths_Q: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Lists as long as others; where they are not, all null: such requests bring none."""
    lists = Ragged.from_arrow(column)
    same_Q = lists.lengths_Q == lengths_Q
    if same_Q.all():
        return lists.with_values(lists.values.cast(kind)).to_arrow()
    starts, values = lists.offsets_Q1[:-1], []
    for start, length, same in zip(starts, lengths_Q, same_Q, strict=True):
        values.append(lists.values.slice(start, length).cast(kind) if same else pa.nulls(int(length), kind))
    return Ragged(pa.concat_arrays(values), lengths_Q).to_arrow()
