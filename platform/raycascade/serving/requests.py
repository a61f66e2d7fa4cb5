"""The door for raw requests: what a caller sends becomes canonical columns of the training log's types, or a DataError.

Batch scoring reads Parquet columns (`checked`), serving reads JSON (`Query` and `table_of`); both end in
`Bundle.encode`, so the same request gets the same answer.
"""

from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field as Option,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

from raycascade.bundle import Bundle
from raycascade.errors import DataError
from raycascade.features import FeatureState
from raycascade.past import moments
from raycascade.schema import (
    FIRST_ROW,
    ClockFeature,
    DenseFeature,
    Feature,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    VectorFeature,
    near_miss,
)

Whole = Annotated[StrictInt, Option(ge=-(1 << 63), lt=1 << 63)]
Id = Whole | Annotated[StrictStr, Option(min_length=1, max_length=512)]
Finite = Annotated[StrictFloat, Option(allow_inf_nan=False)]
Value = StrictBool | Whole | Finite | StrictStr | list[Whole | Finite | StrictStr] | None
Name = Annotated[StrictStr, Option(min_length=1, max_length=256)]
MOST_ITEMS = 10_000  # of a history or an exclusion list
MOST_DIGITS = 20  # of a number of 64 bits, its sign included


class Event(BaseModel):
    """An item of the user's past with what is known of the event."""

    model_config = ConfigDict(extra="forbid")
    item_id: Id
    time_ms: Annotated[StrictInt, Option(ge=0, lt=1 << 53)] | None = None
    features: dict[Name, Value] = Option(default_factory=dict)


def _as_event(value: Any) -> Any:
    """A bare id is an event of which nothing else is known."""
    return value if isinstance(value, dict | Event) else {"item_id": value}


Past = Annotated[Event, BeforeValidator(_as_event, json_schema_input_type=Id | Event)]


class Query(BaseModel):
    """One request for recommendations. What it does not say comes from the bundle's users table."""

    model_config = ConfigDict(extra="forbid")
    user_id: Id
    k: Annotated[StrictInt, Option(ge=1)] | None = None  # None: as many as the last stage keeps
    exclude: list[Id] = Option(default_factory=list, max_length=MOST_ITEMS)  # item ids
    context: dict[Name, Value] = Option(default_factory=dict)
    features: dict[Name, Value] = Option(default_factory=dict)  # of the user
    history: Annotated[list[Past], Option(max_length=MOST_ITEMS)] | None = None  # oldest first; bare ids will do
    time_ms: Annotated[StrictInt, Option(ge=0, lt=1 << 53)] | None = None
    deadline_ms: Annotated[StrictInt, Option(ge=1, le=60_000)] | None = None  # None: what the server's options say
    trace: StrictBool = False


# ---------------------------------------------------------------- JSON
def table_of(query: Query, bundle: Bundle, *, request_id: str) -> pa.Table:
    """The query as one raw canonical row; DataError names the field that is not as the log has it."""
    state, keys = bundle.state, bundle.items.keys.type
    columns: dict[str, pa.Array] = {"request_id": pa.array([request_id]), "user_id": user_of(query.user_id, bundle)}
    if query.time_ms is not None:
        columns["time_ms"] = pa.array([query.time_ms], pa.int64())
    if query.exclude:
        columns["exclude"] = pa.array([ids_as(query.exclude, keys)], pa.list_(keys))
    for group, side, values in (("context", "context", query.context), ("features", "user", query.features)):
        known = {f.name: f for f in state.schema.side(side) if not isinstance(f, ClockFeature | HistoryFeature)}
        for name, value in values.items():
            if name not in known:
                raise DataError(f"{group}.{name}: no such {side} feature{near_miss(name, set(known))}")
            columns[name] = column_of([value], known[name], state, where=f"{group}.{name}")
    if query.history is not None:
        columns |= _history(query.history, bundle)
    return pa.table(columns)


def user_of(user_id: int | str, bundle: Bundle) -> pa.Array:
    """The user's id in the type of the training log where it can be one, else as it is (a user nobody knows)."""
    kind = bundle.users.table["user_key"].type
    (typed,) = ids_as([user_id], kind)
    return pa.array([user_id]) if typed is None else pa.array([typed], kind)


def ids_as(values: "list[Any]", kind: pa.DataType) -> list[Any]:
    """Ids as a column's type; None, which is an unknown id, for those that cannot be one."""
    if not pa.types.is_integer(kind):
        return [None if value is None else str(value) for value in values]
    bound = 1 << (kind.bit_width - 1)
    typed = [_whole(value) for value in values]
    return [value if value is not None and -bound <= value < bound else None for value in typed]


def _whole(value: Any) -> int | None:
    if isinstance(value, int):
        return int(value)  # a bool is a number to Python, and none to Arrow
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and value.isascii() and len(value) <= MOST_DIGITS:
        return int(value)
    return None


def _history(past: list[Event], bundle: Bundle) -> dict[str, pa.Array]:
    """`history`, `history_time_ms` and a column per event feature that any event brings."""
    keys = bundle.items.keys.type
    columns = {"history": pa.array([ids_as([event.item_id for event in past], keys)], pa.list_(keys))}
    if any(event.time_ms is not None for event in past):
        columns["history_time_ms"] = pa.array([[event.time_ms or 0 for event in past]], pa.list_(pa.int64()))
    sent = IdFeature | DenseFeature | VectorFeature
    known = {f.name: f for f in bundle.state.schema.side("event") if isinstance(f, sent)}
    for name in dict.fromkeys(name for event in past for name in event.features):
        if name not in known:
            raise DataError(f"history.features.{name}: no such event feature{near_miss(name, set(known))}")
        values = [event.features.get(name) for event in past]
        flat = column_of(values, known[name], bundle.state, where=f"history.features.{name}")
        columns[f"history_{name}"] = pa.ListArray.from_arrays(pa.array([0, len(past)], pa.int32()), flat)
    return columns


def column_of(values: "list[Any]", feature: Feature, state: FeatureState, *, where: str) -> pa.Array:
    """JSON values of one feature as a raw column; an id that the log's type cannot hold is unknown."""
    many = isinstance(feature, IdsFeature | VectorFeature)
    for value in values:
        inner = value if isinstance(value, list) else [value]
        numeric = isinstance(feature, DenseFeature | VectorFeature)
        fits = [isinstance(one, int | float) if numeric else isinstance(one, int | str) for one in inner]
        if value is not None and (isinstance(value, list) != many or not all(fits)):
            one_of = "a number" if numeric else "an id"
            expected = f"a list of {one_of.split()[1]}s" if many else one_of
            raise DataError(f"{where}: expected {expected} for {feature.kind} feature {feature.name!r}, got {value!r}")
    if isinstance(feature, DenseFeature):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if isinstance(feature, VectorFeature):
        return pa.array([None if v is None else [float(one) for one in v] for v in values], pa.list_(pa.float32()))
    assert isinstance(feature, IdFeature), feature
    kind = _id_type(values, state, feature)
    if many:
        return pa.array([None if value is None else ids_as(value, kind) for value in values], pa.list_(kind))
    return pa.array(ids_as(values, kind), kind)


def _id_type(values: "list[Any]", state: FeatureState, feature: IdFeature) -> pa.DataType:
    """The log's type; a hashed vocabulary does not hold it, so there the values say themselves what they are."""
    vocabulary = state.vocabularies[feature.vocabulary or feature.name]
    if vocabulary.buckets is None:
        kind = vocabulary.values.type
        return pa.int64() if pa.types.is_boolean(kind) or pa.types.is_null(kind) else kind
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return pa.string() if any(isinstance(one, str) for one in flat) else pa.int64()


# ---------------------------------------------------------------- columns
def needed(schema_names: "list[str]", bundle: Bundle) -> list[str]:
    """The columns of a raw requests table that recommending reads."""
    features = {f.name for f in bundle.state.schema.side("user", "context")}
    events = {f"history_{f.name}" for f in bundle.state.schema.side("event")}
    wanted = {"request_id", "user_id", "time_ms", "exclude", "history", "history_time_ms"} | features | events
    wanted |= set() if bundle.cascade.searches else {"candidates"}
    return [name for name in schema_names if name in wanted]


def checked(requests: pa.Table, bundle: Bundle, *, where: str) -> pa.Table:
    """Raw requests with ids and times in the types of the training log; DataError names column and row."""
    if "user_id" not in requests.column_names:
        raise DataError(f"{where}: column 'user_id' is missing{near_miss('user_id', set(requests.column_names))}")
    if requests["user_id"].null_count:
        row, count = int(np.argmax(requests["user_id"].is_null().to_numpy())), requests["user_id"].null_count
        raise DataError(f"{where}: user_id is null in row {row} ({count} such); drop these rows")
    casts = {"user_id": bundle.users.table["user_key"].type, "time_ms": pa.int64()}
    names = ("history", "exclude") if bundle.cascade.searches else ("history", "exclude", "candidates")
    lists = {name: pa.list_(bundle.items.keys.type) for name in names}
    for name, kind in {**casts, **lists, "history_time_ms": pa.list_(pa.int64())}.items():
        if name in requests.column_names:
            position = requests.column_names.index(name)
            typed = _cast(requests[name], kind, where=f"{where}: column {name!r}")
            requests = requests.set_column(position, name, typed)
    if "time_ms" in requests.column_names:
        filled = pc.coalesce(requests["time_ms"], pa.array(moments(requests, bundle.state.as_of_ms)))
        requests = requests.set_column(requests.column_names.index("time_ms"), "time_ms", filled)
    if "candidates" in lists and "candidates" in requests.column_names:
        _refuse_unknown_items(requests["candidates"], bundle, where=where)
    return requests


def _refuse_unknown_items(candidates: pa.ChunkedArray, bundle: Bundle, *, where: str) -> None:
    """An item to rank that the catalogue does not have would be left out of the answer in silence."""
    values = pc.list_flatten(candidates).combine_chunks()
    unknown = np.flatnonzero(bundle.state.item_ids.lookup(values) < FIRST_ROW)
    if len(unknown):
        raise DataError(f"{where}: candidate {values[int(unknown[0])]} is not in the bundle's catalogue "
                        f"({len(unknown)} such); leave it out, or prepare and train with it")


def _cast(column: pa.ChunkedArray, kind: pa.DataType, *, where: str) -> pa.ChunkedArray:
    if pa.types.is_temporal(column.type):
        raise DataError(f"{where} must be int64 Unix milliseconds, got {column.type}; cast it")
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"{where} must hold {kind} as the training log does, got {column.type}; cast it") from None
