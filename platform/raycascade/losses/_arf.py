"""What ARF and its second version share: a relaxed top-m term per stage, and a soft sorting term of the whole list."""

from abc import abstractmethod
from functools import partial
from typing import Literal

import torch
from pydantic import Field as Option, model_validator
from torch import Tensor

from raycascade.errors import ConfigError
from raycascade.losses import LossOutput
from raycascade.losses._chunks import in_chunks
from raycascade.losses._objective import Objective, ScoredLists
from raycascade.losses._reduce import candidate_mean, request_mean
from raycascade.losses._sorting import EPS, LogForm, log_permutation, soft_permutation
from raycascade.losses._uncertainty import UncertaintyWeights
from raycascade.plugins import PluginConfig
from raycascade.truth import tie_spans


class RelaxationConfig(PluginConfig):
    """Options of arf and arf_v2."""

    operator: Literal["neuralsort", "softsort"] = "neuralsort"
    temperature: float = Option(default=200.0, gt=0)  # published with neuralsort; softsort wants far less
    quotas: tuple[int, ...] | None = None  # m
    uncertainty: bool = True
    global_weight: float = Option(default=1.0, ge=0)  # of every global_i, without uncertainty
    log_var_bound: float = Option(default=5.0, gt=0)
    log_form: LogForm = "eps"
    eps: float = Option(EPS, gt=0)
    chunk_requests: int | None = Option(default=None, ge=1)

    @model_validator(mode="after")
    def _compatible(self) -> "RelaxationConfig":
        if self.uncertainty and self.global_weight != 1.0:
            raise ConfigError(f"loss.global_weight: {self.global_weight} has no effect with trained weights; "
                              "add uncertainty: false")
        return self


class Relaxation(Objective):
    """sum_i [ relax_i + U(global_i) ], global_i = -(1/N^2) sum_{k,j} Y_kj ln P_kj over all ranks k and candidates j.

    P is the soft permutation of a stage, Y the label matrix of the relevance, U the weighing by trained uncertainty.
    relax_i is the subclass's; it is defined for requests with more than m = q_i candidates.
    """

    def __init__(self, config: RelaxationConfig, stage_names: tuple[str, ...]) -> None:
        super().__init__(config, stage_names)
        self.options = config
        self.check_quotas("quotas", config.quotas)
        self.weights = UncertaintyWeights(stage_names, bound=config.log_var_bound) if config.uncertainty else None

    @abstractmethod
    def relax(self, inside_QC: Tensor, outside_QC: Tensor, t_QC: Tensor, m: int) -> Tensor:
        """The loss of every candidate [Q, C], from the sums of P over its first m ranks and over the others, or with
        `log_form` exact from their logarithms."""

    def compute(self, lists: ScoredLists) -> LossOutput:
        """See the class."""
        above_QC, tied_QC = tie_spans(lists.targets.relevance_QC, lists.mask_QC)
        relax: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        some_Q = lists.length_Q > 0
        for (stage, scores_QC), m in zip(lists.scores.items(), self.quotas(self.options.quotas, lists), strict=True):
            terms_2Q = in_chunks(partial(self._terms, m=m), scores_QC, lists.mask_QC, lists.membership_QC, above_QC,
                                 tied_QC, requests=self.options.chunk_requests).unbind(dim=1)
            relax[stage] = request_mean(terms_2Q[0], lists.length_Q > m)
            whole[stage] = request_mean(terms_2Q[1], some_Q)
        parts = {f"relax/{stage}": term for stage, term in relax.items()}
        parts |= {f"global/{stage}": term for stage, term in whole.items()}
        total = torch.stack(list(relax.values())).sum()
        if self.weights is None:
            return LossOutput(total + self.options.global_weight * torch.stack(list(whole.values())).sum(), parts)
        total = total + self.weights(whole, defined=some_Q.any())
        parts |= {f"log_var/{stage}": self.weights.log_var(stage).clone() for stage in whole}
        return LossOutput(total, parts)

    def _terms(
        self, scores_QC: Tensor, mask_QC: Tensor, t_QC: Tensor, above_QC: Tensor, tied_QC: Tensor, *, m: int
    ) -> Tensor:
        """relax and global of every request [Q, 2]."""
        operator, temperature = self.options.operator, self.options.temperature
        if self.options.log_form == "exact":
            logs_QCC = log_permutation(scores_QC, mask_QC, operator, temperature)
            inside_QC = logs_QCC[:, :m].logsumexp(dim=1)
            outside_QC = logs_QCC[:, m:].logsumexp(dim=1) if m < logs_QCC.shape[1] else torch.zeros_like(inside_QC)
        else:
            matrix_QCC = soft_permutation(scores_QC, mask_QC, operator, temperature)
            inside_QC, outside_QC = matrix_QCC[:, :m].sum(dim=1), matrix_QCC[:, m:].sum(dim=1)
            logs_QCC = torch.log(matrix_QCC + self.options.eps)
        length_Q = mask_QC.sum(dim=1)
        relax_Q = candidate_mean(self.relax(inside_QC, outside_QC, t_QC, m), mask_QC & (length_Q[:, None] > m))
        rank_C1 = torch.arange(1, mask_QC.shape[1] + 1, device=mask_QC.device)[:, None]
        held_QCC = (rank_C1 > above_QC[:, None, :]) & (rank_C1 <= (above_QC + tied_QC)[:, None, :])
        held_QC = torch.where(held_QCC, logs_QCC, 0.0).sum(dim=1) / tied_QC.clamp(min=1).to(logs_QCC.dtype)
        whole_Q = -held_QC.sum(dim=1) / length_Q.clamp(min=1).to(logs_QCC.dtype) ** 2
        return torch.stack([relax_Q, whole_Q], dim=1)
