"""Served requests as rows of the traffic log: raw canonical requests over everything that the stages let through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raycascade.bundle import Bundle
from raycascade.ragged import Ragged
from raycascade.schema import FIRST_ROW, ClockFeature, HistoryFeature
from raycascade.serving.encoded import raw_column
from raycascade.serving.requests import ids_as
from raycascade.serving.stages import Survivors
from raycascade.serving.users import NewEvent, event_features

MOST_RANK = np.iinfo(np.int16).max


@dataclass(frozen=True)
class TrafficRecord:
    """One served request. `encoded` is what the models saw, `raw` what it was made of, one row each; `survivors` are
    those of the stages that answered, by name, each for this request alone. `shown_rows`: item rows of the answer, in
    its order."""

    request_id: str
    user_id: int | str
    time_ms: int  # the moment that the request is about: its own `time_ms`, or when it came
    served_at_ms: int
    bundle: Bundle
    encoded: pa.Table
    raw: pa.Table
    survivors: Mapping[str, Survivors]
    shown_rows: np.ndarray
    degraded: bool = False
    user_source: str = ""


def request_rows(records: Sequence[TrafficRecord]) -> pa.Table:
    """Records that one bundle has answered -> rows of the log. Users whose ids cannot be of the training log's type are
    left out, since a log has one type."""
    bundle = records[0].bundle
    assert all(record.bundle is bundle for record in records), "one bundle"
    kind = _wide(bundle.users.table["user_key"].type)
    user_ids = ids_as([record.user_id for record in records], kind)
    kept = [record for record, user_id in zip(records, user_ids, strict=True) if user_id is not None]
    columns: dict[str, Any] = {
        "request_id": pa.array([record.request_id for record in kept], pa.string()),
        "user_id": pa.array([user_id for user_id in user_ids if user_id is not None], kind),
        "time_ms": pa.array([record.time_ms for record in kept], pa.int64()),
        **_candidates(kept, bundle),
    }
    encoded = pa.concat_tables([_input_columns(record.encoded) for record in kept],
                               promote_options="default") if kept else None
    if encoded is not None:
        columns |= _features(kept, encoded, bundle) | _history(kept, encoded, bundle)
    return pa.table(columns | {
        "served_at_ms": pa.array([record.served_at_ms for record in kept], pa.int64()),
        "served_version": pa.array([bundle.version] * len(kept), pa.string()),
        "served_stages": pa.array([list(bundle.cascade.names)] * len(kept), pa.list_(pa.string())),
        "served_degraded": pa.array([record.degraded for record in kept], pa.bool_()),
        "served_user": pa.array([record.user_source for record in kept], pa.string()),
    })


def event_row(event: NewEvent, *, now_ms: int, features: str) -> dict[str, Any]:
    """An event that came at `now_ms`; `features` is its features as JSON."""
    return {"event_id": event.event_id, "user_id": str(event.user_id), "item_id": str(event.item_id),
            "time_ms": now_ms if event.time_ms is None else event.time_ms,
            "request_id": event.request_id, "features": features, "served_at_ms": now_ms}


# ---------------------------------------------------------------- candidates
def _candidates(records: Sequence[TrafficRecord], bundle: Bundle) -> dict[str, pa.Array]:
    """Every item once, with the deepest level that it reached; best first, the deepest level first."""
    parts = [_levels(record, bundle.cascade.names) for record in records]
    lengths_Q = np.array([len(part[0]) for part in parts], np.int64)
    rows, reached, rank, score = (np.concatenate([part[i] for part in parts]) if parts else np.zeros(0, int)
                                  for i in range(4))
    lists = {
        "candidates": bundle.items.keys.take(pa.array(rows.astype(np.int64) - FIRST_ROW)),
        "reached": pa.array(reached.astype(np.int8)), "rank": pa.array(rank.astype(np.int16)),
        "exposed": pa.array(reached == len(bundle.cascade.names) + 1),
        "served_score": pa.array(score.astype(np.float32)),
    }
    return {name: Ragged(values, lengths_Q).to_arrow() for name, values in lists.items()}


def _levels(record: TrafficRecord, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Item rows, levels, ranks within the level (from 1) and scores of the deepest stage that let each through."""
    answered = [(level, record.survivors[name]) for level, name in reversed(list(enumerate(names, start=1)))
                if name in record.survivors]
    shown = record.shown_rows.astype(np.int64)
    groups = [shown, *(survivors.rows_QK[0].astype(np.int64) for _, survivors in answered)]
    rows = np.concatenate(groups)
    level = np.repeat([len(names) + 1, *(level for level, _ in answered)], [len(group) for group in groups])
    scores = np.concatenate([np.full(len(shown), np.nan, np.float32), *(one.scores_QK[0] for _, one in answered)])
    found, first_scored = np.unique(rows[len(shown):], return_index=True)
    real = np.flatnonzero(rows >= FIRST_ROW)
    _, first = np.unique(rows[real], return_index=True)
    kept = real[np.sort(first)]
    rows, level, score = rows[kept], level[kept], scores[kept]
    begins = np.concatenate([[True], level[1:] != level[:-1]])[:len(level)]
    places = np.arange(len(level))
    rank = places - np.maximum.accumulate(np.where(begins, places, 0)) + 1
    if len(found):  # what was shown has the score of the stage that chose it
        at = np.minimum(np.searchsorted(found, rows), len(found) - 1)
        score = np.where(found[at] == rows, scores[len(shown) + first_scored[at]], score)
    return rows, level, np.minimum(rank, MOST_RANK), score


# ---------------------------------------------------------------- what was known of the user
def _input_columns(encoded: pa.Table) -> pa.Table:
    """Without the columns that the rows say themselves; the user's id can be of several types."""
    own = {"request_id", "user_key", "time_ms", "candidates"}
    return encoded.select([name for name in encoded.column_names if name not in own])


def _features(records: Sequence[TrafficRecord], encoded: pa.Table, bundle: Bundle) -> dict[str, pa.Array]:
    """User and context features: as they were sent or stored, else what the encoded row says of them."""
    columns: dict[str, pa.Array] = {}
    for feature in bundle.state.schema.side("user", "context"):
        if isinstance(feature, ClockFeature | HistoryFeature) or feature.name == "user_id":
            continue
        sent = _stacked([record.raw for record in records], feature.name)
        columns[feature.name] = _either(sent, raw_column(encoded, feature, bundle.state))
    return columns


def _history(records: Sequence[TrafficRecord], encoded: pa.Table, bundle: Bundle) -> dict[str, pa.Array]:
    """The history that the models saw, and what must not be recommended. Events of items that the catalogue does not
    hold are left out."""
    columns: dict[str, pa.Array] = {}
    if "exclude" in encoded.column_names:
        columns["exclude"] = _ids(Ragged.from_arrow(encoded["exclude"]), bundle)[0].to_arrow()
    if bundle.state.schema.history is None:
        return columns
    past = Ragged.from_arrow(encoded["history"])
    history, known = _ids(past, bundle)
    columns["history"] = history.to_arrow()
    raw = [record.raw for record in records]
    whole_Q = _same_length(raw, past.lengths_Q)
    if "history_time_ms" in encoded.column_names:
        columns["history_time_ms"] = _events(encoded["history_time_ms"], past, history, known)
    for name, feature in event_features(bundle.state).items():
        decoded = _as_lists(raw_column(encoded, feature, bundle.state, prefix="history_"), past)
        sent = _stacked([one if whole else None for one, whole in zip(raw, whole_Q, strict=True)], f"history_{name}")
        columns[f"history_{name}"] = _events(_either(sent, decoded), past, history, known)
    return columns


def _ids(lists: Ragged, bundle: Bundle) -> tuple[Ragged, np.ndarray]:
    """Item ids of lists of item rows without those that are no items, and which of the values are items."""
    rows = lists.values.to_numpy(zero_copy_only=False).astype(np.int64)
    known = rows >= FIRST_ROW
    owner = np.repeat(np.arange(len(lists.lengths_Q)), lists.lengths_Q)
    lengths_Q = np.bincount(owner[known], minlength=len(lists.lengths_Q))
    return Ragged(bundle.items.keys.take(pa.array(rows[known] - FIRST_ROW)), lengths_Q), known


def _events(column: "pa.Array | pa.ChunkedArray", past: Ragged, history: Ragged, known: np.ndarray) -> pa.Array:
    """A list parallel to the history, without the events that are left out; empty where a request has none."""
    lists = Ragged.from_arrow(column)
    same_Q = lists.lengths_Q == past.lengths_Q
    kept = known[np.repeat(same_Q, past.lengths_Q)] & True
    at = np.flatnonzero(np.repeat(same_Q, lists.lengths_Q))[kept]
    filled = Ragged(lists.values.take(pa.array(at)), np.where(same_Q, history.lengths_Q, 0))
    if same_Q.all():
        return filled.to_arrow()
    nothing = pa.nulls(int(history.lengths_Q[~same_Q].sum()), lists.values.type)
    places = np.argsort(np.concatenate([np.flatnonzero(np.repeat(same_Q, history.lengths_Q)),
                                        np.flatnonzero(np.repeat(~same_Q, history.lengths_Q))]))
    return history.with_values(pa.concat_arrays([filled.values, nothing]).take(pa.array(places))).to_arrow()


def _as_lists(column: pa.Array, past: Ragged) -> pa.Array:
    """Lists as long as the history; all null where the encoded request has no such column."""
    return past.with_values(pa.nulls(len(past.values))).to_arrow() if pa.types.is_null(column.type) else column


def _same_length(raw: Sequence[pa.Table], lengths_Q: np.ndarray) -> list[bool]:
    """Where the raw history is the whole one: events of a store may only continue what the users table holds."""
    sent = _stacked(raw, "history")
    return (Ragged.from_arrow(sent).lengths_Q == lengths_Q).tolist() if sent is not None else [False] * len(raw)


# ---------------------------------------------------------------- columns of several requests
def _stacked(tables: "Sequence[pa.Table | None]", name: str) -> pa.Array | None:
    """One column of several one-row tables, null where a table has none; None where no table has any. Values of several
    types, as those of hashed ids, become text."""
    there = [table[name].combine_chunks() if table is not None and name in table.column_names else None
             for table in tables]
    there = [None if one is None or _typeless(one.type) else one for one in there]
    kinds = {one.type for one in there if one is not None}
    if not kinds:
        return None
    kind = next(iter(kinds))
    if len(kinds) > 1:
        kind = pa.list_(pa.string()) if pa.types.is_list(kind) else pa.string()
    return pa.concat_arrays([pa.nulls(1, kind) if one is None else one.cast(kind) for one in there])


def _either(first: pa.Array | None, second: pa.Array) -> pa.Array:
    """The first where it is valid, else the second, in the first one's type where the second has none of its own."""
    if first is None:
        return second
    if _typeless(second.type):
        second = second.cast(first.type)
    both = pa.concat_arrays([first, second.cast(first.type) if second.type != first.type else second])
    valid = first.is_valid().to_numpy(zero_copy_only=False)
    return both.take(pa.array(np.where(valid, np.arange(len(first)), len(first) + np.arange(len(first)))))


def _typeless(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or (pa.types.is_list(kind) and pa.types.is_null(kind.value_type))


def _wide(kind: pa.DataType) -> pa.DataType:
    return pa.int64() if pa.types.is_integer(kind) else pa.string()


