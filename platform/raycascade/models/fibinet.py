"""fibinet: gates of fields and bilinear products of pairs (Huang et al. 2019, arXiv 1905.09433)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._deep import LinearAndDeep
from raycascade.models._excitation import Excitation
from raycascade.models._first_order import first_order_of
from raycascade.models._layers import SplitMLP, initialise
from raycascade.models._pairs import FieldPairs, split_with_rescaled
from raycascade.models._stacks import DeepStackOptions, FieldStacks
from raycascade.schema import FeatureSpace

BilinearName = Literal["all", "each", "interaction"]


@dataclass(frozen=True)
class FibinetState:
    """The request's half: of the MLP's first layer [Q, H], of the gates [Q, R], what W and W' make of its fields as
    left sides (`BilinearPairs.of_request`), W' products of its pairs [Q, P_uu, k], and its first-order terms [Q, T]."""

    request_QH: Tensor
    gates_QR: Tensor
    left_p: Tensor
    left_q: Tensor
    products_QPK: Tensor
    linear_QT: Tensor


class BilinearPairs(nn.Module):
    """(W e_i) * e_j of every pair i < j. W is one for `all`, one for `each` left field, or one for each pair
    (`interaction`)."""

    def __init__(self, pairs: FieldPairs, dim: int, kind: BilinearName) -> None:
        super().__init__()
        self.pairs, self.kind = pairs, kind
        num_left = pairs.num_request + pairs.num_candidate - 1  # the last field is never left
        self.weight = nn.Parameter(torch.empty({"all": 1, "each": num_left, "interaction": pairs.num_pairs}[kind],
                                               dim, dim))
        with torch.no_grad():
            for matrix in self.weight:
                initialise(matrix)

    def of_request(self, fields_QFK: Tensor) -> tuple[Tensor, Tensor]:
        """Products of the request's pairs [Q, P_uu, k], and its fields as left sides of the candidate's
        [Q, m_u, m_c or 1, k]."""
        pairs = self.pairs
        if self.kind == "interaction":
            own, mixed, _ = self._by_block()
            left_QPK = _mapped(fields_QFK.index_select(-2, pairs.uu_left), own)
            shape = (len(fields_QFK), pairs.num_request, pairs.num_candidate, fields_QFK.shape[-1])
            repeated_QPK = fields_QFK.unsqueeze(-2).expand(shape).flatten(1, 2)
            return left_QPK * fields_QFK.index_select(-2, pairs.uu_right), _mapped(repeated_QPK, mixed).view(shape)
        left_QFK = _mapped(fields_QFK, self.weight if self.kind == "all" else self.weight[:pairs.num_request])
        return pairs.uu(left_QFK, fields_QFK), left_QFK.unsqueeze(-2)

    def forward(self, left: Tensor, fields_QCFK: Tensor) -> tuple[Tensor, Tensor]:
        """Products of the pairs with one field of the candidate [Q, C, P_uc, k], and with two [Q, C, P_cc, k]."""
        pairs = self.pairs
        mixed_QCPK = (left[:, None] * fields_QCFK.unsqueeze(-3)).flatten(-3, -2)
        if self.kind == "interaction":
            left_QCPK = _mapped(fields_QCFK.index_select(-2, pairs.cc_left), self._by_block()[2])
            own_QCPK = left_QCPK * fields_QCFK.index_select(-2, pairs.cc_right)
        else:
            weight = self.weight if self.kind == "all" else self.weight[pairs.num_request:]
            own_QCPK = pairs.cc(_mapped(fields_QCFK[..., :-1, :], weight), fields_QCFK)
        return mixed_QCPK, own_QCPK

    def _by_block(self) -> tuple[Tensor, ...]:
        """The pairs' matrices of UU, UC and CC; the parameter holds them in the order of pairs."""
        pairs = self.pairs
        return self.weight[pairs.in_blocks].split([pairs.num_uu, pairs.num_uc, pairs.num_cc])


def _mapped(vectors: Tensor, weight: Tensor) -> Tensor:
    """W_f e_f [..., F, k]; `weight` is [F or 1, k, k]."""
    if len(weight) == 1:
        return nn.functional.linear(vectors, weight[0])
    return torch.einsum("...fk,flk->...fl", vectors, weight)


class Fibinet(LinearAndDeep):
    """z = w_0 + sum w + MLP([p; q]): bilinear products of pairs of the fields (p), and of the gated fields (q).

    A = f(W2 ReLU(W1 Z)), Z_f the mean of e_f, gates field f: v_f = A_f e_f. p_ij = (W e_i) * e_j and
    q_ij = (W' v_i) * v_j = A_i A_j ((W' e_i) * e_j), so that products of the request's pairs are made once. A column of
    the history is one field, its mean. ConfigError with fewer than two fields.
    """

    class Config(DeepStackOptions):
        """Options of fibinet."""

        presets = {"paper": {"bilinear": "interaction", "hidden": (400, 400, 400)}}

        bilinear: BilinearName = "each"
        reduction: int = Option(default=3, ge=1)
        excitation: Literal["relu", "sigmoid"] = "relu"

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldStacks(config, space, model="fibinet", least=2)
        self.linear = first_order_of(space, num_tasks)
        self.pairs = FieldPairs(self.inputs.num_request, self.inputs.num_candidate)
        self.plain = BilinearPairs(self.pairs, config.dim, config.bilinear)
        self.gated = BilinearPairs(self.pairs, config.dim, config.bilinear)
        self.gates = Excitation(self.inputs.num_request, self.inputs.num_candidate, reduction=config.reduction,
                                activation=config.excitation)
        of_request = self.pairs.num_uu * config.dim
        self.mlp = SplitMLP(of_request, 2 * self.pairs.num_pairs * config.dim - of_request, config.hidden, num_tasks,
                            activation=config.activation, norm=config.norm, dropout=config.dropout, out_bias=False)
        self.representation_width = (0, *config.hidden)[-1]

    def encode_request(self, batch: Batch) -> FibinetState:
        """The request's pairs and its share of the gates."""
        fields_QFK = self.inputs.of_request(batch)
        plain_QPK, left_p = self.plain.of_request(fields_QFK)
        gated_QPK, left_q = self.gated.of_request(fields_QFK)
        return FibinetState(
            request_QH=self.mlp.of_request(plain_QPK.flatten(1)), gates_QR=self.gates.of_request(fields_QFK.mean(-1)),
            left_p=left_p, left_q=left_q, products_QPK=gated_QPK, linear_QT=self.linear.of_request(batch))

    def score_candidates(self, state: FibinetState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        fields_QCFK = self.inputs.of_candidates(batch)
        gates_QCF = self.gates(state.gates_QR, fields_QCFK.mean(-1))
        of_request_QCF1, own_QCF1 = gates_QCF.unsqueeze(-1).split(self.gates.sizes, -2)
        mixed_QCPK, own_QCPK = self.gated(state.left_q, fields_QCFK)
        gated = (mixed_QCPK * self.pairs.uc(of_request_QCF1, own_QCF1), own_QCPK * self.pairs.cc(own_QCF1, own_QCF1))
        scale_QCP = self.pairs.uu(of_request_QCF1, of_request_QCF1).squeeze(-1)
        hidden_QCH = split_with_rescaled(self.mlp.first, state.request_QH, state.products_QPK, scale_QCP,
                                         [*self.plain(state.left_p, fields_QCFK), *gated])
        return self.linear(state.linear_QT, batch) + self.mlp.upper(hidden_QCH, batch.mask_QC)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`gates` [Q, C, m] of the request's fields, its history's columns and the candidate's fields; `shut` [Q, C]:
        the share of gates at 0, where they are ReLUs."""
        of_request = self.gates.of_request(self.inputs.of_request(batch).mean(-1))
        gates_QCF = self.gates(of_request, self.inputs.of_candidates(batch).mean(-1))
        shut = {"shut": self.gates.share_of_zeros(gates_QCF)} if self.gates.activation == "relu" else {}
        return {"gates": gates_QCF, **shut}
