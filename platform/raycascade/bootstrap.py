"""Intervals of a statistic by drawing requests anew (the bootstrap, Efron 1979). Rows of a request are no independent
observations, so a request is drawn with all its rows. Shape letter: R rows.
"""

import math
from collections.abc import Callable

import numpy as np

DRAWS, LEVEL, SEED = 1_000, 0.95, 1024

Statistic = Callable[[np.ndarray], float]  # of one weight a row: how often the row's request was drawn


def interval(
    statistic: Statistic, requests_R: np.ndarray, *, draws: int = DRAWS, level: float = LEVEL, seed: int = SEED
) -> tuple[float, float]:
    """The middle `level` of the statistic's values over `draws` samples of as many requests as there are, drawn with
    replacement. Draws in which it is not defined (NaN) are left out; NaN where there is no other.

    `requests_R` says which request a row belongs to. Which requests are drawn depends on their keys and the seed alone,
    so that two statistics of the same requests can be compared draw by draw.
    """
    _, request_R = np.unique(requests_R, return_inverse=True)
    count, rng = int(request_R.max(initial=-1)) + 1, np.random.default_rng(seed)
    values = [statistic(np.bincount(rng.integers(0, count, count), minlength=count)[request_R])
              for _ in range(draws if count else 0)]
    defined = np.array([value for value in values if not math.isnan(value)])
    if len(defined) == 0:
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class WeightedAuc:
    """The AUC of rows that count as often as their weights say; a tie counts half. NaN without both classes."""

    def __init__(self, logits_R: np.ndarray, labels_R: np.ndarray) -> None:
        self._order_R = np.argsort(logits_R, kind="stable")
        self._labels_R = labels_R[self._order_R].astype(np.float64)
        ordered_R = logits_R[self._order_R]
        new_R = np.ones(len(ordered_R), bool)
        new_R[1:] = ordered_R[1:] != ordered_R[:-1]
        self._ties = np.flatnonzero(new_R)  # where each group of equal logits begins

    def __call__(self, weights_R: np.ndarray) -> float:
        """Of weights in the order of the rows given."""
        if len(self._order_R) == 0:
            return math.nan
        weights_R = weights_R[self._order_R]
        positives_R = weights_R * self._labels_R
        positives = np.add.reduceat(positives_R, self._ties)
        negatives = np.add.reduceat(weights_R - positives_R, self._ties)
        pairs = positives.sum() * negatives.sum()
        above = (np.cumsum(negatives) - 0.5 * negatives) @ positives
        return float(above / pairs) if pairs else math.nan


class WeightedMean:
    """The mean of rows that count as often as their weights say."""

    def __init__(self, values_R: np.ndarray) -> None:
        self._values_R = values_R.astype(np.float64)

    def __call__(self, weights_R: np.ndarray) -> float:
        """Of weights in the order of the rows given."""
        total = weights_R.sum()
        return float(weights_R @ self._values_R / total) if total else math.nan
