"""LambdaLoss over the whole funnel: pairs weigh by what swapping them would change in DCG (after Wang, Li, Golbandi,
Bendersky and Najork, CIKM 2018, on full-stage relevance)."""

from functools import partial

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

FAR = 1e30  # a gain that is above every gain, and finite


class FsLambdaLoss(Objective):
    """Per stage: 2 sum_{j, l: y_j > y_l} w_jl softplus(-(s_j - s_l)), summed over pairs, then the mean over requests.

    w_jl = |G_j - G_l| [ (1-c) 1[min(r_j, r_l) <= n] (D(|r_j - r_l|) - D(|r_j - r_l| + 1)) + c |D~(r_j) - D~(r_l)| ]
    with the rank r by score, D(r) = 1 / ln(1 + r), D~(r) = D(r) for r <= n and 0 beyond, and the gain G = y / ideal
    DCG; c is `smooth`, n is `topn`. Relevance y must not be negative. Weights carry no gradient. As a sum it grows
    with the length of a list. Equal scores are ranked by position. Parts: `lambdaloss/<stage>`.
    """

    class Config(PluginConfig):
        """Options of fs_lambdaloss."""

        smooth: float = Option(default=0.8, ge=0, le=1)
        topn: int = Option(default=30, ge=1)
        chunk_requests: int | None = Option(default=None, ge=1)

    def __init__(self, config: Config, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.config = config

    def reads_truth(self) -> bool:
        """Graded relevance only."""
        return False

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        gain_QC = _gains(lists)
        above_QC, _ = tie_spans(lists.relevance_QC, lists.mask_QC)
        compute = partial(_pairs, discount_CC=self._discounts(gain_QC))
        parts: dict[str, Tensor] = {}
        for stage, scores_QC in lists.scores.items():
            # in the order of the scores, ranks are positions and the weights of positions are the same for every list
            blanked_QC = torch.where(lists.mask_QC, scores_QC.detach(), LOG_ZERO)
            order_QC = blanked_QC.argsort(dim=1, descending=True, stable=True)
            ordered = (tensor.gather(1, order_QC) for tensor in (scores_QC, gain_QC, lists.mask_QC))
            sums_Q = in_chunks(compute, *ordered, requests=self.config.chunk_requests)
            parts[f"lambdaloss/{stage}"] = request_mean(sums_Q, (above_QC > 0).any(dim=1))
        return LossOutput(torch.stack(list(parts.values())).sum(), parts)

    def _discounts(self, like_QC: Tensor) -> Tensor:
        """The bracket of w and the factor 2, for every pair of ranks [C, C]."""
        smooth, topn = self.config.smooth, self.config.topn
        rank_C = torch.arange(1, like_QC.shape[1] + 1, dtype=like_QC.dtype, device=like_QC.device)
        cut_C = torch.where(rank_C <= topn, 1.0 / torch.log1p(rank_C), 0.0)
        apart_CC = (rank_C[:, None] - rank_C[None, :]).abs().clamp(min=1.0)
        near_CC = 1.0 / torch.log1p(apart_CC) - 1.0 / torch.log1p(apart_CC + 1.0)
        seen_CC = torch.minimum(rank_C[:, None], rank_C[None, :]) <= topn
        far_CC = (cut_C[:, None] - cut_C[None, :]).abs()
        return 2.0 * ((1.0 - smooth) * torch.where(seen_CC, near_CC, 0.0) + smooth * far_CC)


def _gains(lists: ScoredLists) -> Tensor:
    relevance_QC = lists.relevance_QC.to(lists.dtype)
    ideal_QC = torch.where(lists.mask_QC, relevance_QC, 0.0).sort(dim=1, descending=True).values
    rank_C = torch.arange(1, ideal_QC.shape[1] + 1, dtype=lists.dtype, device=ideal_QC.device)
    ideal_Q1 = (ideal_QC / torch.log1p(rank_C)).sum(dim=1, keepdim=True)
    return torch.where(ideal_Q1 > 0, relevance_QC / torch.where(ideal_Q1 > 0, ideal_Q1, 1.0), 0.0)


def _pairs(scores_QC: Tensor, gain_QC: Tensor, mask_QC: Tensor, *, discount_CC: Tensor) -> Tensor:
    """Per request [Q]: the weighted sum over pairs (better, worse), all in the order of the scores."""
    better_QC, worse_QC = torch.where(mask_QC, gain_QC, -FAR), torch.where(mask_QC, gain_QC, FAR)
    weight_QCC = (better_QC[:, :, None] - worse_QC[:, None, :]).clamp_(min=0.0).mul_(discount_CC)
    return (weight_QCC * functional.softplus(scores_QC[:, None, :] - scores_QC[:, :, None])).sum(dim=(1, 2))
