"""Trained weights of loss terms by homoscedastic uncertainty (Kendall, Gal and Cipolla, CVPR 2018)."""

import torch
from torch import Tensor, nn


class UncertaintyWeights(nn.Module):
    """U(L; u) = exp(-u) L / 2 + u / 2 with one trained log variance u per term, 0 at first; the optimum is u = ln L.

    Parameters are called `log_var/<term>`: 0-dim, float32, for the same learning rate as the models and without weight
    decay. They are kept in [-bound, bound] by projection before use: a clamp inside the graph would freeze a
    parameter at the border, and no bound would let the weight of a term that reaches 0 grow without end.
    """

    def __init__(self, terms: tuple[str, ...], *, bound: float) -> None:
        super().__init__()
        self.bound = bound
        for term in terms:
            self.register_parameter(f"log_var/{term}", nn.Parameter(torch.zeros(())))

    def log_var(self, term: str) -> Tensor:
        """The parameter of a term."""
        return self.get_parameter(f"log_var/{term}")

    def forward(self, losses: dict[str, Tensor], *, defined: Tensor) -> Tensor:
        """Sum of the weighted terms, 0-dim; 0 without a push on the weights unless `defined` (0-dim bool)."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-self.bound, self.bound)
        log_vars = [(loss, self.log_var(term)) for term, loss in losses.items()]
        total = torch.stack([(torch.exp(-u) * loss + u) / 2 for loss, u in log_vars]).sum()
        return torch.where(defined, total, 0.0)
