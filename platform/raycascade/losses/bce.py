"""Binary cross-entropy per stage: the plain, pointwise way to train a cascade, and the baseline of the others."""

from typing import Annotated

import torch
from pydantic import Field as Option
from torch import Tensor
from torch.nn import functional

from raycascade.batch import Targets
from raycascade.losses import LossOutput
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.losses._reduce import candidate_mean, request_mean
from raycascade.plugins import PluginConfig


class BinaryCrossEntropy(Objective):
    """Sum over stages of mean_{j: reached_j >= e_i} [softplus(s_ij) - y_j s_ij]. Works for any depth, one included.

    y is the membership in the best K, or the feedback label named by `label`, whose unobserved values (NaN) are left
    out of the mean. `entry_levels` e has one level per stage: which candidates a stage learns from; the default
    (0, 1, .., T-1) is "from what entered it". Parts: `bce/<stage>`. A stage with tasks gets `over_tasks` instead.
    """

    min_stages = 1

    class Config(PluginConfig):
        """Options of bce. `task_weights`: of the tasks of a stage, 1 where left out; `task_gammas`: what a task's
        weight is multiplied by after every epoch, 1 where left out."""

        label: str | None = None
        entry_levels: tuple[int, ...] | None = None
        task_weights: dict[str, float] = {}
        task_gammas: dict[str, Annotated[float, Option(gt=0)]] = {}

    def __init__(self, config: Config, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.config = config
        self.check_per_stage("entry_levels", config.entry_levels)
        self.entry_levels = config.entry_levels or tuple(range(len(stage_names)))

    def reads_truth(self) -> bool:
        """Only without a label."""
        return self.config.label is None

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        truth_QC = lists.membership_QC if self.config.label is None else lists.label_QC(self.config.label)
        known_QC = lists.mask_QC & ~truth_QC.isnan()
        truth_QC = torch.where(known_QC, truth_QC, 0.0)
        parts: dict[str, Tensor] = {}
        for (stage, scores_QC), level in zip(lists.scores.items(), self.entry_levels, strict=True):
            seen_QC = known_QC & (lists.reached_QC >= level)
            loss_QC = functional.softplus(scores_QC) - truth_QC * scores_QC
            parts[f"bce/{stage}"] = request_mean(candidate_mean(loss_QC, seen_QC), seen_QC.any(dim=1))
        return LossOutput(torch.stack(list(parts.values())).sum(), parts)

    def over_tasks(
        self, logits_QCT: Tensor, tasks: tuple[str, ...], targets: Targets, *, epoch: int = 0
    ) -> LossOutput:
        """sum_t w_t g_t^epoch (sum of l_t over the candidates whose label t is observed) / max(1, their number), for
        the logits of one stage (the loss of ple, Tang et al. 2020). Parts: `bce/<stage>/<task>`, without the weights.
        """
        (stage,), (level, *_) = self.stage_names, self.entry_levels
        seen_QC = targets.mask_QC & (targets.reached_QC >= level)
        parts: dict[str, Tensor] = {}
        with torch.autocast(logits_QCT.device.type, enabled=False):
            for task, logits_QC in zip(tasks, logits_QCT.unbind(2), strict=True):
                known_QC = seen_QC & ~targets.labels[task].isnan()
                truth_QC = torch.where(known_QC, targets.labels[task], 0.0).to(logits_QC.dtype)
                loss_QC = functional.softplus(logits_QC) - truth_QC * logits_QC
                total = torch.where(known_QC, loss_QC, 0.0).sum()
                parts[f"bce/{stage}/{task}"] = total / known_QC.sum().clamp(min=1)
        weights = [self.config.task_weights.get(task, 1.0) * self.config.task_gammas.get(task, 1.0)**epoch
                   for task in tasks]
        weighted = [weight * part for weight, part in zip(weights, parts.values(), strict=True)]
        return LossOutput(torch.stack(weighted).sum(), {name: part.detach() for name, part in parts.items()})
