"""afm: attentional factorisation machine (Xiao et al. 2017, arXiv 1708.04617, equations 4 to 6)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._first_order import first_order_of
from raycascade.models._layers import linear
from raycascade.models._model import RepresentingModel
from raycascade.models._pairs import FieldPairs
from raycascade.models._stacks import FieldStacks, StackOptions
from raycascade.schema import FeatureSpace


@dataclass(frozen=True)
class AfmState:
    """The request's half: its fields [Q, m_u, k], the products of their pairs and those pairs' logits [Q, P_uu, ...],
    and its first-order terms [Q, T]."""

    fields_QFK: Tensor
    products_QPK: Tensor
    logits_QP: Tensor
    linear_QT: Tensor


class Afm(RepresentingModel):
    """z = w_0 + sum w + p . sum_ij a_ij (e_i * e_j), a = softmax over all pairs of h . ReLU(W (e_i * e_j) + b).

    A column of the history is one field, its mean. ConfigError with fewer than two fields.
    """

    class Config(StackOptions):
        """`l2_attention` adds its multiple of |W|^2 to the loss."""

        presets = {"paper": {"dim": 256, "attention_dim": 256}}

        dim: int = Option(default=8, ge=1)
        attention_dim: int = Option(default=8, ge=1)
        dropout: float = Option(default=0.0, ge=0, lt=1)
        l2_attention: float = Option(default=0.0, ge=0)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldStacks(config, space, model="afm", least=2)
        self.linear = first_order_of(space, num_tasks)
        self.pairs = FieldPairs(self.inputs.num_request, self.inputs.num_candidate)
        inner = linear(config.dim, config.attention_dim)
        self.attention = nn.Sequential(inner, nn.ReLU(), linear(config.attention_dim, 1, bias=False))
        self.dropout = nn.Dropout(config.dropout)
        self.out = linear(config.dim, num_tasks, bias=False) if num_tasks else nn.Identity()
        self.representation_width = config.dim
        self.l2_attention = config.l2_attention

    def first_order(self) -> tuple[nn.Module, ...]:
        """w_0 and the weights of values."""
        return (self.linear,)

    def silence(self) -> None:
        """Logits start at w_0, 0."""
        self.linear.silence()
        nn.init.zeros_(self.out.get_parameter("weight"))

    def encode_request(self, batch: Batch) -> AfmState:
        """The request's pairs and their logits."""
        fields_QFK = self.inputs.of_request(batch)
        products_QPK = self.pairs.uu(fields_QFK, fields_QFK)
        return AfmState(fields_QFK=fields_QFK, products_QPK=products_QPK,
                        logits_QP=self.attention(products_QPK).squeeze(-1), linear_QT=self.linear.of_request(batch))

    def score_candidates(self, state: AfmState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        products_QCPK = self._products(state, batch)
        weights_QCP = self._weights(state, products_QCPK)
        of_request_QCP, rest_QCP = weights_QCP.split([self.pairs.num_uu, products_QCPK.shape[2]], -1)
        pooled_QCK = of_request_QCP @ state.products_QPK + (rest_QCP[:, :, None] @ products_QCPK).squeeze(2)
        return self.linear(state.linear_QT, batch) + self.out(self.dropout(pooled_QCK))

    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits, and the penalty on W if there is one."""
        if not self.l2_attention:
            return self(batch), {}
        weight = self.attention.get_parameter("0.weight")
        return self(batch), {"l2_attention": self.l2_attention * weight.square().sum()}

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`attention` [Q, C, P]: the weights of the pairs (0, 1), (0, 2), ..., fields of the request first."""
        state = self.encode_request(batch)
        return {"attention": self.pairs.in_order(self._weights(state, self._products(state, batch)))}

    def _products(self, state: AfmState, batch: Batch) -> Tensor:
        """Products of the pairs with a field of the candidate [Q, C, P_uc + P_cc, k]."""
        fields_QCFK = self.inputs.of_candidates(batch)
        return torch.cat([self.pairs.uc(state.fields_QFK[:, None], fields_QCFK),
                          self.pairs.cc(fields_QCFK, fields_QCFK)], -2)

    def _weights(self, state: AfmState, products_QCPK: Tensor) -> Tensor:
        """a [Q, C, P] in blocks UU, UC, CC."""
        of_request_QCP = state.logits_QP[:, None].expand(-1, products_QCPK.shape[1], -1)
        return torch.softmax(torch.cat([of_request_QCP, self.attention(products_QCPK).squeeze(-1)], -1), -1)
