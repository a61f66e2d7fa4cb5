"""ARF with the chance to be in and not to be in the best m, the baseline that LCRON's authors made of ARF
(arXiv 2503.09492)."""

import torch
from torch import Tensor

from raycascade.losses._arf import Relaxation, RelaxationConfig


class ArfV2(Relaxation):
    """sum_i [ relax_i + U(global_i) ] with relax_i = mean_j [ -t_j ln p_j(m) - (1 - t_j) ln rest_j(m) ].

    p(m) is the chance to be in the best m = q_i of stage i: the sum of the first m rows of the soft permutation over
    that of all rows, which carries no gradient. t is the membership in the best K, global_i as in arf. Parts:
    `relax/<stage>`, `global/<stage>`, `log_var/<stage>`.
    """

    class Config(RelaxationConfig):
        """Options of arf_v2."""

    def relax(self, inside_QC: Tensor, outside_QC: Tensor, t_QC: Tensor, m: int) -> Tensor:
        """Members and the others."""
        if self.options.log_form == "exact":
            all_QC = torch.logaddexp(inside_QC, outside_QC).detach()
            log_p_QC, log_rest_QC = inside_QC - all_QC, outside_QC - all_QC
        else:
            eps = self.options.eps
            all_QC = (inside_QC + outside_QC).detach() + eps
            log_p_QC, log_rest_QC = torch.log(inside_QC / all_QC + eps), torch.log(outside_QC / all_QC + eps)
        return -t_QC * log_p_QC - (1.0 - t_QC) * log_rest_QC
