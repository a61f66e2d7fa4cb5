"""deepfm: a factorisation machine and an MLP over the same embeddings (Guo et al. 2017, arXiv 1703.04247)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._apart import InputsApart
from raycascade.models._deep import DeepOptions, DeepPart
from raycascade.models._first_order import FirstOrder
from raycascade.models._model import TorchModel
from raycascade.schema import FeatureSpace


@dataclass(frozen=True)
class DeepFMState:
    """The request's half: its first-order term, its sums for the FM, and its share of the MLP's first layer."""

    first_QT: Tensor
    sum_QK: Tensor
    squares_Q: Tensor
    request_QH: Tensor


class FieldSums(nn.Module):
    """What the pairs of fields need of them: the sum of e_f [..., k] and of |e_f|^2 [...]; a number has e = x v + c."""

    def __init__(self, num_numbers: int, dim: int, *, std: float) -> None:
        super().__init__()
        self.dim = dim
        shape = (2, num_numbers, dim)  # slopes v, offsets c
        self.lines = nn.Parameter(torch.randn(shape) * std) if num_numbers else None

    def forward(self, fields: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors side by side [..., m k] and numbers [..., n]; the numbers' share needs none of their vectors."""
        total, squares = _Sums.apply(fields.unflatten(-1, (-1, self.dim)))  # pyright: ignore[reportGeneralTypeIssues]
        if self.lines is None:
            return total, squares
        v, c = self.lines
        of_numbers = numbers.square() @ v.square().sum(-1) + numbers @ (2.0 * (v * c).sum(-1)) + c.square().sum()
        return total + numbers @ v + c.sum(0), squares + of_numbers


class _Sums(torch.autograd.Function):
    """Sum of vectors and of their squares; the way back reads them once."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor) -> tuple[Tensor, Tensor]:
        """[..., m, k] -> [..., k], [...]."""
        ctx.save_for_backward(x_MK)
        flat = x_MK.flatten(-2)
        return x_MK.sum(-2), torch.linalg.vecdot(flat, flat)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        """g_sum + 2 g_squares x."""
        (x_MK,), (of_sum, of_squares) = ctx.saved_tensors, gradients
        return torch.addcmul(of_sum.unsqueeze(-2), x_MK, (2.0 * of_squares)[..., None, None])


class DeepFM(TorchModel):
    """z = w_0 + sum w + 1/2 sum_k [(sum_f e_f)^2 - sum_f e_f^2] + MLP(x_0), over all fields and history columns.

    The middle term is the sum of e_i . e_j over all pairs of fields; it has no weights and every task gets it. Numbers
    are fields of it as well (x v + c); the MLP reads them as they are, since its first layer is a line in x anyway.
    """

    class Config(DeepOptions):
        """Options of deepfm."""

        presets = {"paper": {"dim": 10, "hidden": (400, 400, 400), "dropout": 0.5}}

        dim: int = Option(default=8, ge=1)
        dense: Literal["field"] = "field"  # pyright: ignore[reportIncompatibleVariableOverride]

    pair_scale: Tensor

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.linear = FirstOrder(space, num_tasks)
        self.inputs = inputs = InputsApart(config, space, model="deepfm")
        self.of_request, self.of_candidate = (
            FieldSums(count, config.dim, std=config.embedding_std) for count in inputs.num_numbers)
        self.deep = DeepPart(config, inputs.request_width(history=True), inputs.candidate_width, num_tasks)
        self.register_buffer("pair_scale", torch.ones(num_tasks))

    def first_order(self) -> tuple[FirstOrder]:
        """The first-order term."""
        return (self.linear,)

    def silence(self) -> None:
        """Logits start at w_0. The pairs have no weights that could be 0, so their constant scale of 1 becomes a
        parameter that starts at 0."""
        self.linear.silence()
        self.deep.silence()
        if "pair_scale" in self._buffers:
            del self.pair_scale
        self.pair_scale = nn.Parameter(torch.zeros_like(self.linear.bias))

    def encode_request(self, batch: Batch) -> DeepFMState:
        """Everything of the request: once, whatever the number of candidates."""
        fields_QD, numbers_QD = self.inputs.of_request(batch)
        sum_QK, squares_Q = self.of_request(fields_QD, numbers_QD)
        deep_QH = self.deep.of_request(torch.cat([fields_QD, numbers_QD], -1))
        return DeepFMState(self.linear.of_request(batch), sum_QK, squares_Q, deep_QH)

    def score_candidates(self, state: DeepFMState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        fields_QCD, numbers_QCD = self.inputs.of_candidates(batch)
        deep_QCT = self.deep(state.request_QH, torch.cat([fields_QCD, numbers_QCD], -1), batch.mask_QC)
        pairs_QC1 = self.pairs(state, fields_QCD, numbers_QCD).unsqueeze(-1)
        return self.linear(state.first_QT, batch) + deep_QCT + pairs_QC1 * self.pair_scale

    def pairs(self, state: DeepFMState, fields_QCD: Tensor, numbers_QCD: Tensor) -> Tensor:
        """Sum of e_i . e_j over all pairs of fields [Q, C]."""
        sum_QCK, squares_QC = self.of_candidate(fields_QCD, numbers_QCD)
        whole_QC = (state.sum_QK[:, None] + sum_QCK).square().sum(-1)
        return 0.5 * (whole_QC - state.squares_Q[:, None] - squares_QC)
