"""One day of RecFlow as canonical requests, put together bucket by bucket so that no day is in memory as a whole."""

import datetime as dt
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raycascade.datasets._recflow_buckets import Buckets
from raycascade.datasets._recflow_files import ALL_STAGE, HISTORIES, LISTS, REALSHOW, STAGES, Columns, RecflowFiles
from raycascade.datasets._recflow_lists import (
    Rules,
    Slots,
    entries_of,
    full_levels,
    relevance_of,
    settled,
    slots_of_entries,
    slots_of_rows,
)
from raycascade.errors import DataError
from raycascade.ragged import Ragged

UTC_OFFSET_HOURS = 8.0
USER_FIELDS = ("user_id", "device_id", "age", "gender", "province")
LABELS = ("effective_view", "long_view", "like", "follow", "forward", "comment")
RANKS = {"rank_index": ("rank_pos", "rank_neg"), "rerank_index": ("rerank_pos", "rerank_neg")}
READ = ("request_id", "request_timestamp", *USER_FIELDS, "video_id", *STAGES, *RANKS, "playing_time", *LABELS)
TYPES = dict.fromkeys((*STAGES, *LABELS), np.int8) | dict.fromkeys(RANKS, np.int32)
ROW_BYTES = 100  # of a row between the two steps
BUCKET_BYTES, MOST_BUCKETS = 64 << 20, 512
TABLE_REQUESTS, TABLE_CANDIDATES = 8_192, 1_000_000
DAY_MS, HOUR_MS = 86_400_000, 3_600_000
MOST_CONFLICTS, MOST_OUTSIDE = 0.001, 0.01  # shares of a day's requests


@dataclass(frozen=True)
class Requests:
    """The requests of a bucket by id, with the user of each; `request_S` and `rows` are its log's rows in their order,
    by request."""

    id_R: np.ndarray
    user: Columns
    rows: Columns
    request_S: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """All lists of a bucket one after the other, and their parallel columns."""

    request_E: np.ndarray
    columns: Columns


def read_day(files: RecflowFiles, day: str, rules: Rules) -> Iterator[pa.Table]:
    """The requests of a day in tables of bounded size, by bucket and request id."""
    kind = ALL_STAGE if ALL_STAGE in files.folders else REALSHOW
    where = f"{files.raw}/{files.file(kind, day)}"
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="recflow-") as folder:
        wanted = -(-files.num_rows(files.file(kind, day)) * ROW_BYTES // BUCKET_BYTES)
        count = min(max(1, wanted), MOST_BUCKETS)
        rows = _spill_rows(files, files.file(kind, day), folder, count)
        histories = _spill_histories(files, day, rules, folder, count)
        from_lists = rules.protocol is not None and rules.source == "request_dict"
        entries = _spill_entries(files, day, rules, folder, count) if from_lists else None
        for number in range(count):
            bucket = rows.read(number)
            listed = entries.read(number) if entries else None
            if bucket is None:
                slots_of_entries(listed, np.full(1, -1), where=where)  # entries without a row anywhere are an error
                continue
            requests = _requests(bucket, day, counted)
            found = _candidates(requests, listed, rules, files.notes, where=where)
            yield from _tables(requests, found, histories.read(number), day, rules, files.notes, where=where)
    _check_shares(counted, files.notes, where=where)


# ---------------------------------------------------------------- to disk
def _spill_rows(files: RecflowFiles, file: str, folder: str, count: int) -> Buckets:
    with Buckets(folder, "rows", count) as buckets:
        for columns in files.read_columns(file, READ):
            buckets.add(pa.table({name: np.minimum(values, np.iinfo(TYPES[name]).max).astype(TYPES[name])
                                  if name in TYPES else values for name, values in columns.items()}))
    return buckets


def _spill_histories(files: RecflowFiles, day: str, rules: Rules, folder: str, count: int) -> Buckets:
    where = f"{files.raw}/{files.file(HISTORIES, day)}"
    with Buckets(folder, "histories", count) as buckets:
        for request_R, events_RLF in files.read_histories(files.file(HISTORIES, day)):
            valid_RL = events_RLF[:, :, 7] > 0
            events_EF = events_RLF[valid_RL]  # by request, oldest first
            files.check_ids("video_id", events_EF[:, 0], where)
            lengths_R = valid_RL.sum(1)
            taken = Ragged(pa.array(events_EF[:, 0]), lengths_R)
            _, _, newest = taken.positions(rules.history_len, newest=True)
            kept_R = np.minimum(lengths_R, rules.history_len)
            lists = {name: Ragged(pa.array(events_EF[newest, column]), kept_R).to_arrow()
                     for name, column in (("history", 0), ("history_time_ms", 7))}
            buckets.add(pa.table({"request_id": request_R, **lists}))
    return buckets


def _spill_entries(files: RecflowFiles, day: str, rules: Rules, folder: str, count: int) -> Buckets:
    assert rules.protocol is not None
    where = f"{files.raw}/{files.file(LISTS, day)}"
    with Buckets(folder, "entries", count) as buckets:
        for lists in files.read_lists(files.file(LISTS, day)):
            entries, _ = entries_of(lists, rules.protocol.groups, rules.per_group)
            files.check_ids("video_id", entries["video_id"], where)
            buckets.add(pa.table(entries))
    return buckets


# ---------------------------------------------------------------- requests
def _requests(bucket: pa.Table, day: str, counted: Counter[str]) -> Requests:
    """Groups the rows by request; times outside the file's day move to its edge."""
    columns = {name: bucket[name].to_numpy() for name in bucket.column_names}
    order = np.argsort(columns["request_id"], kind="stable")
    rows = {name: values[order] for name, values in columns.items()}
    id_R, starts_R, request_S = np.unique(rows["request_id"], return_index=True, return_inverse=True)
    user = {name: rows[name][starts_R] for name in (*USER_FIELDS, "request_timestamp")}
    differ_R = np.zeros(len(id_R), bool)
    for name, first_R in user.items():
        differ_R |= np.maximum.reduceat(np.abs(rows[name] - first_R[request_S]), starts_R) > 0
    midnight_ms = int(dt.datetime.fromisoformat(f"{day}T00:00:00+08:00").timestamp() * 1000)
    inside_R = np.clip(user["request_timestamp"], midnight_ms, midnight_ms + DAY_MS - 1)
    counted["requests"] += len(id_R)
    counted["differ"] += int(differ_R.sum())
    counted["outside"] += int((inside_R != user["request_timestamp"]).sum())
    return Requests(id_R, {**user, "request_timestamp": inside_R}, rows, request_S)


def _check_shares(counted: Counter[str], notes: Counter[str], *, where: str) -> None:
    total = max(1, counted["requests"])
    if counted["differ"] > MOST_CONFLICTS * total:
        raise DataError(f"{where}: user fields differ within {counted['differ']} of {total} requests, more than 0.1 %: "
                        "the file is damaged, download it again")
    if counted["outside"] > MOST_OUTSIDE * total:
        raise DataError(f"{where}: {counted['outside']} of {total} requests lie outside the file's day in UTC+8: the "
                        "file has another day's name, or its times are in another zone")
    for name, text in (("differ", "requests have user fields that differ; the first row's are kept"),
                       ("outside", "requests lie outside their file's day in UTC+8, and count at its edge")):
        if counted[name]:
            notes[text] += counted[name]


def _merged(requests: Requests, notes: Counter[str]) -> tuple[Columns, np.ndarray]:
    """One row per (request, video), by both: flags and feedback of either, ranks of the first row that has its flag."""
    rows, request_S = requests.rows, requests.request_S
    order = np.lexsort((rows["video_id"], request_S))
    rows, request_S = {name: values[order] for name, values in rows.items()}, request_S[order]
    video_S = rows["video_id"]
    new_S = np.append(True, (request_S[1:] != request_S[:-1]) | (video_S[1:] != video_S[:-1]))
    starts = np.flatnonzero(new_S)
    if len(starts) == len(new_S):
        return rows, request_S
    notes["rows of all_stage repeat a (request, video); their flags are joined, the first rank is kept"] += (
        len(new_S) - len(starts))
    merged = {name: values[starts] for name, values in rows.items()}
    for name in (*STAGES, *LABELS, "playing_time"):
        merged[name] = np.maximum.reduceat(rows[name], starts)
    pair_S = np.cumsum(new_S) - 1
    for name, (best, worse) in RANKS.items():
        flag_S = np.where(rows[best] > 0, 0, np.where(rows[worse] > 0, 1, 2))
        merged[name] = rows[name][np.lexsort((flag_S, pair_S))][starts]  # stable: the first of the best flag
    return merged, request_S[starts]


# ---------------------------------------------------------------- candidates
def _candidates(
    requests: Requests, entries: pa.Table | None, rules: Rules, notes: Counter[str], *, where: str
) -> Candidates:
    merged, request_S = _merged(requests, notes)
    if rules.protocol is None:
        return _all_logged(merged, request_S)
    if rules.source == "request_dict":
        slots = slots_of_entries(entries, requests.id_R, where=where)
    else:
        slots = slots_of_rows(requests.rows, requests.request_S, rules.protocol.groups, rules.per_group)
    slots = settled(slots, rules, requests.id_R, notes, where=where)
    row_E, known_E = _rows_of(slots, merged, request_S)
    ranked_E = known_E & (merged[rules.protocol.groups[0]][row_E] > 0)
    rank_E = np.where(ranked_E, merged[rules.protocol.rank][row_E], 0)
    relevance_E, rank_E = relevance_of(slots, rank_E, rules, requests.id_R, notes, where=where)
    columns = {name: np.where(known_E, merged[name][row_E], 0) for name in ("realshow", "playing_time", *LABELS)}
    columns |= {name: np.where(_flagged(merged, name)[row_E] & known_E, merged[name][row_E], 0) for name in RANKS}
    deepest = len(rules.protocol.groups) - 1
    return Candidates(slots.request_E, columns | {
        "candidates": slots.video_E, "reached": (deepest - slots.group_E).astype(np.int8), "rank": rank_E,
        "relevance": relevance_E})


def _rows_of(slots: Slots, merged: Columns, request_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of every entry in the log, and whether there is one; rows are sorted by request and video."""
    videos = np.unique(merged["video_id"])
    place_E = np.minimum(np.searchsorted(videos, slots.video_E), len(videos) - 1)
    key_S = request_S.astype(np.int64) * len(videos) + np.searchsorted(videos, merged["video_id"])
    key_E = slots.request_E.astype(np.int64) * len(videos) + place_E
    row_E = np.minimum(np.searchsorted(key_S, key_E), len(key_S) - 1)
    return row_E, (key_S[row_E] == key_E) & (videos[place_E] == slots.video_E)


def _flagged(merged: Columns, rank: str) -> np.ndarray:
    """Rows whose rank of a kind means something."""
    return np.any([merged[flag] > 0 for flag in RANKS[rank]], axis=0)


def _all_logged(merged: Columns, request_S: np.ndarray) -> Candidates:
    """Every logged candidate, deepest level first, then by rank and video."""
    level_S = full_levels(merged)
    ranks = {name: np.where(_flagged(merged, name), merged[name], 0) for name in RANKS}
    rank_S = ranks["rerank_index"]  # rank_index belongs to another stage: not comparable inside a level
    last_S = np.where(rank_S > 0, rank_S, np.iinfo(np.int32).max)
    order = np.lexsort((merged["video_id"], last_S, -level_S, request_S))
    columns = {"candidates": merged["video_id"], "reached": level_S, "rank": rank_S, "realshow": merged["realshow"],
               "playing_time": merged["playing_time"], **ranks, **{name: merged[name] for name in LABELS}}
    return Candidates(request_S[order], {name: values[order] for name, values in columns.items()})


# ---------------------------------------------------------------- tables
def _tables(
    requests: Requests, found: Candidates, histories: pa.Table | None, day: str, rules: Rules, notes: Counter[str], *,
    where: str
) -> Iterator[pa.Table]:
    length_R = np.bincount(found.request_E, minlength=len(requests.id_R))
    if (length_R == 0).any():
        notes["requests have no candidate of the protocol and are left out"] += int((length_R == 0).sum())
    past = _histories_of(requests.id_R, histories, rules, notes, where=where)
    kept_R = np.flatnonzero(length_R > 0)
    bounds_R1 = np.concatenate([[0], np.cumsum(length_R)])
    step = max(1, min(TABLE_REQUESTS, TABLE_CANDIDATES // max(1, int(length_R.max(initial=1)))))
    for start in range(0, len(kept_R), step):
        chosen = kept_R[start:start + step]
        inside = slice(int(bounds_R1[chosen[0]]), int(bounds_R1[chosen[-1] + 1]))
        lists = _list_columns({name: values[inside] for name, values in found.columns.items()}, length_R[chosen])
        yield pa.table({
            "request_id": requests.id_R[chosen],
            **_user_columns({name: values[chosen] for name, values in requests.user.items()}, day),
            **{name: past[name].combine_chunks().take(pa.array(chosen)) for name in past.column_names}, **lists,
        })


def _user_columns(user: Columns, day: str) -> dict[str, object]:
    time_ms = user["request_timestamp"]
    local_ms = time_ms + int(UTC_OFFSET_HOURS * HOUR_MS)
    clock = {"hour": local_ms // HOUR_MS % 24, "weekday": (local_ms // DAY_MS + 3) % 7,
             "minute": local_ms // 60_000 % 60}
    return {"time_ms": time_ms, "day": pa.array([day] * len(time_ms), pa.string()),
            **{name: user[name] for name in USER_FIELDS},
            **{name: values.astype(np.int8) for name, values in clock.items()}}


def _list_columns(columns: Columns, length_R: np.ndarray) -> dict[str, pa.Array]:
    """Parallel lists. Feedback of a candidate that was not shown is null: unobserved, not negative."""
    shown = columns["realshow"] > 0
    types = {"reached": pa.int8(), "rank": pa.int16(), "relevance": pa.float32(), "rank_index": pa.int16(),
             "rerank_index": pa.int16(), "realshow": pa.int8()}
    flat: dict[str, pa.Array] = {"exposed": pa.array(shown)}
    for name, values in columns.items():
        if name in LABELS:
            flat[name] = pa.array((values > 0).astype(np.int8), mask=~shown)
        elif name in RANKS or name == "rank":
            flat[name] = pa.array(np.clip(values, 0, np.iinfo(np.int16).max).astype(np.int16))
        else:
            flat[name] = pa.array(values, types.get(name, pa.int64()))
    return {name: Ragged(values, length_R).to_arrow() for name, values in flat.items()}


def _histories_of(
    requests_R: np.ndarray, histories: pa.Table | None, rules: Rules, notes: Counter[str], *, where: str
) -> pa.Table:
    """The history of every request, in their order; null where the log has none."""
    nothing = pa.nulls(0, pa.list_(pa.int64()))
    table = histories or pa.table({"request_id": pa.array([], pa.int64()), "history": nothing,
                                   "history_time_ms": nothing})
    known = table["request_id"].to_numpy()
    order = np.argsort(known, kind="stable")
    place_R = np.searchsorted(known, requests_R, sorter=order)
    row_R = order[np.minimum(place_R, len(known) - 1)] if len(known) else np.zeros(len(requests_R), np.int64)
    lost_R = known[row_R] != requests_R if len(known) else np.ones(len(requests_R), bool)
    if lost_R.any():
        if rules.missing_history == "refuse":
            named = ", ".join(map(str, requests_R[lost_R][:5]))
            raise DataError(f"{where}: {lost_R.sum()} requests have no history in seq_effective_50_dict: {named}; "
                            "download both files again, or set missing_history: empty")
        notes["requests have no history, and got an empty one (missing_history: empty)"] += int(lost_R.sum())
    return table.drop_columns(["request_id"]).combine_chunks().take(pa.array(row_R, mask=lost_R))
