"""RankNet over the levels of the funnel: who came deeper in the log should have the higher score in every stage
(Burges et al., ICML 2005, on full-stage labels)."""

import torch
from pydantic import Field as Option
from torch import Tensor
from torch.nn import functional

from raycascade.losses import LossOutput
from raycascade.losses._chunks import in_chunks
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.plugins import PluginConfig
from raycascade.truth import tie_spans


class FsRankNet(Objective):
    """Sum over stages and levels g >= 1 of the mean of softplus(-(s_j - s_l)) over {reached_j = g, reached_l < g}.

    Order inside a level plays no part. A request without such a pair is left out of the level's mean, and a level
    without such a request adds 0. Parts: `ranknet/<stage>`.
    """

    class Config(PluginConfig):
        """Options of fs_ranknet."""

        max_level: int | None = Option(default=None, ge=1)  # deeper counts as this; None: looks, which a GPU waits for
        chunk_requests: int | None = Option(default=None, ge=1)

    def __init__(self, config: Config, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.config = config

    def reads_truth(self) -> bool:
        """Levels only."""
        return False

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        level_QC, weight_QC = self._weighted_levels(lists)
        parts = {
            f"ranknet/{stage}": in_chunks(_pairs, scores_QC, level_QC, weight_QC,
                                          requests=self.config.chunk_requests).sum()
            for stage, scores_QC in lists.scores.items()
        }
        return LossOutput(torch.stack(list(parts.values())).sum(), parts)

    def _weighted_levels(self, lists: ScoredLists) -> tuple[Tensor, Tensor]:
        """Levels, and of each candidate the weight of its pairs: 1 / (pairs of its level x requests with the level)."""
        highest = self.config.max_level
        level_QC = lists.reached_QC if highest is None else lists.reached_QC.clamp(max=highest)
        above_QC, tied_QC = tie_spans(level_QC, lists.mask_QC)
        below_QC = torch.where(lists.mask_QC, lists.length_Q[:, None] - above_QC - tied_QC, 0)
        each_Q = torch.zeros_like(level_QC, dtype=lists.dtype)
        for level in level_QC.unique().tolist() if highest is None else range(1, highest + 1):
            found_QC = (level_QC == level) & (below_QC > 0)
            num_requests = found_QC.any(dim=1).sum().clamp(min=1)
            each_Q = torch.where(found_QC, 1.0 / (tied_QC * below_QC * num_requests).to(lists.dtype), each_Q)
        return torch.where(lists.mask_QC, level_QC, torch.iinfo(level_QC.dtype).max), each_Q


def _pairs(scores_QC: Tensor, level_QC: Tensor, weight_QC: Tensor) -> Tensor:
    """Per request [Q]: the weighted sum over pairs (deeper, less deep); padding is deeper than all, with weight 0."""
    loss_QCC = functional.softplus(scores_QC[:, None, :] - scores_QC[:, :, None])
    sums_QC = torch.where(level_QC[:, :, None] > level_QC[:, None, :], loss_QCC, 0.0).sum(dim=2)
    return (weight_QC * sums_QC).sum(dim=1)
