"""ARF: adaptive relaxation of the recall of a stage by soft sorting (after Wang et al., WWW 2024, arXiv 2310.10462)."""

import math

import torch
from torch import Tensor

from raycascade.losses._arf import Relaxation, RelaxationConfig


class Arf(Relaxation):
    """sum_i [ relax_i + U(global_i) ] with relax_i = mean_j -t_j ln( (1/m) sum_{k<=m} P_kj ).

    t is the membership in the best K, P the soft permutation of stage i, m = q_i; global_i compares the whole
    permutation with the order of relevance (_arf.py). Parts: `relax/<stage>`, `global/<stage>`, `log_var/<stage>`.
    """

    class Config(RelaxationConfig):
        """Options of arf."""

    def relax(self, inside_QC: Tensor, outside_QC: Tensor, t_QC: Tensor, m: int) -> Tensor:
        """Members only."""
        del outside_QC
        if self.options.log_form == "exact":
            return -t_QC * (inside_QC - math.log(m))
        return -t_QC * torch.log(inside_QC / m + self.options.eps)
