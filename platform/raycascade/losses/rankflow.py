"""RankFlow: each stage learns on what the stages before it let through, and from the stage behind it
(after Qin et al., SIGIR 2022)."""

import torch
from pydantic import Field as Option
from torch import Tensor
from torch.nn import functional

from raycascade.errors import ConfigError
from raycascade.losses import LossOutput
from raycascade.losses._neural_sort import LOG_ZERO
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.losses._reduce import candidate_mean, request_mean
from raycascade.plugins import PluginConfig


class RankFlow(Objective):
    """sum_i mean_{C_{i-1}} bce(s_i, t) + sum_{i<T} [ distill mean_{C_i} (s_i - s_{i+1})^2 + rank gap_i ].

    C_0 is the list and C_i the best q_i of C_{i-1} by stage i; s_{i+1} teaches and gets no gradient from it.
    gap_i = softplus(-(mean_{P_i} s_i - mean_{C_i - P_i} s_i)), where P_i are the best p_i of C_i by stage i + 1; a
    request without a rest C_i - P_i is left out of it. All stages learn in one pass. Equal scores at a border are
    resolved by position in the list. Parts: `bce/<stage>`, `distill/<stage>`, `rank/<stage>`.
    """

    class Config(PluginConfig):
        """Options of rankflow. The paper's one parameter alpha is `distill` 1 - alpha and `rank` alpha."""

        quotas: tuple[int, ...] | None = None
        distill: float = Option(default=1.0, ge=0)
        rank: float = Option(default=0.0, ge=0)
        positives: tuple[int, ...] | None = None  # p, one for each stage but the last; None: the next stage's quota

    def __init__(self, config: Config, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.config = config
        self.check_quotas("quotas", config.quotas)
        wanted = list(self.stage_names[:-1])
        if config.positives is not None and (len(config.positives) != len(wanted) or min(config.positives) < 1):
            raise ConfigError(f"loss.positives: expected one width of at least 1 for each of {wanted}, "
                              f"got {list(config.positives)}")

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        config, quotas, t_QC = self.config, self.quotas(self.config.quotas, lists), lists.membership_QC
        positives = config.positives or quotas[1:]
        stages = list(lists.scores.items())
        entered_QC, parts = lists.mask_QC, {}
        terms: list[Tensor] = []
        for i, (stage, scores_QC) in enumerate(stages):
            bce_QC = functional.softplus(scores_QC) - t_QC * scores_QC
            parts[f"bce/{stage}"] = request_mean(candidate_mean(bce_QC, entered_QC), entered_QC.any(dim=1))
            terms.append(parts[f"bce/{stage}"])
            if i + 1 == len(stages):
                break
            entered_QC = best_of(scores_QC, entered_QC, quotas[i])
            teacher_QC = stages[i + 1][1].detach()
            if config.distill:
                distance_QC = (scores_QC - teacher_QC) ** 2
                mean = request_mean(candidate_mean(distance_QC, entered_QC), entered_QC.any(dim=1))
                parts[f"distill/{stage}"] = mean
                terms.append(config.distill * mean)
            if config.rank:
                parts[f"rank/{stage}"] = _gap(scores_QC, teacher_QC, entered_QC, positives[i])
                terms.append(config.rank * parts[f"rank/{stage}"])
        order = sorted(parts, key=lambda name: ("bce", "distill", "rank").index(name.partition("/")[0]))
        return LossOutput(torch.stack(terms).sum(), {name: parts[name] for name in order})


def best_of(scores_QC: Tensor, among_QC: Tensor, count: int) -> Tensor:
    """Bool [Q, C]: the best `count` among some candidates, all of them where there are fewer; ties by position."""
    order_QC = torch.where(among_QC, scores_QC.detach(), LOG_ZERO).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(among_QC).scatter_(1, order_QC[:, :count], True) & among_QC


def _gap(scores_QC: Tensor, teacher_QC: Tensor, entered_QC: Tensor, count: int) -> Tensor:
    better_QC = best_of(teacher_QC, entered_QC, count)
    rest_QC = entered_QC & ~better_QC
    gap_Q = candidate_mean(scores_QC, better_QC) - candidate_mean(scores_QC, rest_QC)
    return request_mean(functional.softplus(-gap_Q), rest_QC.any(dim=1))
