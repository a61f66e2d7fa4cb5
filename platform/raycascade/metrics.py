"""What a cascade is judged by: joint and stage recall, NDCG; AUC, GAUC, log loss and calibration.

Metrics are accumulators: `update` with a batch, `merge` with another worker's, `result` at the end. Shuffling
candidates, another batch size or another sharding gives the same floats. Selection is by (score descending, tie key
ascending); the tie key depends on nothing but the ids, because logged lists hold the positives first.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycascade.batch import Targets
from raycascade.errors import DataError
from raycascade.keys import fold, to_keys
from raycascade.selection import coordination, first, funnel
from raycascade.truth import top_k_membership

SEED = 1024
CALIBRATION_BINS = 20
BINARY_METRICS = ("auc", "gauc", "logloss", "calibration_error", "predicted_over_observed")
_UNIT = 1 << 40  # values of single requests are summed as integers of 2^-40, so that the order of a sum cannot show


def tie_keys(
    seed: int, request_ids: "Sequence[object] | np.ndarray", item_keys_QC: "Tensor | np.ndarray"
) -> np.ndarray:
    """uint64 [Q, C]: a 64-bit mix of seed, request id (integer or string) and item key; the lower key wins a tie."""
    items_QC = item_keys_QC if isinstance(item_keys_QC, np.ndarray) else item_keys_QC.cpu().numpy()
    if len(request_ids) != len(items_QC):
        raise DataError(f"metrics: {len(request_ids)} request ids for {len(items_QC)} requests; pass one id a request")
    return fold([_keys(request_ids)[:, None], items_QC], seed=seed)


def _keys(ids: "Sequence[object] | Tensor | np.ndarray") -> np.ndarray:
    if isinstance(ids, Tensor):
        return ids.cpu().numpy().astype(np.int64)
    return to_keys(pa.array(ids) if isinstance(ids, np.ndarray) else pa.array(list(ids)))


def ndcg(scores_QC: np.ndarray, gains_QC: np.ndarray, mask_QC: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k per request with linear gain and discount 1 / log2(1 + rank); 0 where the ideal is 0.

    A group of tied scores gets its mean gain times the sum of its discounts (McSherry and Najork, ECIR 2008).
    """
    num_candidates = scores_QC.shape[1]
    discount_C = np.where(np.arange(num_candidates) < k, 1.0 / np.log2(np.arange(num_candidates) + 2.0), 0.0)
    gains_QC = np.where(mask_QC, gains_QC, 0.0)
    sinking_QC = np.where(mask_QC, -scores_QC, np.inf)
    order_QC = np.lexsort((sinking_QC, ~mask_QC), axis=-1)
    sorted_QC, real_QC = (np.take_along_axis(x, order_QC, axis=1) for x in (sinking_QC, mask_QC))
    gains_sorted_QC = np.take_along_axis(gains_QC, order_QC, axis=1)
    starts_QC = np.ones_like(mask_QC)
    starts_QC[:, 1:] = (sorted_QC[:, 1:] != sorted_QC[:, :-1]) | (real_QC[:, 1:] != real_QC[:, :-1])
    group = starts_QC.reshape(-1).cumsum() - 1
    mean_gain = np.bincount(group, gains_sorted_QC.reshape(-1)) / np.bincount(group)
    dcg_Q = (mean_gain[group].reshape(gains_QC.shape) * discount_C).sum(axis=1)
    ideal_Q = (-np.sort(np.where(mask_QC, -gains_QC, 0.0), axis=1) * discount_C).sum(axis=1)
    return np.divide(dcg_Q, ideal_Q, out=np.zeros_like(dcg_Q), where=ideal_Q > 0)


class _Means:
    """Mergeable means: exact sums and counts by name."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, values_Q: np.ndarray) -> None:
        scaled = np.rint(values_Q.astype(np.float64) * _UNIT).astype(np.int64)
        self.sums[name] = self.sums.get(name, 0) + int(scaled.sum())
        self.counts[name] = self.counts.get(name, 0) + len(scaled)

    def merge(self, other: "_Means") -> None:
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + total
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def result(self) -> dict[str, float]:
        return {name: total / self.counts[name] / _UNIT for name, total in self.sums.items() if self.counts[name]}


class ListMetrics:
    """Metrics of a cascade on logged lists; `quotas` are the widths of the stages on the list, the truth is the best k.

    Names, for k = 10 and quotas (30, 20): `joint_recall@10@20`; `survival@10@30/<stage>`, the truth left after each
    stage of the cascade; `recall@10@30/<stage>`, a stage alone on the full list; `ndcg@10/<stage>`; and how the stages
    go together: `lost/<stage>`, `lost_wanted/<stage>`, `lost_wanted/<stage>/<later stage>`, `wasted/<stage>`
    (`selection.coordination`). All are means over requests; requests without candidates are counted in `num_skipped`.

    `batch_means`: the mean of the means of batches of exactly this many requests, shorter ones dropped, as published
    figures of LCRON are made. It depends on the batching by definition.
    """

    def __init__(
        self, stage_names: Sequence[str], quotas: Sequence[int], k: int, seed: int = SEED, *,
        batch_means: int | None = None,
    ) -> None:
        assert len(stage_names) == len(quotas), (stage_names, quotas)
        assert min(*quotas, k) >= 1, (quotas, k)
        self.stage_names, self.quotas, self.k, self.seed = tuple(stage_names), tuple(quotas), k, seed
        self.batch_means = batch_means
        self.num_requests = self.num_skipped = 0
        self._means = _Means()
        self._draws = np.random.default_rng(seed)

    def update(
        self, scores: Mapping[str, Tensor], targets: Targets, request_ids: Sequence[object],
        item_keys_QC: "Tensor | np.ndarray | None",
    ) -> None:
        """Scores [Q, C] of every stage in cascade order. Without ids (empty, None) ties are broken by random draws.

        Raises DataError for a NaN score and for scores that are not of the stages.
        """
        if tuple(scores) != self.stage_names:
            raise DataError(f"metrics: expected scores of {list(self.stage_names)} in this order, got {list(scores)}")
        mask_QC = targets.mask_QC.cpu().numpy()
        some_Q = mask_QC.any(axis=1)
        if mask_QC.shape[1] == 0 or not some_Q.any():
            self.num_skipped += len(mask_QC)
            return
        if len(request_ids) and item_keys_QC is not None:
            keys_QC = tie_keys(self.seed, request_ids, item_keys_QC)
        else:
            keys_QC = self._draws.integers(0, 1 << 63, mask_QC.shape, dtype=np.uint64)
        values = {name: s.detach().cpu().double().numpy() for name, s in scores.items()}
        for name, values_QC in values.items():
            if np.isnan(values_QC[mask_QC]).any():
                raise DataError(f"metrics: stage {name!r} scored NaN; its training diverged, lower train.lr")
        self.num_skipped += int((~some_Q).sum())
        self.num_requests += int(some_Q.sum())
        for name, values_Q in self._values(values, targets, keys_QC, mask_QC).items():
            self._add(name, values_Q[some_Q])

    def _values(
        self, scores: dict[str, np.ndarray], targets: Targets, keys_QC: np.ndarray, mask_QC: np.ndarray
    ) -> dict[str, np.ndarray]:
        relevance_QC = targets.relevance_QC.cpu()
        truth_QC = top_k_membership(relevance_QC, targets.mask_QC.cpu(), self.k, dtype=torch.float64).numpy()
        gains_QC = relevance_QC.double().numpy()
        size_Q = np.maximum(truth_QC.sum(axis=1), np.finfo(np.float64).tiny)
        survivors, values = funnel(scores, self.quotas, keys_QC, mask_QC), {}
        for stage, quota in zip(self.stage_names, self.quotas, strict=True):
            first_QC = first(scores[stage], quota, keys_QC, mask_QC)
            values[f"survival@{self.k}@{quota}/{stage}"] = np.where(survivors[stage], truth_QC, 0).sum(axis=1) / size_Q
            values[f"recall@{self.k}@{quota}/{stage}"] = np.where(first_QC, truth_QC, 0).sum(axis=1) / size_Q
            values[f"ndcg@{self.k}/{stage}"] = ndcg(scores[stage], gains_QC, mask_QC, self.k)
        joint = f"joint_recall@{self.k}@{self.quotas[-1]}"
        last = values[f"survival@{self.k}@{self.quotas[-1]}/{self.stage_names[-1]}"]
        return {joint: last, **values, **coordination(scores, self.quotas, keys_QC, mask_QC, truth_QC, survivors)}

    def _add(self, name: str, values_Q: np.ndarray) -> None:
        if self.batch_means is None:
            self._means.add(name, values_Q)
        elif len(values_Q) == self.batch_means:
            self._means.add(name, values_Q.mean(keepdims=True))

    def merge(self, other: "ListMetrics") -> None:
        """Takes in what another worker saw."""
        mine, theirs = ((m.stage_names, m.quotas, m.k, m.seed, m.batch_means) for m in (self, other))
        assert mine == theirs, (mine, theirs)
        self.num_requests += other.num_requests
        self.num_skipped += other.num_skipped
        self._means.merge(other._means)

    def result(self) -> dict[str, float]:
        """Means by name; empty before the first request."""
        return self._means.result()

    def survival(self) -> dict[str, float]:
        """Share of the truth that is left after each stage, in cascade order: the survival curve."""
        prefix, means = f"survival@{self.k}@", self.result()
        return {name.partition("/")[2]: value for name, value in means.items() if name.startswith(prefix)}


class BinaryMetrics:
    """AUC, GAUC, log loss and calibration of logits for one feedback label.

    auc: the share of pairs of a positive and a negative row that the logits order rightly, a tie counting half.
    gauc: sum over users of rows x AUC / sum of rows, of the users who have both classes (Zhou et al., Deep Interest
    Network, KDD 2018, section 6.3; rows are impressions). logloss: the mean of softplus(s) - y s.
    calibration_error: the mean over rows of |mean prediction - rate of positives| of the row's bin, of
    CALIBRATION_BINS bins of equal mass (Naeini et al., AAAI 2015, there with bins of equal width).
    predicted_over_observed: sum of predictions / number of positives.

    An exact AUC needs every score: rows are kept as float32 logit (float64 where that is given), label
    and group key, 13 bytes each. A label of NaN
    is left out, so that padding and unobserved feedback can be passed as they are. What is not defined is NaN.
    """

    def __init__(self) -> None:
        self._chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._found: dict[str, float] | None = None  # of the rows so far

    def update(
        self, logits: "Tensor | np.ndarray", labels: "Tensor | np.ndarray",
        group_ids: "Sequence[object] | Tensor | np.ndarray",
    ) -> None:
        """Logits and labels of one shape, [rows] or [Q, C]; group ids (users) per row, or per request for [Q, C]."""
        scores, truth = (_numbers(x) for x in (logits, labels))
        groups = _keys(group_ids)
        if scores.ndim == 2:
            groups = np.repeat(groups, scores.shape[1])
        scores, truth = scores.reshape(-1), truth.reshape(-1)
        if not len(scores) == len(truth) == len(groups):
            raise DataError(f"metrics: {len(scores)} logits, {len(truth)} labels and {len(groups)} group ids; "
                            "pass one of each per row")
        known = ~np.isnan(truth)
        if np.isnan(scores[known]).any():
            raise DataError("metrics: a logit is NaN; the training diverged, lower train.lr")
        self._chunks.append((scores[known], truth[known] > 0.5, groups[known]))
        self._found = None

    def merge(self, other: "BinaryMetrics") -> None:
        """Takes in what another worker saw."""
        self._chunks.extend(other._chunks)
        self._found = None

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits, labels and groups of all rows; the chunks become one, so that nothing is held twice."""
        if not self._chunks:
            return np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, np.int64)
        logits, labels, groups = (np.concatenate(parts) for parts in zip(*self._chunks, strict=True))
        self._chunks = [(logits, labels, groups)]
        return logits, labels, groups

    @property
    def num_rows(self) -> int:
        """Rows with an observed label."""
        return sum(len(logits) for logits, _, _ in self._chunks)

    @property
    def num_positives(self) -> int:
        """Rows with a positive label."""
        return sum(int(labels.sum()) for _, labels, _ in self._chunks)

    def result(self) -> dict[str, float]:
        """The BINARY_METRICS by name."""
        self._found = self._found or self._measured()
        return dict(self._found)

    def _measured(self) -> dict[str, float]:
        logits, labels, groups = self.columns()
        if len(logits) == 0:
            return dict.fromkeys(BINARY_METRICS, math.nan)
        auc, _ = grouped_auc(logits, labels, np.zeros(len(logits), np.int8))
        gauc, _ = grouped_auc(logits, labels, groups)
        exact = logits.astype(np.float64)
        logloss = math.fsum(np.logaddexp(0.0, exact) - labels * exact) / len(logits)
        predicted, observed, rows = self.calibration_curve()
        error = float((np.abs(predicted - observed) * rows).sum() / rows.sum())
        total, positives = math.fsum(_probabilities(exact)), int(labels.sum())
        ratio = total / positives if positives else math.nan
        return dict(zip(BINARY_METRICS, (auc, gauc, logloss, error, ratio), strict=True))

    def num_skipped_groups(self) -> int:
        """Groups that GAUC leaves out because all their labels are equal."""
        return grouped_auc(*self.columns())[1]

    def calibration_curve(self, bins: int = CALIBRATION_BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mean prediction, rate of positives, rows) of bins of equal mass, by rising prediction. Tied predictions
        share their rate, so that no order within a tie can look like an error."""
        logits, labels, _ = self.columns()
        order = np.argsort(logits, kind="stable")
        _, inverse, counts = np.unique(logits[order], return_inverse=True, return_counts=True)
        rate = (np.bincount(inverse, labels[order], minlength=len(counts)) / counts)[inverse]
        predicted = _probabilities(logits[order].astype(np.float64))
        parts = [part for part in np.array_split(np.arange(len(order)), bins) if len(part)]
        curve = [(predicted[part].mean(), rate[part].mean(), len(part)) for part in parts]
        means, rates, rows = np.asarray(curve, np.float64).reshape(-1, 3).T
        return means, rates, rows.astype(np.int64)


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logits))


def _numbers(values: "Tensor | np.ndarray") -> np.ndarray:
    """float64 as it is, anything else as float32."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return array if array.dtype == np.float64 else array.astype(np.float32)


def grouped_auc(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """Exact AUC per group (ties count half) averaged with the groups' numbers of rows as weights; groups of one class
    are skipped and counted. NaN if no group is left."""
    order = np.lexsort((logits, groups))
    logits, labels, groups = logits[order], labels[order], groups[order]
    new_group = np.concatenate(([True], groups[1:] != groups[:-1]))[: len(groups)]
    new_tie = new_group | np.concatenate(([True], logits[1:] != logits[:-1]))[: len(groups)]
    group, tie = new_group.cumsum() - 1, new_tie.cumsum() - 1
    position = np.arange(len(logits)) - np.flatnonzero(new_group)[group] + 1.0
    rank = (np.bincount(tie, position) / np.bincount(tie))[tie]
    rows = np.bincount(group).astype(np.float64)
    positives = np.bincount(group, labels, minlength=len(rows))
    above = np.bincount(group, rank * labels, minlength=len(rows)) - positives * (positives + 1) / 2
    both = (positives > 0) & (positives < rows)
    if not both.any():
        return math.nan, int((~both).sum())
    auc = above[both] / (positives * (rows - positives))[both]
    return math.fsum(auc * rows[both]) / float(rows[both].sum()), int((~both).sum())
