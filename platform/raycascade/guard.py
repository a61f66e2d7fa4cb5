"""The guard of a training: what each stage that is served otherwise than it was trained costs against itself."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycascade.batch import Batch, collate
from raycascade.bundle import Bundle
from raycascade.cascade import Cascade, StageOutcome
from raycascade.errors import ExpectationError
from raycascade.metrics import grouped_auc
from raycascade.schema import PADDING
from raycascade.shards import Shards
from raycascade.truth import top_k_membership
from raycascade.variants import is_variant, with_variants
from raycascade.variants_config import Guard


@dataclass(frozen=True)
class Guarded:
    """One stage as it is served beside itself in float32 and uncompiled, on the same requests and candidates.

    `auc` and `auc_fp32`: of the scores of logged candidates for the positive label, or, in a log without one, for who
    is in the truth of the list; None where all labels are equal. `overlap`: of the items that the stage keeps, those
    that it keeps both ways, over the requests where it had to leave something out (None: nowhere). `non_finite`: scores
    that are infinite or no number.
    """

    stage: str
    precision: str
    compile: bool
    requests: int
    auc: float | None
    auc_fp32: float | None
    overlap: float | None
    non_finite: int

    @property
    def auc_change(self) -> float | None:
        """AUC as served minus AUC in float32."""
        return None if self.auc is None or self.auc_fp32 is None else self.auc - self.auc_fp32

    def problems(self, limits: Guard) -> list[str]:
        """What is beyond the limits, in words."""
        found = []
        if self.non_finite:
            found.append(f"{self.non_finite} scores are not finite")
        if self.auc_change is not None and abs(self.auc_change) > limits.max_auc_change:
            found.append(f"AUC changes by {self.auc_change:+.5f}, at most {limits.max_auc_change:g} is allowed")
        if self.overlap is not None and self.overlap < limits.min_overlap:
            found.append(f"overlap of what it keeps {self.overlap:.4f} < {limits.min_overlap:g}")
        return found


def measure(bundle: Bundle, shards: Shards) -> list[Guarded]:
    """Every stage of a cascade in float32 (of `bundle`, which need not be written) that its config serves otherwise, on
    the first requests of the validation split, or of the training split where there is no other."""
    stages = [stage for stage in bundle.config.stages if is_variant(stage)]
    if not stages:
        return []
    varied = with_variants(bundle.cascade, history_len=bundle.state.space.history_len)
    sums = {stage.name: _Sums() for stage in stages}
    count = 0
    for requests in _slice(shards, bundle.config.guard.requests, size=bundle.config.evaluate.batch_size):
        _add(sums, bundle, varied, requests)
        count += len(requests)
    return [Guarded(stage.name, stage.precision, stage.compile, count, **sums[stage.name].result())
            for stage in stages]


def require_faithful(guarded: list[Guarded], limits: Guard) -> None:
    """ExpectationError naming the first stage that is beyond the limits, and how."""
    for one in guarded:
        if problems := one.problems(limits):
            served = one.precision + (", compiled" if one.compile else "")
            raise ExpectationError(
                f"guard: stage {one.stage!r} as served ({served}) differs from fp32 on {one.requests:,} requests: "
                f"{'; '.join(problems)}; no bundle was written. Set stages.{one.stage}.precision=fp32 (and compile="
                "false) or other limits of guard; the same train.run goes on from what it has trained")


def record(guarded: list[Guarded], limits: Guard) -> dict[str, Any]:
    """What a bundle keeps of the guard, as JSON; empty where every stage is served as it was trained."""
    if not guarded:
        return {}
    stages = {one.stage: {name: value for name, value in {**asdict(one), "auc_change": one.auc_change}.items()
                          if name != "stage"} for one in guarded}
    return {"guard": {"limits": limits.model_dump(mode="json"), "stages": stages}}


def _slice(shards: Shards, most: int, *, size: int) -> Iterator[pa.Table]:
    """The first requests of a split, in pieces."""
    for name, group, rows in shards.groups("valid" if shards.splits.get("valid") else "train"):
        if most <= 0:
            return
        table = shards.read_group(name, group).slice(0, most)
        most -= rows
        for start in range(0, len(table), size):
            yield table.slice(start, size)


@dataclass
class _Sums:
    """Of one stage: logged candidates with a label, and what was kept."""

    scores: list[np.ndarray] = field(default_factory=list)
    scores_fp32: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    same: int = 0
    kept: int = 0
    non_finite: int = 0

    def add_list(self, own_QC: Tensor, fp32_QC: Tensor, labels_QC: Tensor, mask_QC: Tensor) -> None:
        known_QC = mask_QC & ~labels_QC.isnan()
        self.non_finite += int((~own_QC[mask_QC].isfinite()).sum())
        self.scores.append(own_QC[known_QC].nan_to_num().numpy())
        self.scores_fp32.append(fp32_QC[known_QC].numpy())
        self.labels.append((labels_QC[known_QC] > 0.5).numpy())

    def add_kept(self, own: StageOutcome, fp32: StageOutcome, entered_Q: np.ndarray) -> None:
        for q in np.flatnonzero(entered_Q > fp32.keep):
            mine, others = (set(rows[q][mask[q]].tolist()) for rows, mask in (own.kept(), fp32.kept()))
            self.same += len(mine & others)
            self.kept += len(others)

    def result(self) -> dict[str, Any]:
        labels = np.concatenate(self.labels)
        auc, auc_fp32 = (grouped_auc(np.concatenate(parts), labels, np.zeros(len(labels), np.int8))[0]
                         for parts in (self.scores, self.scores_fp32))
        return {"auc": None if math.isnan(auc) else auc, "auc_fp32": None if math.isnan(auc_fp32) else auc_fp32,
                "overlap": self.same / self.kept if self.kept else None, "non_finite": self.non_finite}


@torch.no_grad()
def _add(sums: Mapping[str, _Sums], bundle: Bundle, varied: Cascade, requests: pa.Table) -> None:
    """Every stage sees what the stages before it hand on in float32, so that its own share is what is measured."""
    cascade, items = bundle.cascade, bundle.items
    lists = collate(requests, items, keep=cascade.quotas, k=bundle.config.lists.k)
    labels_QC = _labels(lists, bundle.state.schema.positive)
    scores = cascade(lists)
    bare = bundle.batch(requests)
    ranking = cascade.recommend(bare, bundle.index, items)
    for position, name in enumerate(cascade.names):
        if name not in sums:
            continue
        before = ranking.stages[position - 1] if position else None
        own_QC = varied.with_prior(name, varied.score(name, lists),
                                   scores[cascade.names[position - 1]] if position else None)
        sums[name].add_list(own_QC, scores[name], labels_QC, lists.mask_QC)
        if before is None:
            entered_Q = np.full(len(requests), items.num_items) if cascade.searches else bare.mask_QC.sum(1).numpy()
            own = varied.retrieve(bare, bundle.index) if cascade.searches else varied.choose(bare, items)
        else:
            entered_Q = (before.kept()[0] != PADDING).sum(1)
            own = varied.narrow(name, cascade.keeps[position], bare, before, items)
        sums[name].add_kept(own, ranking.stages[position], entered_Q)


def _labels(lists: Batch, positive: str) -> Tensor:
    """[Q, C]: the positive label, or, without one, whether a candidate is in its list's truth by half or more."""
    assert lists.targets is not None, "shards hold logged lists"
    targets = lists.targets
    if positive in targets.labels:
        return targets.labels[positive]
    return top_k_membership(targets.relevance_QC, targets.mask_QC, targets.k)
