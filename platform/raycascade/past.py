"""What of its history a request may know: events before its own moment."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade.ragged import Ragged

TIMES = "history_time_ms"


def without_later_events(requests: pa.Table) -> tuple[pa.Table, int]:
    """Encoded requests without the events at or after their own time, and how many those were. Events whose time is not
    known (0 or null), and histories without times, stay as they are."""
    if TIMES not in requests.column_names or "history" not in requests.column_names:
        return requests, 0
    history, times = (Ragged.from_arrow(requests[name]) for name in ("history", TIMES))
    request_E = np.repeat(np.arange(len(requests)), history.lengths_Q)
    later_E = np.zeros(len(request_E), bool)
    timed_E, timed_T = _in_both(history, times)
    later_E[timed_E] = (known_ms(times.values) >= np.repeat(requests["time_ms"].to_numpy(), times.lengths_Q))[timed_T]
    if not later_E.any():
        return requests, 0
    for position, name in enumerate(requests.column_names):
        if name == "history" or name.startswith("history_"):
            lists = Ragged.from_arrow(requests[name])
            kept, (of_history, of_lists) = np.ones(len(lists.values), bool), _in_both(history, lists)
            kept[of_lists] = ~later_E[of_history]
            lengths_Q = np.bincount(np.repeat(np.arange(len(requests)), lists.lengths_Q)[kept], minlength=len(requests))
            left = Ragged(lists.values.take(pa.array(np.flatnonzero(kept))), lengths_Q)
            requests = requests.set_column(position, name, left.to_arrow())
    return requests, int(later_E.sum())


def _in_both(history: Ragged, lists: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Which values of each are in rows where the lists are as long as the history: some requests bring no times."""
    same_Q = history.lengths_Q == lists.lengths_Q
    return np.repeat(same_Q, history.lengths_Q), np.repeat(same_Q, lists.lengths_Q)


def moments(requests: pa.Table, otherwise_ms: int) -> np.ndarray:
    """The moment that raw requests without a time are about [Q]: `otherwise_ms`, or right behind the newest event that
    they bring, if that is later."""
    newest_Q = np.full(len(requests), otherwise_ms, np.int64)
    if TIMES in requests.column_names:
        times = Ragged.from_arrow(requests[TIMES])
        np.maximum.at(newest_Q, np.repeat(np.arange(len(requests)), times.lengths_Q), known_ms(times.values) + 1)
    return newest_Q


def known_ms(times: pa.Array) -> np.ndarray:
    """Times of events as int64; far in the past where they are not known."""
    filled = pc.fill_null(times.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
    return np.where(filled > 0, filled, np.iinfo(np.int64).min // 2)
