"""deepfm: a factorisation machine and an MLP over the same embeddings (Guo et al. 2017, arXiv 1703.04247)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._deep import DeepOptions, DeepPart
from raycascade.models._first_order import FirstOrder
from raycascade.models._inputs import FieldInputs
from raycascade.models._model import TorchModel
from raycascade.schema import FeatureSpace


@dataclass(frozen=True)
class DeepFMState:
    """The request's half: its first-order term, its sums for the FM, and its share of the MLP's first layer."""

    first_QT: Tensor
    sum_QD: Tensor
    squares_Q: Tensor
    request_QH: Tensor


class DeepFM(TorchModel):
    """z = w_0 + sum w + 1/2 sum_k [(sum_f e_f)^2 - sum_f e_f^2] + MLP(x_0), over all fields and history columns.

    The middle term is the sum of e_i . e_j over all pairs of fields; it has no weights and every task gets it. Dense
    features are fields in it as well (x v + c).
    """

    class Config(DeepOptions):
        """The paper's size: dim 10, hidden [400, 400, 400], dropout 0.5."""

        dim: int = Option(default=8, ge=1)
        dense: Literal["field"] = "field"  # pyright: ignore[reportIncompatibleVariableOverride]

    pair_scale: Tensor

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.linear = FirstOrder(space, num_tasks)
        self.inputs = FieldInputs(config, space, model="deepfm")
        self.deep = DeepPart(config, self.inputs.request_width(history=True), self.inputs.candidate_width, num_tasks)
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
        x_QD = self.inputs.request_matrix(batch, history=True)
        sum_QD, squares_Q = self._sums(x_QD)
        return DeepFMState(self.linear.of_request(batch), sum_QD, squares_Q, self.deep.of_request(x_QD))

    def score_candidates(self, state: DeepFMState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        x_QCD = self.inputs.candidate_matrix(batch)
        deep_QCT = self.deep(state.request_QH, x_QCD, batch.mask_QC)
        pairs_QC1 = self.pairs(state, x_QCD).unsqueeze(-1)
        return self.linear(state.first_QT, batch) + deep_QCT + pairs_QC1 * self.pair_scale

    def pairs(self, state: DeepFMState, x_QCD: Tensor) -> Tensor:
        """Sum of e_i . e_j over all pairs of fields [Q, C]."""
        sum_QCD, squares_QC = self._sums(x_QCD)
        whole_QC = (state.sum_QD[:, None] + sum_QCD).square().sum(-1)
        return 0.5 * (whole_QC - state.squares_Q[:, None] - squares_QC)

    def _sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the fields [..., dim], and sum of all squares [...], of fields side by side."""
        return x.unflatten(-1, (-1, self.inputs.dim)).sum(-2), x.square().sum(-1)
