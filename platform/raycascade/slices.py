"""An evaluation split by what training knew of an item: all rows, those of cold items, those of the tail.

Cold: the item has no impression in the training split. Tail: 1 to 20. Impressions are those of the exposure counter,
which holds the training split alone; a log that does not say what was shown counts every logged candidate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raycascade.bootstrap import WeightedAuc, WeightedMean, interval
from raycascade.items import ItemTable
from raycascade.metrics import BinaryMetrics
from raycascade.schema import FIRST_ROW

SLICES = ("all", "cold", "tail")
MOST_OF_TAIL = 20  # impressions
FEWEST_ROWS, FEWEST_POSITIVES = 1_000, 50
TOO_FEW = "too few"
LATER = 1 << 62  # after every moment of a log
METRICS = ("auc", "gauc", "logloss")


@dataclass(frozen=True)
class SliceFigures:
    """What was measured on one slice: of a stage's score, or (without a stage) of the catalogue search.

    `rows`: candidates with a label; of the catalogue, the requests with such a positive. No metrics where there are too
    few of them to say something.
    """

    slice: str
    stage: str
    rows: int
    positives: int
    metrics: Mapping[str, float] | None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # 95%, by metric


def training_impressions(items: ItemTable) -> np.ndarray:
    """How often each item was shown in the training split, by item row [N + 2]."""
    rows = np.arange(FIRST_ROW + items.num_items)
    return np.rint(items.state.counters.as_of(rows, LATER, "exposure")).astype(np.int64)


def members(impressions: np.ndarray) -> dict[str, np.ndarray]:
    """Which items of so many training impressions are in each slice; masks of the same shape."""
    cold = impressions == 0
    return {"all": np.ones_like(cold), "cold": cold, "tail": ~cold & (impressions <= MOST_OF_TAIL)}


class Slice:
    """One stage's score on the candidates of one slice; mergeable. With `draws`, requests are kept (8 bytes a row) and
    results have intervals of so many draws."""

    def __init__(self, *, draws: int = 0) -> None:
        self.predictions = BinaryMetrics()
        self.draws = draws
        self._requests: list[np.ndarray] = []

    def update(
        self, logits_QC: Tensor, labels_QC: Tensor, member_QC: np.ndarray, users_Q: np.ndarray, requests_Q: np.ndarray
    ) -> None:
        """Adds the rows where `member_QC` is true and the label is not NaN."""
        truth_QC = torch.where(torch.from_numpy(member_QC).to(labels_QC.device), labels_QC, torch.nan)
        self.predictions.update(logits_QC, truth_QC, users_Q)
        if self.draws:
            known_QC = ~truth_QC.isnan().cpu().numpy()
            self._requests.append(np.broadcast_to(requests_Q[:, None], known_QC.shape)[known_QC])

    def merge(self, other: "Slice") -> None:
        """Takes in what another worker saw."""
        self.predictions.merge(other.predictions)
        self._requests.extend(other._requests)

    def figures(self, name: str, stage: str, *, metrics: Sequence[str] = METRICS) -> SliceFigures:
        """The metrics that are defined, unless there are too few rows or positives."""
        rows, positives = self.predictions.num_rows, self.predictions.num_positives
        if rows < FEWEST_ROWS or positives < FEWEST_POSITIVES:
            return SliceFigures(name, stage, rows, positives, None)
        found = self.predictions.result()
        kept = {metric: found[metric] for metric in metrics if not np.isnan(found[metric])}
        return SliceFigures(name, stage, rows, positives, kept, self._intervals(kept) if self.draws else {})

    def _intervals(self, kept: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Of AUC and log loss; GAUC would have to be sorted anew in every draw."""
        logits, labels, _ = self.predictions.columns()
        exact = logits.astype(np.float64)
        statistics = {"auc": WeightedAuc(logits, labels),
                      "logloss": WeightedMean(np.logaddexp(0.0, exact) - labels * exact)}
        requests = np.concatenate(self._requests)
        return {metric: interval(statistics[metric], requests, draws=self.draws) for metric in statistics
                if metric in kept}


def by_name(figures: Sequence[SliceFigures]) -> dict[str, dict[str, int | float | str]]:
    """Plain values by slice and name: "rows/<stage>", "positives/<stage>" and the metrics, for which "too few" may
    stand; recalls of the catalogue have names of their own, and beside them "requests" and "positives"."""
    found: dict[str, dict[str, int | float | str]] = {}
    for one in figures:
        values, end = found.setdefault(one.slice, {}), f"/{one.stage}" if one.stage else ""
        values[f"rows{end}" if end else "requests"], values[f"positives{end}"] = one.rows, one.positives
        if one.metrics is None:
            values |= {f"{metric}{end}": TOO_FEW for metric in (METRICS if end else ("recall",))}
            continue
        values |= {f"{metric}{end}": value for metric, value in one.metrics.items()}
        for metric, (low, high) in one.intervals.items():
            values |= {f"{metric}_low{end}": low, f"{metric}_high{end}": high}
    return found
