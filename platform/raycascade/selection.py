"""Who is kept by whom: selection on a list by rank, the funnel of a cascade, and what its stages cost one another.

Arrays of [Q, C] in numpy: scores float64, keys uint64 (the lower key wins a tie), masks bool.
"""

from collections.abc import Mapping, Sequence

import numpy as np


def ranks(scores_QC: np.ndarray, keys_QC: np.ndarray, alive_QC: np.ndarray) -> np.ndarray:
    """Rank of every candidate from 0 = first by (score descending, key ascending); those not alive come last."""
    order_QC = np.lexsort((keys_QC, -np.where(alive_QC, scores_QC, 0.0), ~alive_QC), axis=-1)
    ranks_QC = np.empty_like(order_QC)
    np.put_along_axis(ranks_QC, order_QC, np.arange(order_QC.shape[1])[None, :], axis=1)
    return ranks_QC


def first(scores_QC: np.ndarray, quota: int, keys_QC: np.ndarray, alive_QC: np.ndarray) -> np.ndarray:
    """The first min(quota, alive) of those alive, bool [Q, C]."""
    return alive_QC & (ranks(scores_QC, keys_QC, alive_QC) < quota)


def funnel(
    scores: Mapping[str, np.ndarray], quotas: Sequence[int], keys_QC: np.ndarray, mask_QC: np.ndarray
) -> dict[str, np.ndarray]:
    """Who is left after each stage, bool [Q, C]: the first min(quota, left) of those the stage before left."""
    left_QC, survivors = mask_QC, {}
    for (stage, scores_QC), quota in zip(scores.items(), quotas, strict=True):
        left_QC = survivors[stage] = first(scores_QC, quota, keys_QC, left_QC)
    return survivors


def coordination(
    scores: Mapping[str, np.ndarray], quotas: Sequence[int], keys_QC: np.ndarray, mask_QC: np.ndarray,
    truth_QC: np.ndarray, survivors: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """How much of the truth each stage lost, and how much of that a later stage wanted; float64 [Q] by name.

    E_i, the candidates that entered stage i, are the survivors of the stage before (all candidates for the first
    one); it loses those of them that are not among its first q_i. A later stage l wants a candidate of E_i if it is
    among the first q_l of stage l's own order over E_i: what it would have kept, had it stood in i's place.

    `lost/<i>`: share of the request's truth t lost at stage i; over the stages they sum to 1 - joint recall.
    `lost_wanted/<i>`: the part of it that at least one later stage wanted; `lost_wanted/<i>/<l>`: that stage l wanted.
    `wasted/<i>`: share of the places that stage i filled with candidates, true or not, that no later stage wants.
    The last stage has `lost` only. 0 where there is no candidate.
    """
    stages, values, entered_QC = list(scores), {}, mask_QC
    size_Q = np.maximum(truth_QC.sum(axis=1), np.finfo(np.float64).tiny)
    for position, stage in enumerate(stages):
        kept_QC = survivors[stage]
        lost_QC = np.where(entered_QC & ~kept_QC, truth_QC, 0.0)
        values[f"lost/{stage}"] = lost_QC.sum(axis=1) / size_Q
        wanted_QC = np.zeros_like(mask_QC)
        for later, quota in list(zip(stages, quotas, strict=True))[position + 1:]:
            wants_QC = first(scores[later], quota, keys_QC, entered_QC)
            values[f"lost_wanted/{stage}/{later}"] = np.where(wants_QC, lost_QC, 0.0).sum(axis=1) / size_Q
            wanted_QC |= wants_QC
        if stage != stages[-1]:
            values[f"lost_wanted/{stage}"] = np.where(wanted_QC, lost_QC, 0.0).sum(axis=1) / size_Q
            unwanted_Q = (kept_QC & ~wanted_QC).sum(axis=1)
            values[f"wasted/{stage}"] = unwanted_Q / np.maximum(kept_QC.sum(axis=1), 1)
        entered_QC = kept_QC
    return values
