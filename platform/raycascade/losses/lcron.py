"""LCRON: a surrogate of the chance that the best K survive the whole cascade (ICML 2025, arXiv 2503.09492)."""

from functools import reduce
from typing import Literal

import torch
from pydantic import Field as Option, model_validator
from torch import Tensor

from raycascade.errors import ConfigError
from raycascade.losses import LossOutput
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.losses._reduce import candidate_mean, request_mean
from raycascade.losses._sorting import EPS, LogForm, NegativeForm, Operator, SoftRanking, TopProbability
from raycascade.losses._uncertainty import UncertaintyWeights
from raycascade.plugins import PluginConfig
from raycascade.truth import tie_spans

THREE_STAGE_CUT = 1000  # the published three-stage code drops label-matrix entries of 0.001 and less: ties this large


class Lcron(Objective):
    """e2e + sum_i U(single_i), where t is the membership in the best K and p_i(q) the chance to be in stage i's best q.

    single_i = mean_j [ -t_j ln p_ij(K) - (1 - t_j) ln rest_ij(K) ];
    e2e = mean_j [ -t_j ln prod_i p_ij(q_i) - (1 - t_j) ln(1 - prod_i r_ij(q_i)) ], r = 1 - rest.
    U weighs by trained uncertainty (_uncertainty.py). A request counts if it has more than K candidates, and for e2e
    if some q_i is below its length. Parts: `e2e`, `single/<stage>`, `log_var/<stage>`.
    """

    class Config(PluginConfig):
        """Options of lcron. The defaults repeat the published two-stage recipe; add `official_three_stage_negatives`
        to repeat the published three-stage figures, where negatives count as often as their relevance is tied."""

        operator: Operator = "neuralsort"
        temperature: float | None = Option(default=None, gt=0)  # None: 50 for neuralsort, 1 for softsort and dftopk
        joint_k: Literal["K", "keep"] | tuple[int, ...] = "K"  # the q_i of e2e
        negative_form: NegativeForm = "complement"  # direct: r = p
        weight_e2e: bool = False
        uncertainty: bool = True
        single_weight: float = Option(default=1.0, ge=0)  # of every single_i, without uncertainty
        log_var_bound: float = Option(default=5.0, gt=0)
        log_form: LogForm = "eps"  # exact is advised for small temperatures
        eps: float = Option(EPS, gt=0)
        chunk_requests: int | None = Option(default=None, ge=1)  # whose C x C matrices stand in memory at once
        official_three_stage_negatives: bool = False

        @model_validator(mode="after")
        def _compatible(self) -> "Lcron.Config":
            if self.uncertainty and self.single_weight != 1.0:
                raise ConfigError(f"loss.single_weight: {self.single_weight} has no effect with trained weights; "
                                  "add uncertainty: false")
            if self.weight_e2e and not self.uncertainty:
                raise ConfigError("loss.weight_e2e: needs trained weights; drop it or set uncertainty: true")
            return self

    def __init__(self, config: Config, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.config = config
        if isinstance(config.joint_k, tuple):
            self.check_quotas("joint_k", config.joint_k)
        self.weights: UncertaintyWeights | None = None
        if config.uncertainty:
            if config.weight_e2e and "e2e" in stage_names:
                raise ConfigError("loss.weight_e2e: a stage is called 'e2e' like the weight; rename the stage")
            terms = (*stage_names, "e2e") if config.weight_e2e else stage_names
            self.weights = UncertaintyWeights(terms, bound=config.log_var_bound)

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        config, k = self.config, lists.k
        widths = self._joint_widths(lists)
        stages = [
            SoftRanking(scores_QC, lists.mask_QC, operator=config.operator, temperature=config.temperature,
                        log_form=config.log_form, eps=config.eps, chunk_requests=config.chunk_requests).tops((k, q))
            for scores_QC, q in zip(lists.scores.values(), widths, strict=True)
        ]
        singles, joint = [tops[k] for tops in stages], [tops[q] for tops, q in zip(stages, widths, strict=True)]
        defined_Q = lists.length_Q > k
        in_QC, out_QC = self._single_targets(lists)
        terms: dict[str, Tensor] = {}
        for stage, top in zip(lists.scores, singles, strict=True):
            loss_QC = -in_QC * top.log_p_QC - out_QC * top.log_rest_QC
            terms[stage] = request_mean(candidate_mean(loss_QC, lists.mask_QC & defined_Q[:, None]), defined_Q)
        e2e = self._end_to_end(joint, lists, defined_Q & (lists.length_Q > min(widths)))
        return self._total(e2e, terms, defined_Q.any())

    def _joint_widths(self, lists: ScoredLists) -> tuple[int, ...]:
        joint_k = self.config.joint_k
        same = (lists.k,) * len(self.stage_names)
        chosen = same if joint_k == "K" else None if joint_k == "keep" else joint_k
        return self.quotas(chosen, lists)

    def _single_targets(self, lists: ScoredLists) -> tuple[Tensor, Tensor]:
        if not self.config.official_three_stage_negatives:
            return lists.membership_QC, 1.0 - lists.membership_QC
        above_QC, tied_QC = tie_spans(lists.targets.relevance_QC, lists.mask_QC)
        tied_QC = torch.where(tied_QC < THREE_STAGE_CUT, tied_QC, 0)
        inside_QC = torch.minimum((lists.k - above_QC).clamp(min=0), tied_QC)
        return inside_QC.to(lists.dtype), (tied_QC - inside_QC).to(lists.dtype)

    def _end_to_end(self, joint: list[TopProbability], lists: ScoredLists, defined_Q: Tensor) -> Tensor:
        form, eps, t_QC = self.config.negative_form, self.config.eps, lists.membership_QC
        if self.config.log_form == "exact" or self.config.operator == "dftopk":
            log_in_QC = torch.stack([top.log_p_QC for top in joint]).sum(dim=0)
            log_out_QC = log_of_any_loss([top.log_survival(form) for top in joint])
        else:
            log_in_QC = torch.log(reduce(torch.mul, [top.p_QC for top in joint]) + eps)
            log_out_QC = torch.log(1.0 - reduce(torch.mul, [top.survival(form) for top in joint]) + eps)
        loss_QC = -t_QC * log_in_QC - (1.0 - t_QC) * log_out_QC
        return request_mean(candidate_mean(loss_QC, lists.mask_QC & defined_Q[:, None]), defined_Q)

    def _total(self, e2e: Tensor, singles: dict[str, Tensor], defined: Tensor) -> LossOutput:
        parts = {"e2e": e2e, **{f"single/{stage}": loss for stage, loss in singles.items()}}
        if self.weights is None:
            return LossOutput(e2e + self.config.single_weight * torch.stack(list(singles.values())).sum(), parts)
        weighted = {**singles, "e2e": e2e} if self.config.weight_e2e else singles
        total = self.weights(weighted, defined=defined) + (0.0 if self.config.weight_e2e else e2e)
        parts |= {f"log_var/{term}": self.weights.log_var(term).clone() for term in weighted}
        return LossOutput(total, parts)


def log_of_any_loss(log_survivals: list[tuple[Tensor, Tensor]]) -> Tensor:
    """ln(1 - prod_i r_i) from the pairs (ln r_i, ln(1 - r_i)): the sum over stages of "lost here, survived before".

    No cancellation, so it stays finite with a live gradient where every r_i rounds to 1.
    """
    lost_here, survived = [], torch.zeros_like(log_survivals[0][0])
    for log_survival, log_loss in log_survivals:
        lost_here.append(log_loss + survived)
        survived = survived + log_survival
    return torch.stack(lost_here).logsumexp(dim=0)
