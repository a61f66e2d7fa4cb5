"""RecFlow's videos, gathered from candidates and histories; the first appearance of a video gives its fields."""

from collections import Counter

import numpy as np
import pyarrow as pa

HELD_ROWS = 2_000_000  # rows that wait to be merged


class Catalogue:
    """Distinct videos by id. A row that disagrees with the first one is counted in `notes`."""

    def __init__(self, notes: Counter[str]) -> None:
        self._notes = notes
        self._days: list[str] = []
        self._known_NF = np.zeros((0, 8), np.int64)  # ITEM_FIELDS and the number of the day
        self._held: list[np.ndarray] = []
        self._held_rows = 0

    def add(self, fields_EF: np.ndarray, day: str) -> None:
        """Rows of ITEM_FIELDS that were seen on a day."""
        if day not in self._days[-1:]:
            self._days.append(day)
        _, first = np.unique(fields_EF, axis=0, return_index=True)
        fresh_EF = fields_EF[np.sort(first)]  # equal rows say nothing new, and most are
        self._held.append(np.column_stack([fresh_EF, np.full(len(fresh_EF), len(self._days) - 1)]))
        self._held_rows += len(fresh_EF)
        if self._held_rows >= HELD_ROWS:
            self._merge()

    def _merge(self) -> None:
        if not self._held:
            return
        rows_EF = np.concatenate([self._known_NF, *self._held])
        self._held, self._held_rows = [], 0
        _, first_N, video_E = np.unique(rows_EF[:, 0], return_index=True, return_inverse=True)
        self._known_NF = rows_EF[first_N]
        different_E = (rows_EF[:, 1:7] != self._known_NF[video_E][:, 1:7]).any(1)
        if different_E.any():
            self._notes["rows tell other fields of a video than its first row, which is kept"] += int(different_E.sum())

    def column(self, number: int) -> np.ndarray:
        """One of ITEM_FIELDS, by video."""
        self._merge()
        return self._known_NF[:, number]

    def table(self) -> pa.Table:
        """The items table, by video id."""
        self._merge()
        video, author, one, two, kind, upload_s, duration, day = self._known_NF.T
        return pa.table({
            "item_id": video, "author_id": author, "category_level_one": one, "category_level_two": two,
            "upload_type": kind, "upload_time_s": upload_s, "upload_ms": upload_s * 1000, "duration": duration,
            "first_day": pa.array(self._days, pa.string()).take(pa.array(day)),
        })
