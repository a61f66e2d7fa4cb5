"""Queries, and what the user store holds of their users, as encoded requests of the bundle that is served.

What a query brings itself wins over the store, the store over the bundle's users table. Events of the store continue
the history of the users table, unless they are the whole history of a user: the encoded request is then the one that a
query with the whole history would have given.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raycascade.bundle import Bundle
from raycascade.features import FeatureState
from raycascade.past import TIMES, known_ms
from raycascade.ragged import Ragged
from raycascade.schema import ClockFeature, HistoryFeature
from raycascade.serving.answers import UserSource
from raycascade.serving.requests import Event, Query, table_of
from raycascade.serving.users import PastEvent, RawId, UserState, event_features, fits


class Encoded(NamedTuple):
    """Encoded requests, one a query, in their order. `raw`: the canonical rows that were encoded, without what the
    bundle's users table adds. `known`: whether the store or the training log holds the user."""

    table: pa.Table
    raw: tuple[pa.Table, ...]
    sources: tuple[UserSource, ...]
    known: tuple[bool, ...]


def encode_queries(
    queries: Sequence[Query], states: Sequence[UserState | None] | None, bundle: Bundle, *,
    request_ids: Sequence[str],
) -> Encoded:
    """`states`: what the store says of each query's user, None where it was not available; then histories that the
    queries do not bring are empty. DataError for a query that does not fit the bundle."""
    held = [None] * len(queries) if states is None else list(states)
    raw = []
    for query, state, request_id in zip(queries, held, request_ids, strict=True):
        filled = query if state is None else completed(query, state, bundle)
        if states is None and query.history is None:
            filled = query.model_copy(update={"history": []})
        raw.append(table_of(filled, bundle, request_id=request_id))
    rows_Q = np.array([bundle.users.rows(one["user_id"])[0] for one in raw], np.int64)
    known = tuple(bool(row >= 0 or state is not None) for row, state in zip(rows_Q, held, strict=True))
    continues_Q = np.array([query.history is None and state is not None and bool(state.events) and not state.whole
                            for query, state in zip(queries, held, strict=True)], bool)
    table = _with_earlier_events(_encode_all(raw, bundle), np.where(continues_Q, rows_Q, -1), bundle)
    sources: list[UserSource] = [_source(query, known=one, available=states is not None)
                                 for query, one in zip(queries, known, strict=True)]
    return Encoded(table, tuple(raw), tuple(sources), known)


def _source(query: Query, *, known: bool, available: bool) -> UserSource:
    """Where the history, or all that is known of the user, comes from."""
    if query.history is not None:
        return "request"
    if not available:
        return "unavailable"
    if known:
        return "store"
    return "request" if query.features else "unknown"


def completed(query: Query, state: UserState, bundle: Bundle) -> Query:
    """The query with what the store holds and it does not bring itself. Values that the bundle's features cannot have,
    such as those of another bundle's, are left out."""
    known = {f.name: f for f in bundle.state.schema.side("user") if not isinstance(f, ClockFeature | HistoryFeature)}
    features = {name: value for name, value in state.features.items() if name in known and fits(value, known[name])}
    features |= {name: value for name, value in query.features.items() if value is not None or name not in features}
    changes: dict[str, object] = {"features": features}
    if query.history is None and (state.events or state.whole):
        changes["history"] = _history(state.events, bundle.state, before_ms=query.time_ms)
    exclude = [*query.exclude, *state.exclude, *(_seen_before(state, query.time_ms) if bundle.excludes_seen else ())]
    return query.model_copy(update=changes | {"exclude": list(dict.fromkeys(exclude))})


def _seen_before(state: UserState, moment_ms: int | None) -> list[RawId]:
    """What the user has seen strictly before a moment; all of it where the query names none."""
    return [item_id for item_id, first_ms in state.seen if moment_ms is None or first_ms < moment_ms]


def _history(events: Sequence[PastEvent], state: FeatureState, *, before_ms: int | None) -> list[Event]:
    """As many of the newest events as the models see; those at or after the moment would be left out behind them."""
    if before_ms is not None:
        events = [event for event in events if event.time_ms < before_ms]
    known = event_features(state)
    history_len = state.space.history_len
    return [Event.model_construct(item_id=event.item_id, time_ms=event.time_ms or None, features={
        name: value for name, value in event.features.items() if name in known and fits(value, known[name])})
        for event in events[max(0, len(events) - history_len):]]


# ---------------------------------------------------------------- encoded tables
def _encode_all(raw: Sequence[pa.Table], bundle: Bundle) -> pa.Table:
    """Raw rows encoded together where their columns are the same, so that each is encoded as it would be alone."""
    groups: dict[pa.Schema | str, list[int]] = {}
    for position, one in enumerate(raw):
        groups.setdefault(one.schema.to_string(), []).append(position)
    encoded = [bundle.encode(pa.concat_tables([raw[position] for position in group])) for group in groups.values()]
    if len(encoded) == 1:
        return encoded[0]
    fields: dict[str, pa.DataType] = {}
    for part in encoded:
        for column in part.schema:
            other = fields.setdefault(column.name, column.type)
            if column.name == "user_key" and other != column.type:
                fields["user_key"] = pa.string()  # users that nobody knows, whose ids are not of the log's type
    parts = [pa.table({name: part[name].cast(kind) if name in part.column_names else _empty_lists(len(part), kind)
                       for name, kind in fields.items()}) for part in encoded]
    order = np.argsort([position for group in groups.values() for position in group])
    return pa.concat_tables(parts).combine_chunks().take(pa.array(order))


def _empty_lists(count: int, kind: pa.DataType) -> pa.Array:
    """What a column that not every request has, of excluded items or of times of events, holds for the others."""
    assert pa.types.is_list(kind), kind
    return pa.array([[]] * count, kind)


def _with_earlier_events(encoded: pa.Table, rows_Q: np.ndarray, bundle: Bundle) -> pa.Table:
    """Encoded requests whose history continues that of a user of the users table: `rows_Q`, -1 for the others."""
    users = bundle.users.table
    which = np.flatnonzero(rows_Q >= 0)
    if len(which) == 0 or "history" not in users.column_names or "history" not in encoded.column_names:
        return encoded
    names = [name for name in encoded.column_names if name == "history" or name in _parallel(bundle.state)]
    stored = users.select([name for name in names if name in users.column_names]).take(pa.array(rows_Q[which]))
    old, new = Ragged.from_arrow(stored["history"]), Ragged.from_arrow(encoded["history"])
    old_times, new_times = _times(stored, old), _times(encoded, new)
    chosen, lengths_Q, begin = [], new.lengths_Q.copy(), len(old.values)
    for q, (start, stop) in enumerate(zip(new.offsets_Q1[:-1], new.offsets_Q1[1:], strict=True)):
        if rows_Q[q] < 0:
            chosen.append(np.arange(start, stop) + begin)
            continue
        at = int(np.searchsorted(which, q))
        past = slice(int(old.offsets_Q1[at]), int(old.offsets_Q1[at + 1]))
        order = _merged(old.values.to_numpy()[past], old_times[past], new.values.to_numpy()[start:stop],
                        new_times[start:stop])
        length = past.stop - past.start
        chosen.append(np.where(order < length, order + past.start, order - length + start + begin))
        lengths_Q[q] = len(order)
    flat = pa.array(np.concatenate(chosen))
    for name in names:
        if name == TIMES:
            values = pa.array(np.concatenate([old_times, new_times]))
        else:
            fresh = Ragged.from_arrow(encoded[name]).values
            values = pa.concat_arrays([Ragged.from_arrow(stored[name]).values.cast(fresh.type), fresh])
        column = Ragged(values.take(flat), lengths_Q).to_arrow()
        encoded = encoded.set_column(encoded.column_names.index(name), name, column)
    return encoded


def _parallel(state: FeatureState) -> set[str]:
    """The encoded columns beside `history` that hold a value for each event."""
    own = {f"history_{name}" for name in event_features(state)}
    return {TIMES} | own | {f"{name}_missing" for name in own}


def _times(table: pa.Table, history: Ragged) -> np.ndarray:
    """The time of every event, 0 where it is not known: null, or of a history without times."""
    times = np.zeros(len(history.values), np.int64)
    if TIMES in table.column_names:
        lists = Ragged.from_arrow(table[TIMES])
        same_Q = lists.lengths_Q == history.lengths_Q
        values = np.maximum(known_ms(lists.values), 0)
        times[np.repeat(same_Q, history.lengths_Q)] = values[np.repeat(same_Q, lists.lengths_Q)]
    return times


def _merged(old_rows: np.ndarray, old_ms: np.ndarray, new_rows: np.ndarray, new_ms: np.ndarray) -> np.ndarray:
    """Positions in old followed by new, in order of time: the old ones in their order, before new ones of the same
    moment. New events that are among the old ones already, of the same item and moment, are left out: a bundle that was
    trained later knows them."""
    held = {(row, ms) for row, ms in zip(old_rows.tolist(), old_ms.tolist(), strict=True) if ms > 0}
    fresh = np.array([(row, ms) not in held for row, ms in zip(new_rows.tolist(), new_ms.tolist(), strict=True)], bool)
    order = np.argsort(np.concatenate([np.maximum.accumulate(old_ms), new_ms]), kind="stable")
    return order[np.concatenate([np.ones(len(old_rows), bool), fresh])[order]]
