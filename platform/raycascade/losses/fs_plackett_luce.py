"""The logged order of the whole funnel as a sequence of choices (Plackett, 1975; Luce, 1959), the best K first."""

import torch
from pydantic import Field as Option
from torch import Tensor
from torch.nn import functional

from raycascade.losses import LossOutput
from raycascade.losses._neural_sort import LOG_ZERO
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.losses._reduce import request_mean
from raycascade.plugins import PluginConfig
from raycascade.truth import tie_spans


class FsPlackettLuce(Objective):
    """Per stage and candidate j: -ln( e^z_j / (e^z_j + sum over {l: y_l < y_j} of e^z_l) ), z = s / temperature.

    Without ties this is the Plackett-Luce likelihood of the order by relevance; a tied candidate is chosen among itself
    and all that are less relevant. The mean over the candidates of a request with somebody below them, weighted by
    t_j + rest_weight (1 - t_j) with t_j the membership in the best K; then over the requests that have such a
    candidate; summed over the stages. Works for any depth, one included; O(C log C). Parts: `plackett_luce/<stage>`.
    """

    min_stages = 1

    class Config(PluginConfig):
        """Options of fs_plackett_luce."""

        temperature: float = Option(default=0.5, gt=0)
        rest_weight: float = Option(default=0.1, ge=0, le=1)  # of candidates outside the best K

    def __init__(self, config: Config, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.config = config

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        above_QC, tied_QC = tie_spans(lists.targets.relevance_QC, lists.mask_QC)
        order_QC = torch.where(lists.mask_QC, above_QC, lists.mask_QC.shape[1]).argsort(dim=1)
        lower_QC = above_QC + tied_QC  # the place in this order where the less relevant begin
        chooses_QC = lists.mask_QC & (lower_QC < lists.length_Q[:, None])
        lower_QC = torch.where(chooses_QC, lower_QC, 0)
        weight_QC = lists.membership_QC + self.config.rest_weight * (1.0 - lists.membership_QC)
        weight_QC = torch.where(chooses_QC, weight_QC, 0.0)
        weight_Q = weight_QC.sum(dim=1)
        defined_Q = weight_Q > 0
        parts: dict[str, Tensor] = {}
        for stage, scores_QC in lists.scores.items():
            logit_QC = scores_QC / self.config.temperature
            rivals_QC = _log_tails(torch.where(lists.mask_QC, logit_QC, LOG_ZERO).gather(1, order_QC))
            gap_QC = torch.where(chooses_QC, rivals_QC.gather(1, lower_QC) - logit_QC, 0.0)
            mean_Q = (weight_QC * functional.softplus(gap_QC)).sum(dim=1) / torch.where(defined_Q, weight_Q, 1.0)
            parts[f"plackett_luce/{stage}"] = request_mean(mean_Q, defined_Q)
        return LossOutput(torch.stack(list(parts.values())).sum(), parts)


def _log_tails(ordered_QC: Tensor) -> Tensor:
    """ln of the sum of the exponentials from each column to the last."""
    return ordered_QC.flip(1).logcumsumexp(dim=1).flip(1)
