"""What a log contains: the features a user declares, and the fields a model sees once they are fitted.

`FeatureSchema` is declared by a dataset or in YAML. Fitting it (features.py) resolves every feature to one or more
`Field`s with table sizes; their collection, `FeatureSpace`, is all that a model knows about the data.

Rows of every embedding table: 0 is padding, 1 is unknown (or missing), values start at 2.
"""

import hashlib
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field as Option, model_validator

from raycascade.errors import ConfigError

PADDING, UNKNOWN, FIRST_ROW = 0, 1, 2
NUM_AGE_BUCKETS = 32

Side = Literal["user", "context", "item", "event"]
FieldSide = Literal["request", "item", "pair", "event"]


class Frozen(BaseModel):
    """Immutable, strict about unknown keys; the base of everything that is read from YAML or JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class IdFeature(Frozen):
    """One category per row: a fitted vocabulary, or a hash where `buckets` is set or the values exceed `max_values`."""

    kind: Literal["id"] = "id"
    name: str
    side: Side
    vocabulary: str = ""  # features that name the same vocabulary share it; empty: the feature's own name
    buckets: int | None = Option(default=None, ge=1)
    max_values: int = Option(default=2_000_000, ge=1)
    min_count: int = Option(default=1, ge=1)


class IdsFeature(IdFeature):
    """Several categories per row (tags); at most `max_len` are read, in their order, and `pool` is what models make of
    them. `given`: the rows come encoded, as those of semantic ids; no log holds them. They are made from the
    vector feature `content`, with the rows of the id features `added` behind them."""

    kind: Literal["ids"] = "ids"  # pyright: ignore[reportIncompatibleVariableOverride]
    max_len: int = Option(default=8, ge=1)
    pool: Literal["mean", "sum"] = "mean"
    given: bool = False
    content: str = ""
    added: tuple[str, ...] = ()


class DenseFeature(Frozen):
    """One number per row. null is missing (0 after normalisation, with an indicator field); NaN is refused."""

    kind: Literal["dense"] = "dense"
    name: str
    side: Side
    normalise: Literal["none", "standard", "log", "quantile"] = "standard"


class VectorFeature(Frozen):
    """A content vector of fixed width, L2-normalised when encoded, frozen in training. null is the zero vector."""

    kind: Literal["vector"] = "vector"
    name: str
    side: Side
    dim: int = Option(ge=1)


class CrossFeature(Frozen):
    """Hash of two or more id or ids features (user, context or item); missing if any part is missing.

    A part `history.<name>` stands for the history's newest `max_events`: for their item field <name>, or for their
    event feature <name>. With a part of several values the field has one value per combination.
    """

    kind: Literal["cross"] = "cross"
    name: str
    parts: tuple[str, ...] = Option(min_length=2)
    buckets: int = Option(default=1 << 18, ge=1)
    max_events: int = Option(default=10, ge=1)


class HistoryFeature(Frozen):
    """The user's past items, oldest first; the newest `max_len` are read. Events carry `fields` of the item side.

    Columns of the requests table: `history` (item ids), optional `history_time_ms`, and `history_<name>` for each
    feature of side `event`.
    """

    kind: Literal["history"] = "history"
    name: Literal["history"] = "history"
    side: Literal["user"] = "user"
    max_len: int = Option(default=50, ge=1)
    fields: tuple[str, ...] | None = None  # None: every static id and ids feature of the item side


class ClockFeature(Frozen):
    """Weekday (7), hour of the day (24) or minute of the hour (60) of a time in a fixed zone, as an id.

    Side context: the request's time. Side item: `source`, a column of the items table in Unix milliseconds. Clocks of
    one part that name the same `table` share its embedding.
    """

    kind: Literal["clock"] = "clock"
    name: str
    side: Literal["context", "item"] = "context"
    part: Literal["weekday", "hour", "minute"]
    utc_offset_hours: float = 0.0
    source: str = ""
    table: str = ""  # empty: the feature's own name

    @model_validator(mode="after")
    def _source_of_items(self) -> "ClockFeature":
        if (self.side == "item") != bool(self.source):
            raise ConfigError(f"schema: clock {self.name!r} of side {self.side} has source {self.source!r}; a clock of "
                              "side item needs a source, one of side context reads the request's time")
        return self


class AgeFeature(Frozen):
    """Time since `source` at the request's time, as an id: bucket min(31, floor(log2(1 + seconds))).

    Side item: `source` is a column of the items table in Unix milliseconds. Side event: the event's `history_time_ms`.
    """

    kind: Literal["age"] = "age"
    name: str
    side: Literal["item", "event"]
    source: str = "time_ms"


class CountFeature(Frozen):
    """How often an item was exposed, or got a label, before the request: strictly earlier buckets of `bucket_hours`.

    `label`: a label of the schema, or "exposure". `window_hours`: only the last so many hours; None counts from the
    start of the log. `rate`: divides by the exposures of the same window, smoothed towards the training rate with
    `smoothing` pseudo-exposures. Counts are log1p-transformed, then both are standardised. `relative`: the log1p of the
    catalogue's mean count at that moment is taken off, so that a busier or a thinner log does not move the feature.
    """

    kind: Literal["count"] = "count"
    name: str
    side: Literal["item"] = "item"
    label: str = "exposure"
    window_hours: int | None = Option(default=None, ge=1)
    rate: bool = False
    relative: bool = False
    smoothing: float = Option(default=20.0, gt=0)

    @model_validator(mode="after")
    def _one_way(self) -> "CountFeature":
        if self.rate and self.relative:
            raise ConfigError(f"schema: count {self.name!r} is both a rate and relative; a rate is relative already")
        return self


class MatchFeature(Frozen):
    """How many events of the history share the candidate's value of `field`; log1p, computed where tensors are made.

    `action` names an id feature of side event: only events with a value in `values` count. `rate` divides the matching
    events with the action by all matching events (0.5 pseudo-events of rate 0.5 each way).
    """

    kind: Literal["match"] = "match"
    name: str
    side: Literal["item"] = "item"
    field: str
    action: str | None = None
    values: tuple[str, ...] = ("1",)
    rate: bool = False


Feature = Annotated[
    IdFeature | IdsFeature | DenseFeature | VectorFeature | CrossFeature | HistoryFeature | ClockFeature | AgeFeature
    | CountFeature | MatchFeature,
    Option(discriminator="kind"),
]
OF_HISTORY = "history."  # in front of a part of a cross
RESERVED = {"request_id", "time_ms", "candidates", "reached", "rank", "relevance", "exclude", "history", "mask"}


class FeatureSchema(Frozen):
    """Everything a log contains: its features and its feedback labels (0 or 1 per logged candidate).

    `positive` is the label that counts as truth in catalogue metrics. Count features move on in buckets of
    `count_bucket_hours`, which begin at midnight of the zone `utc_offset_hours`.
    """

    features: tuple[Feature, ...]
    labels: tuple[str, ...] = ()
    positive: str = ""
    count_bucket_hours: int = Option(default=24, ge=1)
    utc_offset_hours: float = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> "FeatureSchema":
        names = [feature.name for feature in self.features] + list(self.labels)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"schema: {twice[0]!r} is declared twice; give each feature and label a name of its own")
        for feature in self.features:
            if feature.name in RESERVED and feature.kind != "history":
                raise ConfigError(f"schema: {feature.name!r} is a reserved column; rename the feature")
            on_events = not isinstance(feature, CrossFeature) and feature.side == "event"
            if on_events and feature.kind not in ("id", "dense", "age"):
                raise ConfigError(f"schema: event feature {feature.name!r} is of kind {feature.kind}; events carry id, "
                                  "dense and age features")
            self._check_references(feature)
        self._check_vocabularies()
        self._check_clock_tables()
        if self.positive and self.positive not in self.labels:
            raise ConfigError(f"schema: positive {self.positive!r} is not a label; labels are {list(self.labels)}")
        return self

    def _check_vocabularies(self) -> None:
        first: dict[str, IdFeature] = {}
        for feature in self.features:
            if isinstance(feature, IdFeature):
                other = first.setdefault(feature.vocabulary or feature.name, feature)
                for option in ("buckets", "max_values", "min_count"):
                    if getattr(feature, option) != getattr(other, option):
                        raise ConfigError(f"schema: {other.name!r} and {feature.name!r} share a vocabulary but differ "
                                          f"in {option}; give both the same, or vocabularies of their own")

    def _check_clock_tables(self) -> None:
        owners = {f.vocabulary or f.name: "id" for f in self.features if isinstance(f, IdFeature)}
        owners |= {f.name: "cross" for f in self.features if isinstance(f, CrossFeature)}
        owners |= {f.name: "age" for f in self.features if isinstance(f, AgeFeature)}
        for feature in self.features:
            if isinstance(feature, ClockFeature):
                table = feature.table or feature.name
                if owners.setdefault(table, feature.part) != feature.part:
                    raise ConfigError(f"schema: clock {feature.name!r} of part {feature.part} shares the table "
                                      f"{table!r} with a feature of {owners[table]}; name another table")

    def _check_references(self, feature: "Feature") -> None:
        ids = {f.name for f in self.features if f.kind in ("id", "ids")}
        if self.history is None and (isinstance(feature, MatchFeature) or getattr(feature, "side", "") == "event"):
            raise ConfigError(f"schema: feature {feature.name!r} reads the history, which is not there; add a feature "
                              "of kind history")
        if isinstance(feature, CrossFeature):
            own = {f.name for f in self.features if isinstance(f, IdFeature) and f.side != "event"}
            for part in feature.parts:
                _known(part, own | {f"{OF_HISTORY}{name}" for name in self._on_events()}, feature.name)
        elif isinstance(feature, CountFeature) and feature.label != "exposure":
            _known(feature.label, set(self.labels), feature.name)
        elif isinstance(feature, MatchFeature):
            _known(feature.field, ids & {f.name for f in self.side("item")}, feature.name)
            if feature.action is not None:
                _known(feature.action, ids & {f.name for f in self.side("event")}, feature.name)
        elif isinstance(feature, HistoryFeature):
            carried = {f.name for f in self.side("item") if f.kind in ("id", "ids", "vector")}
            for field in feature.fields or ():
                _known(field, carried, feature.name)

    def _on_events(self) -> set[str]:
        """Id and ids features that an event of the history has: its item's that it carries, and its own."""
        if self.history is None:
            return set()
        items = {f.name for f in self.side("item") if f.kind in ("id", "ids")}
        carried = items if self.history.fields is None else items & set(self.history.fields)
        return carried | {f.name for f in self.side("event") if f.kind == "id"}

    def side(self, *sides: str) -> Iterator["Feature"]:
        """The features of one or more sides, in declared order. A cross belongs to no side."""
        return (f for f in self.features if not isinstance(f, CrossFeature) and f.side in sides)

    @property
    def history(self) -> HistoryFeature | None:
        """The history feature, if the log has one."""
        return next((f for f in self.features if isinstance(f, HistoryFeature)), None)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change whenever any declaration changes."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def _known(name: str, known: set[str], owner: str) -> None:
    if name not in known:
        raise ConfigError(f"schema: feature {owner!r} refers to {name!r}, which is not there{near_miss(name, known)}")


def near_miss(name: str, known: "set[str] | list[str] | tuple[str, ...]") -> str:
    """'; did you mean X?' for a misspelt name, else '; known: ...'."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"


class Field(Frozen):
    """One input of a model. `side`: request (one value a request), item (one a candidate, function of the item and
    the time alone), pair (one a candidate, depends on the user too) or event (one a history event)."""

    name: str
    side: FieldSide
    form: Literal["id", "ids", "dense", "vector"]
    table: str = ""  # fields that name the same table share one embedding
    num_rows: int = 0  # rows of the table, padding and unknown included
    width: int = 1  # dense 1, vector its dimension, ids the most values
    pool: Literal["mean", "sum"] = "mean"  # what becomes of the values of ids
    values: tuple[str, ...] = ()  # of an event's id with few values: what they are as text, from row 2 on


class FeatureSpace(Frozen):
    """What models see: the resolved fields in schema order, and how long a history can be.

    `history_fields` names the item fields that history events carry besides the event fields.
    """

    fields: tuple[Field, ...]
    history_len: int = 0
    history_fields: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def of(self, *sides: str) -> tuple[Field, ...]:
        """The fields of one or more sides, in schema order."""
        return tuple(field for field in self.fields if field.side in sides)

    def __getitem__(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)

    def without(self, names: tuple[str, ...]) -> "FeatureSpace":
        """The same space without some fields; 'history' drops the history and its events, 'pair' all fields that
        depend on the user and the item together."""
        known = {field.name for field in self.fields} | {"history", "pair"}
        for name in names:
            if name not in known:
                raise ConfigError(f"exclude: {name!r} is not a feature{near_miss(name, known)}")
        dropped = {*names, *("event" for name in names if name == "history")}
        keep_history = "history" not in names
        return FeatureSpace(
            fields=tuple(f for f in self.fields if f.name not in dropped and f.side not in dropped),
            history_len=self.history_len if keep_history else 0,
            history_fields=tuple(n for n in self.history_fields if n not in names) if keep_history else (),
            labels=self.labels,
        )
