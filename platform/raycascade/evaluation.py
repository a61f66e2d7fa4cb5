"""Measuring a bundle on a split: logged lists and labels, the whole catalogue, and popularity and random beside them.

A list may hold one candidate, as every row of a CTR table does. Everything is also measured on items that training has
not seen or seldom seen (`slices.py`). Accumulators are mergeable: any number of workers, any batch size, the same
figures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycascade.batch import Batch, collate
from raycascade.bundle import Bundle
from raycascade.cascade import Ranking, excluded_mask, without_excluded
from raycascade.config import Stage
from raycascade.indexes import Candidates
from raycascade.items import ItemTable
from raycascade.keys import to_keys
from raycascade.metrics import BINARY_METRICS, BinaryMetrics, ListMetrics
from raycascade.schema import FIRST_ROW
from raycascade.slices import FEWEST_POSITIVES, METRICS, SLICES, Slice, SliceFigures, members, training_impressions

BASELINES = ("popularity", "random")
ORDER_METRICS = ("auc", "gauc")


@dataclass
class CatalogueRecall:
    """Micro recall of held-out positives: hits and positives, summed over requests.

    `hits`: by name, "recall@<keep>" for each stage's survivors and "recall@<width>/<stage>" for every stage cut to the
    width of every later one, so that a stage can be held against the one before it at the same cut.
    """

    positives: int = 0
    requests: int = 0
    hits: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, hits: float) -> None:
        """Adds hits of one measure."""
        self.hits[name] = self.hits.get(name, 0.0) + hits

    def merge(self, other: "CatalogueRecall") -> None:
        """Adds another accumulator."""
        self.positives += other.positives
        self.requests += other.requests
        for name, hits in other.hits.items():
            self.add(name, hits)

    def result(self) -> dict[str, float]:
        """Recalls by name; empty if there was no positive."""
        return {name: hits / self.positives for name, hits in self.hits.items()} if self.positives else {}


class Measured:
    """Everything that was measured of one bundle on one split; mergeable over workers.

    `stages`: of every stage's score for the schema's positive label; `tasks`: of every task's logit for its own;
    `slices`: of every stage's score on each slice; `catalogues`: recall of the positives of each slice.
    """

    def __init__(
        self, names: tuple[str, ...], quotas: tuple[int, ...], k: int, *, tasks: tuple[str, ...] = (),
        unscaled: tuple[str, ...] = (), draws: int = 0,
    ) -> None:
        """`tasks`: "<stage>/<task>" of every stage with tasks; `unscaled`: the stages whose scores are no logits, but
        an order without probabilities; `draws`: of the intervals of the slices, 0 for none."""
        self.lists = ListMetrics(names, quotas, k)
        self.slices, self.unscaled = {name: {s: Slice(draws=draws) for s in SLICES} for name in names}, unscaled
        self.tasks = {name: BinaryMetrics() for name in tasks}
        self.catalogues = {name: CatalogueRecall() for name in SLICES}
        self.baseline_lists = {name: ListMetrics(names, quotas, k) for name in BASELINES}
        self.baseline_catalogue = {name: CatalogueRecall() for name in BASELINES}

    @property
    def stages(self) -> dict[str, BinaryMetrics]:
        """Of all rows."""
        return {name: slices["all"].predictions for name, slices in self.slices.items()}

    @property
    def catalogue(self) -> CatalogueRecall:
        """Of all positives."""
        return self.catalogues["all"]

    def merge(self, other: "Measured") -> None:
        """Adds what another worker measured."""
        self.lists.merge(other.lists)
        for name, slices in self.slices.items():
            for kind, one in slices.items():
                one.merge(other.slices[name][kind])
        for name, task in self.tasks.items():
            task.merge(other.tasks[name])
        for name, recall in self.catalogues.items():
            recall.merge(other.catalogues[name])
        for name in BASELINES:
            self.baseline_lists[name].merge(other.baseline_lists[name])
            self.baseline_catalogue[name].merge(other.baseline_catalogue[name])

    def metrics(self) -> dict[str, float]:
        """All figures of the cascade by name; what is not defined on this split is left out."""
        labels = {f"{metric}/{name}": value for name, measures in self.predictions().items()
                  for metric, value in measures.items()}
        last = {metric: labels[f"{metric}/{self.lists.stage_names[-1]}"] for metric in BINARY_METRICS
                if f"{metric}/{self.lists.stage_names[-1]}" in labels}
        found = {**self.catalogue.result(), **self.lists.result(), **last, **labels}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def predictions(self) -> dict[str, dict[str, float]]:
        """BINARY_METRICS by "<stage>" and "<stage>/<task>"; of a score that is no logit those of its order only."""
        found = {}
        for name, measures in {**self.stages, **self.tasks}.items():
            kept = ORDER_METRICS if name in self.unscaled else BINARY_METRICS
            found[name] = {metric: value for metric, value in measures.result().items() if metric in kept}
        return found

    def slice_figures(self) -> list[SliceFigures]:
        """Slice by slice: every stage's score against the positive label, where the log has one, then the catalogue's
        recalls, which are shares of positives: only those can be too few."""
        found = []
        for kind in SLICES:
            for name, slices in self.slices.items():
                metrics = ORDER_METRICS if name in self.unscaled else METRICS
                if self.stages[name].num_rows:
                    found.append(slices[kind].figures(kind, name, metrics=metrics))
            recall = self.catalogues[kind]
            if self.catalogue.positives:
                enough = recall.positives >= FEWEST_POSITIVES
                found.append(SliceFigures(kind, "", recall.requests, recall.positives,
                                          recall.result() if enough else None))
        return found

    def baselines(self) -> dict[str, dict[str, float]]:
        """The same names for recency popularity and for random (its expected value on the catalogue)."""
        return {name: {**self.baseline_catalogue[name].result(), **self.baseline_lists[name].result()}
                for name in BASELINES}


class Evaluator:
    """Measures a bundle request by request; `measured` holds the sums."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        stages = bundle.config.stages
        self.measured = Measured(bundle.cascade.names, bundle.cascade.quotas, bundle.config.lists.k,
                                 tasks=tuple(f"{stage.name}/{task}" for stage in stages for task in stage.tasks),
                                 unscaled=tuple(s.name for s in stages if not _is_logit(bundle, s)),
                                 draws=bundle.config.evaluate.bootstrap)
        self.impressions_N = training_impressions(bundle.items)  # by item row
        self.popularity = Popularity(bundle.items, bundle.config.evaluate.popularity_hours)

    @torch.no_grad()
    def update(self, requests: pa.Table) -> None:
        """Adds encoded requests of a split."""
        bundle = self.bundle
        batch = collate(requests, bundle.items, keep=bundle.cascade.quotas, k=bundle.config.lists.k)
        self._on_lists(batch, to_keys(requests["user_key"]), to_keys(requests["request_id"]))
        if bundle.state.schema.positive and bundle.cascade.searches:
            self._on_catalogue(batch, requests)

    def _on_lists(self, batch: Batch, users_Q: np.ndarray, requests_Q: np.ndarray) -> None:
        assert batch.targets is not None
        logits = self.bundle.cascade.logits(batch)
        scores = self.bundle.cascade.scores_from(logits)
        popular_QC = torch.from_numpy(self.popularity.scores_N[batch.candidates_QC.numpy()])
        flat = {"popularity": popular_QC, "random": torch.zeros_like(popular_QC)}  # equal scores: the tie key draws
        self.measured.lists.update(scores, batch.targets, batch.request_ids, batch.candidates_QC)
        for name in BASELINES:
            same = dict.fromkeys(scores, flat[name])
            self.measured.baseline_lists[name].update(same, batch.targets, batch.request_ids, batch.candidates_QC)
        self._on_labels(batch, users_Q, requests_Q, logits, scores)

    def _on_labels(
        self, batch: Batch, users_Q: np.ndarray, requests_Q: np.ndarray, logits: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
    ) -> None:
        assert batch.targets is not None
        labels, mask_QC = batch.targets.labels, batch.mask_QC
        known = {name: torch.where(mask_QC, label_QC, torch.nan) for name, label_QC in labels.items()}
        positive = self.bundle.state.schema.positive
        of_slice = members(self.impressions_N[batch.candidates_QC.numpy()])
        for stage in self.bundle.config.stages:
            for name, one in self.measured.slices[stage.name].items() if positive in known else ():
                one.update(scores[stage.name], known[positive], of_slice[name], users_Q, requests_Q)
            for task, logits_QC in zip(stage.tasks, logits[stage.name].unbind(2), strict=False):
                self.measured.tasks[f"{stage.name}/{task}"].update(logits_QC, known[task], users_Q)

    def _on_catalogue(self, batch: Batch, requests: pa.Table) -> None:
        assert batch.targets is not None
        truth_QC = (torch.nan_to_num(batch.targets.labels[self.bundle.state.schema.positive]) > 0.5) & batch.mask_QC
        truth_QC &= ~excluded_mask(batch)
        chosen = np.flatnonzero(truth_QC.any(1).numpy())
        if len(chosen) == 0:
            return
        truth = _rows_of(batch.candidates_QC[chosen], truth_QC[chosen])
        known = [members(self.impressions_N[rows]) for rows in truth]
        truths = {name: [rows[which[name]] for rows, which in zip(truth, known, strict=True)] for name in SLICES}
        bare = self.bundle.batch(requests.take(chosen))
        ranking = self.bundle.cascade.recommend(bare, self.bundle.index, self.bundle.items)
        for name, accumulator in [*self.measured.catalogues.items(),
                                  *(("all", one) for one in self.measured.baseline_catalogue.values())]:
            accumulator.positives += sum(map(len, truths[name]))
            accumulator.requests += sum(1 for rows in truths[name] if len(rows))
        for name, accumulator in self.measured.catalogues.items():
            self._count(accumulator, ranking, truths[name])
        self._count_baselines(truth, bare)

    def _count(self, accumulator: CatalogueRecall, ranking: Ranking, truth: list[np.ndarray]) -> None:
        keeps = self.bundle.cascade.keeps
        for stage, keep in zip(ranking.stages, keeps, strict=True):
            for width in sorted({width for width in keeps if width <= keep}, reverse=True):
                accumulator.add(f"recall@{width}/{stage.name}", count_hits(stage.kept(width)[0], truth))
                if width == keep:
                    accumulator.hits[f"recall@{width}"] = accumulator.hits[f"recall@{width}/{stage.name}"]

    def _count_baselines(self, truth: list[np.ndarray], batch: Batch) -> None:
        keeps, measured = self.bundle.cascade.keeps, self.measured
        exclude = batch.exclude or tuple(np.zeros(0, np.int64) for _ in truth)
        popular_QK = self.popularity.top(exclude, max(keeps))
        free_Q = [max(1, self.bundle.items.num_items - len(np.unique(rows))) for rows in exclude]
        for width in dict.fromkeys(keeps):
            expected = sum(len(rows) * min(1.0, width / free) for rows, free in zip(truth, free_Q, strict=True))
            measured.baseline_catalogue["popularity"].add(f"recall@{width}", count_hits(popular_QK[:, :width], truth))
            measured.baseline_catalogue["random"].add(f"recall@{width}", expected)


def _is_logit(bundle: Bundle, stage: Stage) -> bool:
    """Whether a stage scores by the logit of a probability; a fusion and trees fitted to an order do not."""
    return stage.fusion is None and getattr(bundle.cascade.model(stage.name), "calibrated", True)


class Popularity:
    """Recency popularity: positives (or exposures) of the last hours of the training log."""

    def __init__(self, items: ItemTable, hours: int) -> None:
        state = items.state
        name = state.schema.positive or "exposure"
        counts = state.counters.as_of(items.all_rows, state.as_of_ms, name, hours * 3_600_000)
        self.scores_N = np.concatenate([np.full(FIRST_ROW, -1.0, np.float32), counts])  # indexed by item row
        self.order_N = items.all_rows[np.argsort(-counts, kind="stable")]

    def top(self, exclude: tuple[np.ndarray, ...], width: int) -> np.ndarray:
        """The most popular rows [Q, width] that each request does not exclude."""
        most = max((len(rows) for rows in exclude), default=0)
        head = self.order_N[:width + most]
        rows_QK = np.broadcast_to(head, (len(exclude), len(head)))
        return without_excluded(Candidates(rows_QK, self.scores_N[rows_QK]), exclude, width).rows_QK


def count_hits(rows_QK: np.ndarray, truth: list[np.ndarray]) -> float:
    """How many true rows are among the kept ones, over all requests."""
    request_E = np.repeat(np.arange(len(truth)), [len(rows) for rows in truth])
    span = int(max(rows_QK.max(initial=0), max((rows.max(initial=0) for rows in truth), default=0))) + 1
    kept = (np.arange(len(rows_QK))[:, None] * span + rows_QK)[rows_QK >= FIRST_ROW]
    return float(np.isin(request_E * span + np.concatenate(truth), kept).sum())


def _rows_of(candidates_QC: Tensor, mask_QC: Tensor) -> list[np.ndarray]:
    """Distinct true rows of every request."""
    return [np.unique(rows[mask].numpy()) for rows, mask in zip(candidates_QC, mask_QC, strict=True)]
