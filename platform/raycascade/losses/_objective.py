"""The frame of every objective: checks at the door, padding blanked, a float32 island around the arithmetic."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from raycascade.batch import Targets
from raycascade.errors import ConfigError, DataError
from raycascade.losses import LossOutput, SharedNegatives
from raycascade.plugins import PluginConfig
from raycascade.schema import near_miss
from raycascade.truth import top_k_membership

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredLists:
    """What an objective computes with: scores in cascade order, float32 or float64, and the targets; 0 on padding.

    `length_Q` is N, the number of real candidates of each request.
    """

    scores: Mapping[str, Tensor]
    targets: Targets
    mask_QC: Tensor
    length_Q: Tensor
    dtype: torch.dtype
    shared: SharedNegatives | None = None

    @property
    def k(self) -> int:
        """K, the size of the truth."""
        return self.targets.k

    @cached_property
    def membership_QC(self) -> Tensor:
        """t: membership in the best K by relevance (truth.py), in the dtype of the scores."""
        return top_k_membership(self.targets.relevance_QC, self.mask_QC, self.k, dtype=self.dtype)

    @cached_property
    def relevance_QC(self) -> Tensor:
        """Graded relevance, 0 on padding."""
        return torch.where(self.mask_QC, self.targets.relevance_QC, 0)

    @cached_property
    def reached_QC(self) -> Tensor:
        """Deepest logged level, 0 on padding."""
        return torch.where(self.mask_QC, self.targets.reached_QC, 0)

    def label_QC(self, name: str) -> Tensor:
        """A feedback label in the dtype of the scores, NaN where unobserved and on padding."""
        if name not in self.targets.labels:
            known = near_miss(name, set(self.targets.labels))
            raise ConfigError(f"loss.label: {name!r} is not a label of the log{known}")
        return torch.where(self.mask_QC, self.targets.labels[name].to(self.dtype), torch.nan)


class Objective(nn.Module, ABC):
    """Base of the losses. A subclass has `Config(PluginConfig)`, and `compute` on clean lists; the rest is here.

    Scores must come in the order of `stage_names`. Raises DataError for tensors that do not fit together and
    ConfigError for options and quotas that do not fit the stages; both look at shapes and types only, never at values.
    """

    min_stages: ClassVar[int] = 2

    def __init__(self, config: PluginConfig, stage_names: tuple[str, ...]) -> None:
        super().__init__()
        self.stage_names = tuple(stage_names)
        self._warned = False
        if len(self.stage_names) < self.min_stages:
            raise ConfigError(f"loss: {type(self).__name__} joins at least {self.min_stages} stages, "
                              f"got {list(self.stage_names)}; use bce or softmax for a single stage")

    @abstractmethod
    def compute(self, lists: ScoredLists) -> LossOutput:
        """The objective itself, called with autocast off."""

    def reads_truth(self) -> bool:
        """Whether the best K by relevance is needed, and so `targets.k`."""
        return True

    def forward(
        self, scores: Mapping[str, Tensor], targets: Targets, shared: SharedNegatives | None = None
    ) -> LossOutput:
        """Raw logits [Q, C] of every stage -> total with graph, and its parts detached."""
        self._check(scores, targets)
        mask_QC = targets.mask_QC
        with torch.autocast(mask_QC.device.type, enabled=False):
            wide = any(s.dtype == torch.float64 for s in scores.values())
            dtype = torch.float64 if wide else torch.float32
            clean = {name: torch.where(mask_QC, s.to(dtype), 0.0) for name, s in scores.items()}
            output = self.compute(ScoredLists(clean, targets, mask_QC, mask_QC.sum(dim=1), dtype, shared))
        return LossOutput(output.total, {name: part.detach() for name, part in output.parts.items()})

    def quotas(self, chosen: tuple[int, ...] | None, lists: ScoredLists) -> tuple[int, ...]:
        """The chosen widths, or `targets.keep`; warns once where they cannot express a cascade on these lists."""
        widths, num_candidates = chosen or lists.targets.keep, lists.mask_QC.shape[1]
        problem = ""
        if min(widths) >= num_candidates:
            problem = f"no quota is below the list length {num_candidates}, so no stage is asked to choose"
        elif lists.k > widths[-1]:
            problem = f"the truth has {lists.k} candidates but the last quota is {widths[-1]}"
        elif any(after > before for before, after in pairwise(widths)):
            problem = "the quotas grow along the stages"
        if problem and not self._warned:
            log.warning("%s: quotas %s: %s; set lists.quotas and lists.k", type(self).__name__, list(widths), problem)
            self._warned = True
        return widths

    def check_per_stage(self, option: str, values: tuple[int, ...] | tuple[float, ...] | None) -> None:
        """ConfigError unless an option has one value per stage; None is fine."""
        if values is not None and len(values) != len(self.stage_names):
            raise ConfigError(f"loss.{option}: expected one value for each of {list(self.stage_names)}, "
                              f"got {list(values)}")

    def check_quotas(self, option: str, widths: tuple[int, ...] | None) -> None:
        """ConfigError unless an option has one width of at least 1 per stage; None is fine."""
        self.check_per_stage(option, widths)
        if widths is not None and min(widths) < 1:
            raise ConfigError(f"loss.{option}: widths must be at least 1, got {list(widths)}")

    def _check(self, scores: Mapping[str, Tensor], targets: Targets) -> None:
        if tuple(scores) != self.stage_names:
            raise DataError(f"loss: expected scores of {list(self.stage_names)} in this order, got {list(scores)}")
        if targets.mask_QC.dtype != torch.bool or targets.mask_QC.ndim != 2:
            seen = f"{targets.mask_QC.dtype} {list(targets.mask_QC.shape)}"
            raise DataError(f"loss: mask_QC must be bool [Q, C], got {seen}")
        fields = {f"scores[{name!r}]": s for name, s in scores.items()}
        fields |= {"relevance_QC": targets.relevance_QC, "reached_QC": targets.reached_QC}
        fields |= {f"labels[{name!r}]": label for name, label in targets.labels.items()}
        if targets.log_q_QC is not None:
            fields["log_q_QC"] = targets.log_q_QC
        for name, field in fields.items():
            if field.shape != targets.mask_QC.shape:
                raise DataError(f"loss: {name} has shape {list(field.shape)}, expected {list(targets.mask_QC.shape)} "
                                "like mask_QC; every stage scores every candidate of the list")
        if self.reads_truth() and targets.k < 1:
            raise ConfigError(f"lists.k: expected at least 1, got {targets.k}")
        if self.min_stages > 1 and (len(targets.keep) != len(scores) or min(targets.keep, default=0) < 1):
            raise ConfigError(f"lists.quotas: expected {len(scores)} widths of at least 1 for {list(scores)}, "
                              f"got {list(targets.keep)}")
