"""ICC: pairwise ranking by the expected score of a cascade of soft cut-offs (after Gallagher et al., WSDM 2019)."""

from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor
from torch.nn import functional

from raycascade.losses import LossOutput
from raycascade.losses._chunks import in_chunks
from raycascade.losses._neural_sort import LOG_ZERO
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.losses._reduce import request_mean
from raycascade.plugins import PluginConfig
from raycascade.truth import tie_spans


class Icc(Objective):
    """Mean over the N^2 pairs of softplus(-(f_j - f_l)) where relevance_j > relevance_l.

    I_i is the soft indicator of being above the q_i-th best score of stage i, G_i = prod_{l<=i} I_l, and the score of
    the cascade is f = sum_{i<T} c_i G_{i-1} (1 - I_i) s_i + c_T G_{T-1} I_T s_T: a candidate is scored by the stage
    that drops it. I = 1 where a list has at most q_i candidates. Part: `icc`.
    """

    class Config(PluginConfig):
        """Options of icc. Tune `sigma`: the default is the one behind the published comparison, and is fragile."""

        sigma: float = Option(default=1e-3, gt=0)  # width of the logistic indicator, in units of scores
        quotas: tuple[int, ...] | None = None
        stage_weights: tuple[float, ...] | None = None
        last_gate: bool = True  # false: the last indicator is 1, as in the paper
        indicator: Literal["logistic", "relu"] = "logistic"
        delta: float = Option(default=1e-3, gt=0)  # width of the relu indicator
        # official: equally relevant pairs count too, against the one that stands first in the list
        ties: Literal["skip", "official"] = "skip"
        chunk_requests: int | None = Option(default=None, ge=1)

    def __init__(self, config: Config, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.config = config
        self.check_quotas("quotas", config.quotas)
        self.check_per_stage("stage_weights", config.stage_weights)

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        above_QC, tied_QC = tie_spans(lists.relevance_QC, lists.mask_QC)
        counted_QC = above_QC > 0 if self.config.ties == "skip" else (above_QC > 0) | (tied_QC > 1)
        # ranks instead of relevance: exact in any dtype; -1 so that padding is not below anything
        rank_QC = torch.where(lists.mask_QC, above_QC, -1)
        sums_Q = in_chunks(self._pairs, self.cascade_score(lists), rank_QC, requests=self.config.chunk_requests)
        length_Q = lists.length_Q.clamp(min=1).to(lists.dtype)
        total = request_mean(sums_Q / length_Q**2, counted_QC.any(dim=1))
        return LossOutput(total, {"icc": total})

    def cascade_score(self, lists: ScoredLists) -> Tensor:
        """f [Q, C], the score that the cascade as a whole gives a candidate."""
        weights = self.config.stage_weights or (1.0,) * len(lists.scores)
        quotas = self.quotas(self.config.quotas, lists)
        *before, (last_QC, last_q) = zip(lists.scores.values(), quotas, strict=True)
        survived_QC, score_QC = torch.ones_like(last_QC), torch.zeros_like(last_QC)
        for weight, (scores_QC, q) in zip(weights, before, strict=False):
            inside_QC = self.indicator(scores_QC, lists.mask_QC, q)
            score_QC = score_QC + weight * survived_QC * (1.0 - inside_QC) * scores_QC
            survived_QC = survived_QC * inside_QC
        if self.config.last_gate:
            survived_QC = survived_QC * self.indicator(last_QC, lists.mask_QC, last_q)
        return score_QC + weights[-1] * survived_QC * last_QC

    def indicator(self, scores_QC: Tensor, mask_QC: Tensor, q: int) -> Tensor:
        """I [Q, C]; the cut-off, the q-th best score, carries gradient."""
        if q >= scores_QC.shape[1]:
            return torch.ones_like(scores_QC)
        binding_Q1 = mask_QC.sum(dim=1, keepdim=True) > q
        cut_Q1 = torch.where(mask_QC, scores_QC, LOG_ZERO).topk(q, dim=1).values[:, -1:]
        gap_QC = torch.where(binding_Q1, scores_QC - torch.where(binding_Q1, cut_Q1, 0.0), 0.0)
        if self.config.indicator == "relu":
            inside_QC = 0.5 * (1.0 + (gap_QC / self.config.delta).clamp(-1.0, 1.0))
        else:
            inside_QC = torch.sigmoid(gap_QC / self.config.sigma)
        return torch.where(binding_Q1, inside_QC, 1.0)

    def _pairs(self, score_QC: Tensor, rank_QC: Tensor) -> Tensor:
        """Per request [Q]: the sum over pairs (better, worse), a smaller rank being better."""
        loss_QCC = functional.softplus(score_QC[:, None, :] - score_QC[:, :, None])
        real_QC = rank_QC >= 0
        counted_QCC = (rank_QC[:, :, None] < rank_QC[:, None, :]) & real_QC[:, :, None]
        sums_Q = torch.where(counted_QCC, loss_QCC, 0.0).sum(dim=(1, 2))
        if self.config.ties == "skip":
            return sums_Q
        tied_QCC = (rank_QC[:, :, None] == rank_QC[:, None, :]) & real_QC[:, :, None]
        return sums_Q + torch.where(tied_QCC.tril(-1), loss_QCC, 0.0).sum(dim=(1, 2))
