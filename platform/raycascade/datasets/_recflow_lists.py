"""The candidate lists of a protocol: which rows of a request enter, how deep they came, how relevant they are.

The two LCRON protocols (arXiv 2503.09492, section 5 and its published code) take the first rows of each stage's group,
deepest group first. Relevance is 30 - rank in the first group and one number per other group.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from raycascade.datasets._recflow_files import Columns, Lists
from raycascade.errors import DataError

BEST = 30  # relevance of the first group is BEST - rank
FULL_LEVELS = {"prerank_neg": 0, "coarse_neg": 1, "rank_neg": 2, "rank_pos": 3, "rerank_neg": 3, "rerank_pos": 4,
               "realshow": 5}
# Columns of request_id_dict, in the order in which ITEM_FIELDS names them.
ITEM_FIELDS = ("video_id", "author_id", "category_level_one", "category_level_two", "upload_type", "upload_timestamp",
               "duration")
LIST_FIELDS = [0, 1, 6, 3, 4, 5, 2]


@dataclass(frozen=True)
class Protocol:
    """Groups in list order, deepest first; where ranks of the first come from; relevance of the others."""

    groups: tuple[str, ...]
    rank: str
    codes: tuple[int, ...]


PROTOCOLS = {
    "lcron_two_stage": Protocol(("rank_pos", "rank_neg", "coarse_neg", "prerank_neg"), "rank_index", (7, 6, 5)),
    "lcron_three_stage": Protocol(("rerank_pos", "rerank_neg", "rank_neg", "coarse_neg", "prerank_neg"),
                                  "rerank_index", (8, 7, 6, 5)),
}
PAPER_CODES = (9, 8, 7)  # 30 - 21, 22, 23 of the paper's table 1; its code has 7, 6, 5


@dataclass(frozen=True)
class Rules:
    """The options of the data set that decide about lists and histories. `protocol` None: every logged candidate."""

    protocol: Protocol | None
    source: Literal["request_dict", "all_stage"] = "request_dict"
    per_group: int = 10
    short_list: Literal["keep", "drop", "raise"] = "keep"
    dedupe: Literal["none", "deepest"] = "none"
    missing_history: Literal["refuse", "empty"] = "refuse"
    missing_rank: Literal["refuse", "last"] = "refuse"
    history_len: int = 50


@dataclass(frozen=True)
class Slots:
    """Entries of lists, requests in order and each list in its order: the request's place, its group, the video."""

    request_E: np.ndarray
    group_E: np.ndarray
    video_E: np.ndarray

    def where(self, chosen_E: np.ndarray) -> "Slots":
        """Some of the entries."""
        return Slots(self.request_E[chosen_E], self.group_E[chosen_E], self.video_E[chosen_E])


def entries_of(lists: Lists, groups: tuple[str, ...], per_group: int) -> tuple[Columns, np.ndarray]:
    """The first `per_group` rows of each group in stored order: columns request_id, group and video_id, and the rows'
    ITEM_FIELDS [E, 7]."""
    parts = [(request, group, stages[name][:per_group]) for request, stages in lists
             for group, name in enumerate(groups) if name in stages]
    lengths = [len(rows) for _, _, rows in parts]
    fields_EF = np.concatenate([rows for _, _, rows in parts] or [np.zeros((0, 8), np.int64)])[:, LIST_FIELDS]
    entries = {"request_id": np.repeat(np.array([p[0] for p in parts], np.int64), lengths),
               "group": np.repeat(np.array([p[1] for p in parts], np.int8), lengths), "video_id": fields_EF[:, 0]}
    return entries, fields_EF


def slots_of_entries(entries: pa.Table | None, requests_R: np.ndarray, *, where: str) -> Slots:
    """Spilled entries as slots; `requests_R` are the ids of the requests, sorted. DataError for an unknown request."""
    if entries is None:
        return Slots(np.zeros(0, np.int64), np.zeros(0, np.int8), np.zeros(0, np.int64))
    id_E, group_E, video_E = (entries[name].to_numpy() for name in ("request_id", "group", "video_id"))
    request_E = np.minimum(np.searchsorted(requests_R, id_E), len(requests_R) - 1)
    unknown = np.unique(id_E[requests_R[request_E] != id_E])
    if len(unknown):
        raise DataError(f"{where}: {len(unknown)} requests of request_id_dict have no row in all_stage, so no user and "
                        f"no time: {', '.join(map(str, unknown[:5]))}; download both files again")
    order = np.lexsort((group_E, request_E))  # stable: rows of a group stay as they were stored
    return Slots(request_E[order], group_E[order], video_E[order])


def slots_of_rows(rows: Columns, request_S: np.ndarray, groups: tuple[str, ...], per_group: int) -> Slots:
    """The first `per_group` rows of each group in the order of all_stage."""
    parts = [np.flatnonzero(rows[name] > 0) for name in groups]
    row_E = np.concatenate(parts)
    group_E = np.repeat(np.arange(len(groups), dtype=np.int8), [len(part) for part in parts])
    order = np.lexsort((row_E, group_E, request_S[row_E]))
    row_E, group_E = row_E[order], group_E[order]
    slots = Slots(request_S[row_E], group_E, rows["video_id"][row_E])
    return slots.where(_place_in_group(slots, len(groups)) < per_group)


def _place_in_group(slots: Slots, num_groups: int) -> np.ndarray:
    owner_E = slots.request_E.astype(np.int64) * num_groups + slots.group_E
    starts = np.flatnonzero(np.append(True, owner_E[1:] != owner_E[:-1])[:len(owner_E)])
    lengths = np.diff(np.append(starts, len(owner_E)))
    return np.arange(len(owner_E)) - np.repeat(starts, lengths)


def settled(slots: Slots, rules: Rules, requests_R: np.ndarray, notes: Counter[str], *, where: str) -> Slots:
    """The slots after the rules for short groups and for videos that stand in a list twice."""
    assert rules.protocol is not None
    groups = rules.protocol.groups
    sizes_RG = np.zeros((len(requests_R), len(groups)), np.int64)
    np.add.at(sizes_RG, (slots.request_E, slots.group_E), 1)
    short_R = np.any(sizes_RG < rules.per_group, axis=1)
    if np.any(short_R):
        if rules.short_list == "raise":
            first = int(np.argmax(short_R))
            sizes = sizes_RG[first].tolist()
            group = next(number for number, size in enumerate(sizes) if size < rules.per_group)
            raise DataError(f"{where}: request {requests_R[first]} has {sizes[group]} candidates of "
                            f"{rules.per_group} in {groups[group]}; set short_list to keep or drop")
        notes[f"requests have a group of fewer than {rules.per_group} candidates (short_list: {rules.short_list})"] += (
            int(short_R.sum()))
        if rules.short_list == "drop":
            slots = slots.where(~short_R[slots.request_E])
    again_E = _seen_before(slots)
    if again_E.any():
        notes[f"candidates stand in their list a second time (dedupe: {rules.dedupe})"] += int(again_E.sum())
        if rules.dedupe == "deepest":
            slots = slots.where(~again_E)
    return slots


def _seen_before(slots: Slots) -> np.ndarray:
    """Entries whose video stands earlier, so at least as deep, in the same list."""
    order = np.lexsort((slots.video_E, slots.request_E))
    request, video = slots.request_E[order], slots.video_E[order]
    again_E = np.zeros(len(order), bool)
    again_E[order[1:]] = (request[1:] == request[:-1]) & (video[1:] == video[:-1])
    return again_E


def relevance_of(
    slots: Slots, rank_E: np.ndarray, rules: Rules, requests_R: np.ndarray, notes: Counter[str], *, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Relevance and rank of every entry. `rank_E`: the ranks of the first group, 0 where the log has none.

    DataError for a first candidate without a rank, or the worst rank of its group in its place.
    """
    assert rules.protocol is not None
    first_E = slots.group_E == 0
    rank_E = np.where(first_E, rank_E, 0)
    lost_E = first_E & (rank_E <= 0)
    if lost_E.any():
        if rules.missing_rank == "refuse":
            bad = int(np.argmax(lost_E))
            pair = f"(request {requests_R[slots.request_E[bad]]}, video {slots.video_E[bad]})"
            raise DataError(f"{where}: no {rules.protocol.rank} for {pair}: all_stage has no such row with "
                            f"{rules.protocol.groups[0]} = 1 and a rank ({lost_E.sum()} such candidates); download "
                            "both files again or set missing_rank: last")
        notes["candidates of the first group have no rank, and got the worst one of it (missing_rank: last)"] += int(
            lost_E.sum())
        worst_R = np.zeros(len(requests_R), np.int64)
        np.maximum.at(worst_R, slots.request_E[first_E], rank_E[first_E])
        size_R = np.bincount(slots.request_E[first_E], minlength=len(requests_R))
        rank_E = np.where(lost_E, np.where(worst_R > 0, worst_R, size_R)[slots.request_E], rank_E)
    worst = BEST - 1 - rules.protocol.codes[0]
    if (rank_E > worst).any():
        notes[f"candidates of the first group have a rank above {worst}: not more relevant than the next group"] += int(
            (rank_E > worst).sum())
    codes = np.array([0, *rules.protocol.codes])
    relevance_E = np.where(first_E, BEST - rank_E, codes[slots.group_E])
    return relevance_E.astype(np.float32), rank_E


def full_levels(rows: Columns) -> np.ndarray:
    """The deepest logged level of every row: the largest over its flags."""
    levels = [np.where(rows[name] > 0, level, 0) for name, level in FULL_LEVELS.items()]
    return np.max(levels, axis=0).astype(np.int8)
