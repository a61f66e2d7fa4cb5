"""Listwise softmax with popularity correction: each positive against the negatives of its list."""

from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor
from torch.nn import functional

from raycascade.losses import LossOutput
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.losses._reduce import request_mean
from raycascade.losses._sorting import LOG_ZERO
from raycascade.plugins import PluginConfig


class ListwiseSoftmax(Objective):
    """Per positive j: -ln( e^z_j / (e^z_j + sum over negatives l of e^z_l) ), z = s / temperature - correction log_q.

    The other positives of the list are not among the negatives. Positives are candidates whose `label` exceeds 0.5
    (a candidate without an observed label is a negative), or without `label` the best K, each weighted by its
    membership. Weighted mean over the positives of a request, then mean over the requests that have a positive and a
    negative, summed over the stages. log_q is the log of a candidate's sampling probability (Yi et al., RecSys 2019).
    Works for any depth, one included. Parts: `softmax/<stage>`.

    `over` says what the trainer holds against the positives besides the logged list: nothing, `num_sampled` catalogue
    items drawn by `sample_from`, or the whole catalogue (`SharedNegatives`). `negatives: unobserved` leaves out the
    candidates whose label was observed to be negative: an item that was shown is no fair example of what was not.
    """

    min_stages = 1

    class Config(PluginConfig):
        """Options of softmax."""

        label: str | None = None
        temperature: float = Option(default=1.0, gt=0)
        correction: float = Option(default=1.0, ge=0)
        negatives: Literal["all", "unobserved"] = "all"
        over: Literal["list", "sampled", "catalogue"] = "list"
        num_sampled: int = Option(default=1024, ge=1)
        sample_from: Literal["uniform", "popularity"] = "popularity"

    def __init__(self, config: Config, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.config = config

    def reads_truth(self) -> bool:
        """Only without a label."""
        return self.config.label is None

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        weight_QC = self._weights(lists)
        negative_QC = lists.mask_QC & (weight_QC == 0)
        if self.config.negatives == "unobserved" and self.config.label is not None:
            negative_QC = negative_QC & torch.isnan(lists.label_QC(self.config.label))
        shared_Q = self._shared(lists)
        defined_Q = (weight_QC > 0).any(dim=1) & (negative_QC.any(dim=1) | (shared_Q > LOG_ZERO))
        correction_QC = 0.0
        if lists.targets.log_q_QC is not None and self.config.correction > 0:
            log_q_QC = torch.where(lists.mask_QC, lists.targets.log_q_QC.to(lists.dtype), 0.0)
            correction_QC = self.config.correction * log_q_QC
        parts: dict[str, Tensor] = {}
        for stage, scores_QC in lists.scores.items():
            logit_QC = scores_QC / self.config.temperature - correction_QC
            against_Q = torch.where(negative_QC, logit_QC, LOG_ZERO).logsumexp(dim=1).logaddexp(shared_Q)
            against_Q = torch.where(defined_Q, against_Q, 0.0)
            # blanked before the product: a weight of 0 must not meet an overflow
            loss_QC = torch.where(weight_QC > 0, functional.softplus(against_Q[:, None] - logit_QC), 0.0)
            mean_Q = (weight_QC * loss_QC).sum(dim=1) / torch.where(defined_Q, weight_QC.sum(dim=1), 1.0)
            parts[f"softmax/{stage}"] = request_mean(mean_Q, defined_Q)
        return LossOutput(torch.stack(list(parts.values())).sum(), parts)

    def _shared(self, lists: ScoredLists) -> Tensor:
        """Log of the summed weights of the shared negatives, LOG_ZERO where there are none."""
        shared = lists.shared
        if shared is None:
            return torch.full_like(lists.length_Q, LOG_ZERO, dtype=lists.dtype)
        logit_QS = shared.scores_QS.to(lists.dtype)
        if self.config.temperature != 1.0:
            logit_QS = logit_QS / self.config.temperature
        if shared.log_q_S is not None and self.config.correction > 0:
            logit_QS = logit_QS - self.config.correction * shared.log_q_S.to(lists.dtype)
        return logit_QS.masked_fill(~shared.mask_QS, LOG_ZERO).logsumexp(dim=1)

    def _weights(self, lists: ScoredLists) -> Tensor:
        if self.config.label is None:
            return lists.membership_QC
        return (lists.label_QC(self.config.label) > 0.5).to(lists.dtype)
