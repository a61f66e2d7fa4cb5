"""Impressions of one partition of users -> raw canonical requests, whose histories reach back before the request only.

Everything is a gather: the rows are sorted by user and time once, and every list of a request (its candidates, its
history, what was seen before) is then a range of the sorted rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade.errors import DataError
from raycascade.features import require_columns
from raycascade.keys import fold, to_keys
from raycascade.ragged import Ragged
from raycascade.schema import AgeFeature, ClockFeature, FeatureSchema, HistoryFeature

WHERE = "impressions"
MAX_LIST_VALUES = 4_000_000  # of the longest kind of list in one output table


def made_request_ids(
    by: Literal["day", "row"], user_id: pa.Array, time_ms: pa.Array, item_id: pa.Array, *, utc_offset_hours: float
) -> pa.Array:
    """Request ids for a log without any: one per user and day of a zone ("user-yyyymmdd"), or per user, moment and item
    ("user-time_ms-item", rows of which all three are equal share a request)."""
    user = user_id.cast(pa.string())
    if by == "row":
        return pc.binary_join_element_wise(user, time_ms.cast(pa.string()), item_id.cast(pa.string()), "-")
    local = pc.add(time_ms.cast(pa.int64()), round(utc_offset_hours * 3_600_000)).cast(pa.timestamp("ms"))
    day = pc.replace_substring(local.cast(pa.date32()).cast(pa.string()), "-", "")
    return pc.binary_join_element_wise(user, day, "-")


def check_duplicates(impressions: pa.Table, how: Literal["refuse", "drop"]) -> pa.Table:
    """The table without rows that equal an earlier one in every column (`drop`); DataError if any does (`refuse`)."""
    keys = fold([to_keys(impressions[name]) for name in ("user_id", "time_ms", "item_id")])
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(counts[inverse] > 1)  # the other columns are read only where user, time and item repeat
    if len(suspects) == 0:
        return impressions
    among = impressions.take(pa.array(suspects))
    whole = fold([_hash_column(among[name].combine_chunks()) for name in among.column_names])
    _, first = np.unique(whole, return_index=True)
    repeats = np.delete(suspects, first)
    if len(repeats) == 0:
        return impressions
    if how == "refuse":
        row = {name: impressions[name][int(repeats[0])].as_py() for name in ("user_id", "item_id", "time_ms")}
        raise DataError(f"{WHERE}: user {row['user_id']}, item {row['item_id']}, time_ms {row['time_ms']} is logged "
                        f"more than once, equal in every column ({len(repeats)} such rows in this part); set "
                        "duplicates: drop")
    keep = np.ones(len(impressions), bool)
    keep[repeats] = False
    return impressions.filter(pa.array(keep))


def _hash_column(array: pa.Array) -> np.ndarray:
    """One integer a row; null differs from every value, and a list from its parts in another order."""
    missing = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lists = Ragged.from_arrow(array)
        rows, columns, _ = lists.positions(int(lists.lengths_Q.max(initial=0)))
        keys = np.zeros(len(array), np.uint64)
        np.add.at(keys, rows, fold([_hash_column(lists.values), columns]))
    elif pa.types.is_floating(array.type):
        keys = pc.fill_null(array.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False).view(np.int64)
    elif pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        keys = to_keys(array)
    else:
        keys = to_keys(array.cast(pa.string()))
    return fold([keys, missing])


def to_requests(
    impressions: pa.Table, schema: FeatureSchema, *, history_len: int, exclude_seen: bool,
    duplicates: Literal["refuse", "drop"] = "refuse", gap_minutes: float | None = None, max_requests: int = 4096,
) -> Iterator[pa.Table]:
    """Raw canonical requests of at most `max_requests` rows a table, by user (in order of appearance), then time.

    `impressions` must hold every row of its users. Rows with one user and `request_id` are a request. With
    `gap_minutes` all ids are text, and rows without an id start a request ("user-first time_ms") after so long a
    silence among them; otherwise a missing id is a DataError. A request happens at its earliest row, which also gives
    its user and context features. `history` and, with `exclude_seen`, `exclude` see the rows of the user strictly
    before that moment and nothing else. A row whose `item_id` is null asks for a request that shows nothing: it has
    no candidate and is never part of a history.
    """
    stored = [f for f in schema.side("user", "context") if not isinstance(f, ClockFeature | HistoryFeature)]
    request_columns = [feature.name for feature in stored]
    event_columns = [feature.name for feature in schema.side("event") if not isinstance(feature, AgeFeature)]
    require_columns(impressions, ["user_id", "time_ms", "item_id", *request_columns, *schema.labels, *event_columns],
                    where=WHERE)
    if len(impressions) == 0:
        return
    log = _Sorted.from_table(check_duplicates(impressions, duplicates), gap_minutes)
    cuts = log.cuts(max_requests, history_len=history_len, exclude_seen=exclude_seen)
    for start, stop in pairwise(cuts):
        part = slice(int(start), int(stop))
        heads = log.rows.take(pa.array(log.first_Q[part]))
        columns: dict[str, object] = {"request_id": log.request_ids(heads, part), "user_id": heads["user_id"],
                                      "time_ms": heads["time_ms"].cast(pa.int64())}
        columns |= {name: heads[name] for name in request_columns}
        columns |= log.history_lists(part, history_len, event_columns)
        columns |= log.candidate_lists(part, schema.labels)
        if exclude_seen:
            columns["exclude"] = log.exclude_lists(part)
        yield pa.table(columns)


@dataclass(frozen=True)
class _Sorted:
    """Impressions in order of user, time and input, and the requests Q as ranges of them.

    `first_Q`: a request's earliest row; `start_Q` .. `end_Q`: the user's rows strictly before it. `members_R` holds
    the rows with an item of each request one after the other, in order of time.
    """

    rows: pa.Table
    gap_minutes: float | None
    named_R: np.ndarray  # bool: the row came with a request id
    first_Q: np.ndarray
    start_Q: np.ndarray
    end_Q: np.ndarray
    sizes_Q: np.ndarray
    members_R: np.ndarray
    shown: np.ndarray  # rows with an item, ascending
    shown_before_R1: np.ndarray  # how many of them come before each row
    new_items: np.ndarray  # rows that show a user an item for the first time, ascending
    new_before_R1: np.ndarray  # how many of them come before each row

    @classmethod
    def from_table(cls, impressions: pa.Table, gap_minutes: float | None) -> "_Sorted":
        user_R, time_R = _codes(impressions["user_id"]), impressions["time_ms"].cast(pa.int64()).to_numpy()
        order = np.lexsort((time_R, user_R))
        rows = impressions.take(pa.array(order)).combine_chunks()
        user_R, time_R = user_R[order], time_R[order]
        position_R = np.arange(len(rows))
        new_user_R = _changes(user_R)
        new_moment_R = new_user_R | _changes(time_R)
        user_start_R = np.maximum.accumulate(np.where(new_user_R, position_R, 0))
        moment_start_R = np.maximum.accumulate(np.where(new_moment_R, position_R, 0))
        label_R, named_R = _labels(rows, user_R, time_R, gap_minutes)
        _, first, request_R = np.unique(label_R, return_index=True, return_inverse=True)
        by_first = np.argsort(first)
        rank = np.empty(len(first), np.int64)
        rank[by_first] = np.arange(len(first))
        request_R, first_Q = rank[request_R], first[by_first]
        item_R = _codes(rows["item_id"])
        shown = np.flatnonzero(item_R >= 0)
        _, first_shown = np.unique((user_R * (int(item_R.max()) + 1) + item_R)[shown], return_index=True)
        new_items = np.sort(shown[first_shown])
        members_R = np.argsort(request_R, kind="stable")
        return cls(
            rows=rows, gap_minutes=gap_minutes, named_R=named_R, first_Q=first_Q,
            start_Q=user_start_R[first_Q], end_Q=moment_start_R[first_Q],
            sizes_Q=np.bincount(request_R[shown], minlength=len(first)), members_R=members_R[item_R[members_R] >= 0],
            shown=shown, shown_before_R1=_counts_before(shown, len(rows)), new_items=new_items,
            new_before_R1=_counts_before(new_items, len(rows)),
        )

    def cuts(self, max_requests: int, *, history_len: int, exclude_seen: bool) -> list[int]:
        """Where output tables start, and the end: no more than `max_requests` each, and bounded lists."""
        seen_Q = self.new_before_R1[self.end_Q] - self.new_before_R1[self.start_Q]
        values_Q = np.maximum(self.sizes_Q, np.minimum(self.end_Q - self.start_Q, history_len))
        flat_Q1 = np.concatenate([[0], np.cumsum(np.maximum(values_Q, seen_Q) if exclude_seen else values_Q)])
        cuts = [0]
        while cuts[-1] < len(self.first_Q):
            fitting = int(np.searchsorted(flat_Q1, flat_Q1[cuts[-1]] + MAX_LIST_VALUES, side="right")) - 1
            cuts.append(min(cuts[-1] + max_requests, max(fitting, cuts[-1] + 1), len(self.first_Q)))
        return cuts

    def history_lists(self, part: slice, history_len: int, event_columns: list[str]) -> dict[str, object]:
        end = self.shown_before_R1[self.end_Q[part]]
        lengths = np.minimum(end - self.shown_before_R1[self.start_Q[part]], history_len)
        at = self.shown[_ranges(end - lengths, lengths)]
        columns = {"history": "item_id", "history_time_ms": "time_ms"} | {f"history_{n}": n for n in event_columns}
        return {name: self._lists(column, at, lengths) for name, column in columns.items()}

    def candidate_lists(self, part: slice, labels: tuple[str, ...]) -> dict[str, object]:
        lengths = self.sizes_Q[part]
        begin = int(self.sizes_Q[:part.start].sum())
        at = self.members_R[begin:begin + int(lengths.sum())]
        lists: dict[str, object] = {"candidates": self._lists("item_id", at, lengths)}
        lists |= {name: self._lists(name, at, lengths) for name in labels}
        return lists | {"exposed": Ragged(pa.array(np.ones(len(at), bool)), lengths).to_arrow()}

    def exclude_lists(self, part: slice) -> pa.Array:
        begin = self.new_before_R1[self.start_Q[part]]
        lengths = self.new_before_R1[self.end_Q[part]] - begin
        return self._lists("item_id", self.new_items[_ranges(begin, lengths)], lengths)

    def request_ids(self, heads: pa.Table, part: slice) -> "pa.Array | pa.ChunkedArray":
        """The log's own ids, or user and first moment where the requests were cut at gaps."""
        if self.named_R.all():
            return heads["request_id"].cast(pa.string()) if self.gap_minutes is not None else heads["request_id"]
        moment = heads["time_ms"].cast(pa.int64()).cast(pa.string())
        made = pc.binary_join_element_wise(heads["user_id"].cast(pa.string()), moment, "-")
        if "request_id" not in heads.column_names:
            return made
        return pc.if_else(pa.array(self.named_R[self.first_Q[part]]), heads["request_id"].cast(pa.string()), made)

    def _lists(self, column: str, at: np.ndarray, lengths: np.ndarray) -> pa.Array:
        values = self.rows[column].chunk(0)  # from_table left one chunk a column
        values = values.cast(pa.int64()) if column == "time_ms" else values
        return Ragged(values.take(pa.array(at)), lengths).to_arrow()


def _labels(
    rows: pa.Table, user_R: np.ndarray, time_R: np.ndarray, gap_minutes: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """An integer per row, equal exactly for the rows of one request, and which rows came with an id."""
    named_R = np.zeros(len(rows), bool)
    label_R = np.zeros(len(rows), np.int64)
    if "request_id" in rows.column_names:
        named_R = rows["request_id"].is_valid().to_numpy()
        ids = _codes(rows["request_id"])
        label_R = user_R * (int(ids.max()) + 1) + ids
    free = np.flatnonzero(~named_R)
    if len(free) == 0:
        return label_R, named_R
    if gap_minutes is None:
        raise DataError(f"{WHERE}: user {rows['user_id'][int(free[0])]} has {len(free)} rows without a request_id; log "
                        "one for every row, or set request_by")
    begins = _changes(user_R[free])
    begins[1:] |= np.diff(time_R[free]) > gap_minutes * 60_000
    label_R[free] = label_R.max(initial=0, where=named_R) + np.cumsum(begins)
    return label_R, named_R


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Consecutive integers in order of appearance, -1 for null."""
    indices = column.combine_chunks().dictionary_encode().indices
    return pc.fill_null(indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _counts_before(positions: np.ndarray, num_rows: int) -> np.ndarray:
    """How many of the ascending positions lie before row 0, 1, ... num_rows."""
    marks = np.zeros(num_rows + 1, np.int64)
    marks[positions + 1] = 1
    return np.cumsum(marks)


def _changes(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it; the first always does."""
    changes = np.ones(len(values), bool)
    changes[1:] = values[1:] != values[:-1]
    return changes


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... (length numbers) of every range, one range after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
