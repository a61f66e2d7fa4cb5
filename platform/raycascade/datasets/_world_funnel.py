"""Production in the simulated world: a pool of candidates, the cascade that narrows it, what is shown, and feedback.

Shape letters beyond those of `_world.py`: P pool, M candidates of a stage, S shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from raycascade.datasets import _world as w

POPULAR_SHARE, FRESH_SHARE = 0.25, 0.1  # of a pool; a third is uniform, the rest comes from the user's categories
CATEGORY_FOCUS = 3.0  # how sharply a user's categories follow the taste
NOISE = {"retrieval": 1.5, "pre_rank": 1.0, "rank": 0.4, "re_rank": 0.2}
# Feedback: logit = slope * (utility - offset). Offsets lie where shown items have their utilities.
CLICK, LONG_VIEW, LIKE = (1.2, 2.4), (1.2, 2.6), (1.2, 4.2)
EXAMINATION_DECAY = 0.15  # the item at position p is looked at with probability 1 / (1 + decay * p)


@dataclass(frozen=True)
class Logged:
    """What a request leaves in the log: C candidates in random order, and the items shown in display order."""

    items_QC: np.ndarray
    reached_QC: np.ndarray
    rank_QC: np.ndarray  # within the level; of the top level, the place on the page
    chosen_QC: np.ndarray  # top level: the rank that the stage which chose it gave; 0 below
    exposed_QC: np.ndarray
    labels: Mapping[str, np.ndarray]  # each bool [Q, C], false where not exposed
    shown_QS: np.ndarray
    action_QS: np.ndarray


def serve(config: w.WorldConfig, world: w.Catalogue, rng: Generator, situation: w.Situation) -> Logged:
    """Production answers requests: pool, cascade, display, feedback."""
    items_QM = np.sort(draw_pool(config, world, rng, situation), axis=1)
    groups: list[np.ndarray] = []  # from the shallowest level to the deepest, each in order of rank
    for stage, keep in zip(NOISE, config.keeps, strict=False):
        scores_QM = _scores(stage, world, rng, situation, items_QM)
        if stage == "retrieval":
            scores_QM[:, 1:][items_QM[:, 1:] == items_QM[:, :-1]] = -np.inf  # the pool's duplicates
        kept_QK, cut_QK = _cut(rng, scores_QM, keep, config.per_level)
        groups.append(np.take_along_axis(items_QM, cut_QK, 1))
        items_QM = np.take_along_axis(items_QM, kept_QK, 1)
    order_QK = np.broadcast_to(np.arange(items_QM.shape[1]), items_QM.shape)
    if config.levels == 4:  # the re-ranker only orders what ranking kept; with five levels it has already cut
        order_QK = np.argsort(-_scores("re_rank", world, rng, situation, items_QM), axis=1)
        items_QM = np.take_along_axis(items_QM, order_QK, 1)
    utility_QS = w.utility(world, situation, items_QM[:, : config.shown])
    return _log(config, world, rng, [*groups, items_QM], order_QK + 1, utility_QS)


def _scores(
    stage: str, world: w.Catalogue, rng: Generator, situation: w.Situation, items_QM: np.ndarray
) -> np.ndarray:
    """What a stage believes of the utility: retrieval a blurred taste and some popularity, pre-ranking all but history
    and authors, ranking and re-ranking everything; with ever less noise."""
    if stage == "retrieval":
        fame_QM = np.log(world.popularity_N[items_QM] * len(world.popularity_N)).astype(np.float32)
        scores_QM = w.taste(situation, world.view_ND[items_QM]) + np.float32(0.2) * fame_QM
    elif stage == "pre_rank":
        scores_QM = w.taste(situation, world.latent_ND[items_QM]) + w.merit(world, situation, items_QM)
        scores_QM += w.mood(world, situation, items_QM)
    else:
        scores_QM = w.utility(world, situation, items_QM)
    return scores_QM + np.float32(NOISE[stage]) * rng.standard_normal(scores_QM.shape, np.float32)


def _cut(rng: Generator, scores_QM: np.ndarray, keep: int, per_level: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `keep` best and of a uniform sample of `per_level` of the others, both best first."""
    order_QM = np.argsort(-scores_QM, axis=1)
    rest_QR = order_QM[:, keep:]
    lottery_QR = rng.random(rest_QR.shape, np.float32)
    lottery_QR[np.isneginf(np.take_along_axis(scores_QM, rest_QR, 1))] = 2.0
    if rest_QR.shape[1] > per_level:
        drawn_QK = np.sort(np.argpartition(lottery_QR, per_level, axis=1)[:, :per_level], axis=1)
        rest_QR = np.take_along_axis(rest_QR, drawn_QK, 1)
    return order_QM[:, :keep], rest_QR


def _log(
    config: w.WorldConfig, world: w.Catalogue, rng: Generator, groups: list[np.ndarray], chosen_QK: np.ndarray,
    utility_QS: np.ndarray,
) -> Logged:
    """Shuffles the levels into one list, so that its order tells nothing, and adds display and feedback."""
    per_level, shown = config.per_level, config.shown
    shape = (len(utility_QS), config.levels * per_level)
    shuffle_QC = np.argsort(rng.random(shape, np.float32), axis=1)
    reached_QC, rank_QC = shuffle_QC // per_level, shuffle_QC % per_level + 1
    top_QC = reached_QC == config.levels - 1
    exposed_QC = top_QC & (rank_QC <= shown)
    shown_QS = groups[-1][:, :shown]
    feedback = react(rng, utility_QS, world.duration_s_N[shown_QS])
    at_QC = np.where(exposed_QC, rank_QC - 1, 0)
    return Logged(
        items_QC=np.take_along_axis(np.concatenate(groups, axis=1), shuffle_QC, 1),
        reached_QC=reached_QC,
        rank_QC=rank_QC,
        chosen_QC=np.where(top_QC, np.take_along_axis(chosen_QK, rank_QC - 1, 1), 0),
        exposed_QC=exposed_QC,
        labels={name: np.take_along_axis(acted_QS, at_QC, 1) & exposed_QC for name, acted_QS in feedback.items()},
        shown_QS=shown_QS,
        action_QS=(w.SHOWN + feedback["click"] + feedback["long_view"].astype(np.int64)).astype(np.int8),
    )


def react(rng: Generator, utility_QS: np.ndarray, duration_s_QS: np.ndarray) -> dict[str, np.ndarray]:
    """Feedback on shown items, bool [Q, S]: a click needs a look (position bias), a long view a click, a like a long
    view; long items are seldom watched to the end."""
    dice = rng.random((4, *utility_QS.shape), np.float32)
    looked_QS = dice[0] < 1.0 / (1.0 + EXAMINATION_DECAY * np.arange(utility_QS.shape[1]))
    length_QS = np.log(duration_s_QS) - 3.5
    click_QS = looked_QS & (dice[1] < _chance(utility_QS, CLICK))
    long_view_QS = click_QS & (dice[2] < _chance(utility_QS - 0.5 * length_QS, LONG_VIEW))
    return {"click": click_QS, "long_view": long_view_QS, "like": long_view_QS & (dice[3] < _chance(utility_QS, LIKE))}


def _chance(utility_QS: np.ndarray, slope_offset: tuple[float, float]) -> np.ndarray:
    slope, offset = slope_offset
    return 1.0 / (1.0 + np.exp(-slope * (utility_QS - offset)))


# ---------------------------------------------------------------- pools
def draw_pool(
    config: w.WorldConfig, world: w.Catalogue, rng: Generator, situation: w.Situation
) -> np.ndarray:
    """Items alive at the request's time [Q, P], duplicates possible; cost per request does not grow with N.

    A third is uniform without repetition (a stride through the living items), a quarter popular, a tenth of the last
    24 hours, the rest from the categories of the user's taste and history.
    """
    num_requests, pool = len(situation.time_ms_Q), config.pool
    alive_Q1 = world.num_alive(situation.time_ms_Q)[:, None]
    explored = config.num_explored
    stride_Q1 = alive_Q1 // explored
    start_Q1 = (rng.random((num_requests, 1)) * alive_Q1).astype(np.int64)
    uniform_QP = (start_Q1 + stride_Q1 * np.arange(explored)) % alive_Q1
    popular_QP = popular(world, rng, alive_Q1, (num_requests, int(pool * POPULAR_SHARE)))
    yesterday_Q1 = world.num_alive(situation.time_ms_Q - w.DAY_MS)[:, None]
    oldest_Q1 = np.where(yesterday_Q1 < alive_Q1, yesterday_Q1, 0)
    fresh = rng.random((num_requests, int(pool * FRESH_SHARE)))
    fresh_QP = oldest_Q1 + (fresh * (alive_Q1 - oldest_Q1)).astype(np.int64)
    rest = pool - explored - popular_QP.shape[1] - fresh_QP.shape[1]
    weights_QG = category_weights(world, situation)
    categorical_QP = from_categories(world, rng, weights_QG, situation.time_ms_Q, (num_requests, rest))
    return np.concatenate([uniform_QP, popular_QP, fresh_QP, categorical_QP], axis=1)


def popular(world: w.Catalogue, rng: Generator, alive_Q1: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Living items drawn by popularity."""
    return _by_popularity(world, rng.random(shape), alive_Q1)


def _by_popularity(world: w.Catalogue, dice: np.ndarray, alive: np.ndarray) -> np.ndarray:
    drawn = np.searchsorted(world.mass_N, dice * world.mass_N[alive - 1], side="right")
    return np.minimum(drawn, alive - 1)


def category_weights(world: w.Catalogue, situation: w.Situation) -> np.ndarray:
    """Probabilities [Q, G]: half from the taste, half from the clicked categories of the history (if there are any)."""
    affinity_QG = np.exp(CATEGORY_FOCUS * (situation.taste_QD @ world.centroid_GD.T))
    weights_QG = affinity_QG / affinity_QG.sum(1, keepdims=True)
    liked_QL = situation.action_QL >= w.CLICKED
    num_categories = len(world.centroid_GD)
    rows_QL = np.arange(len(liked_QL))[:, None] * num_categories + world.category_N[situation.history_QL]
    counts_QG = np.bincount(rows_QL[liked_QL], minlength=weights_QG.size).reshape(weights_QG.shape)
    total_Q1 = counts_QG.sum(1, keepdims=True)
    return np.where(total_Q1 > 0, 0.5 * weights_QG + 0.5 * counts_QG / np.maximum(total_Q1, 1), weights_QG)


def from_categories(
    world: w.Catalogue, rng: Generator, weights_QG: np.ndarray, time_ms_Q: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Living items drawn by category, then by popularity inside it. An empty shelf gives any popular item."""
    num_requests, num_categories = weights_QG.shape
    categories_G = np.arange(num_categories)
    first_G = np.searchsorted(world.shelf_key_N, w.shelf_key(categories_G, np.zeros(1, np.int64)))
    keys_QG = w.shelf_key(categories_G[None, :], time_ms_Q[:, None])
    behind_QG = np.searchsorted(world.shelf_key_N, keys_QG, side="right")
    mass_0N = np.concatenate([[0.0], world.shelf_mass_N])
    # One running sum over all rows (row q covers q .. q + 1) finds every draw's category with one binary search.
    steps_QG = np.cumsum(weights_QG / weights_QG.sum(1, keepdims=True), axis=1)
    steps_QG[:, -1] = 1.0
    row_Q1 = np.arange(num_requests)[:, None]
    flat = np.searchsorted((steps_QG + row_Q1).reshape(-1), rng.random(shape) + row_Q1, side="right")
    category_QP = np.clip(flat - row_Q1 * num_categories, 0, num_categories - 1)
    first_QP, behind_QP = first_G[category_QP], np.take_along_axis(behind_QG, category_QP, 1)
    low_QP, high_QP = mass_0N[first_QP], mass_0N[behind_QP]
    drawn_QP = np.searchsorted(world.shelf_mass_N, low_QP + rng.random(shape) * (high_QP - low_QP), side="right")
    items_QP = world.by_category_N[np.clip(drawn_QP, first_QP, np.maximum(behind_QP - 1, first_QP).clip(
        max=len(world.by_category_N) - 1))]
    dice_QP = rng.random(shape)  # drawn for all, so that the stream does not depend on which shelves are empty
    row, column = np.nonzero(behind_QP <= first_QP)
    items_QP[row, column] = _by_popularity(world, dice_QP[row, column], world.num_alive(time_ms_Q[row]))
    return items_QP
