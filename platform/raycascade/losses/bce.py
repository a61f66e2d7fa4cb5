"""Binary cross-entropy per stage: the plain, pointwise way to train a cascade, and the baseline of the others."""

import torch
from torch import Tensor
from torch.nn import functional

from raycascade.losses import LossOutput
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.losses._reduce import candidate_mean, request_mean
from raycascade.plugins import PluginConfig


class BinaryCrossEntropy(Objective):
    """Sum over stages of mean_{j: reached_j >= e_i} [softplus(s_ij) - y_j s_ij]. Works for any depth, one included.

    y is the membership in the best K, or the feedback label named by `label`, whose unobserved values (NaN) are left
    out of the mean. `entry_levels` e has one level per stage: which candidates a stage learns from; the default
    (0, 1, .., T-1) is "from what entered it". Parts: `bce/<stage>`.
    """

    min_stages = 1

    class Config(PluginConfig):
        """Options of bce."""

        label: str | None = None
        entry_levels: tuple[int, ...] | None = None

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
