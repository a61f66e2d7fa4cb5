"""Which shown item an event belongs to.

An event that names the request whose answer it follows belongs to that one. Any other belongs to the newest request of
its user, at or before it, that showed the item. Either way it must lie within the window of that request.
"""

import numpy as np
import pyarrow as pa

SHOWN = ("request_id", "user_id", "item_id", "time_ms")


def credited(shown: pa.Table, events: pa.Table, window_ms: int) -> np.ndarray:
    """For each event E the row of `shown` that it belongs to, -1 where there is none.

    `shown`: the columns SHOWN, one row per shown item; `events`: the same columns, `request_id` null where an event
    names no request. Ids are text in both. Of requests that showed the item at the same moment, the one whose id is the
    greatest counts; of rows that are equal in all of it, the last one.
    """
    if len(shown) == 0 or len(events) == 0:
        return np.full(len(events), -1)
    (user_S, user_E), (item_S, item_E) = (_codes(shown, events, name) for name in ("user_id", "item_id"))
    width = int(max(item_S.max(), item_E.max())) + 1
    _, pair = np.unique(np.concatenate([user_S * width + item_S, user_E * width + item_E]), return_inverse=True)
    pair_S, pair_E = pair[:len(shown)], pair[len(shown):]
    time_S, time_E = (table["time_ms"].to_numpy() for table in (shown, events))
    moments, moment = np.unique(np.concatenate([time_S, time_E]), return_inverse=True)
    moment_S, moment_E = moment[:len(shown)], moment[len(shown):]
    id_S, id_E = _codes(shown, events, "request_id")
    order = np.lexsort((id_S, moment_S, pair_S))
    newest_E = _last_at(pair_S[order] * len(moments) + moment_S[order], pair_E * len(moments) + moment_E)
    before_E = np.where(newest_E >= 0, order[newest_E], -1)
    before_E = np.where((before_E >= 0) & (pair_S[before_E] == pair_E), before_E, -1)
    names = int(max(id_S.max(), id_E.max())) + 1
    order = np.lexsort((moment_S, id_S, pair_S))
    named_key_S, named_key_E = pair_S[order] * names + id_S[order], pair_E * names + id_E
    named_E = _last_at(named_key_S, named_key_E)
    same_E = (named_E >= 0) & (named_key_S[named_E] == named_key_E)
    named_E = np.where(same_E, order[named_E], -1)
    found_E = np.where(id_E >= 0, named_E, before_E)
    inside_E = np.abs(time_E - time_S[found_E]) <= window_ms  # a sender's clock may be behind the request's
    return np.where((found_E >= 0) & inside_E, found_E, -1)


def _last_at(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The position of the last sorted key that is not greater, -1 where all are."""
    return np.searchsorted(sorted_keys, keys, side="right") - 1


def _codes(shown: pa.Table, events: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of both tables as integers in the order of the text; -1 for null."""
    column = pa.chunked_array([*shown[name].chunks, *events[name].chunks], pa.string()).combine_chunks()
    encoded = column.dictionary_encode()
    rank = np.argsort(np.argsort(encoded.dictionary.to_numpy(zero_copy_only=False).astype(str), kind="stable"))
    missing = encoded.indices.is_null().to_numpy(zero_copy_only=False)
    indices = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    codes = np.where(missing, -1, rank[indices] if len(rank) else -1).astype(np.int64)
    return codes[:len(shown)], codes[len(shown):]
