"""fat_deepffm: gates of field-aware vectors before they are multiplied (Zhang et al. 2019, arXiv 1905.06336)."""

from dataclasses import dataclass

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._deep import LinearAndDeep
from raycascade.models._excitation import Excitation
from raycascade.models._field_aware import FieldAwarePairs, ProductName
from raycascade.models._first_order import first_order_of
from raycascade.models._layers import SplitMLP, initialise
from raycascade.models._pairs import split_with_rescaled
from raycascade.models._stacks import DeepStackOptions
from raycascade.schema import FeatureSpace


@dataclass(frozen=True)
class FatDeepFfmState:
    """The request's half: its share of the gates [Q, R], the products of its pairs before the gates [Q, P_uu, width],
    its vectors for the candidate's fields [Q, P_uc, k], and its first-order terms [Q, T]."""

    gates_QR: Tensor
    products_QPK: Tensor
    left_QPK: Tensor
    linear_QT: Tensor


class FatDeepFfm(LinearAndDeep):
    """`deepffm` on gated vectors V'[i, j] = S_ij V[i, j]: the attention comes before the interaction.

    D_ij = ReLU(u_ij . V[i, j]) with a filter u_ij for each of the n = m (m - 1) vectors, S = ReLU(W2 ReLU(W1 D)),
    W1 in R^{n/r x n}. Products of the request's pairs are made once and scaled by S_ij S_ji for each candidate.
    """

    class Config(DeepStackOptions):
        """Options of fat_deepffm."""

        presets = {"paper": {"reduction": 1, "dim": 10, "hidden": (1600, 1600, 1600), "dropout": 0.5}}

        dim: int = Option(default=4, ge=1)
        reduction: int = Option(default=4, ge=1)
        product: ProductName = "hadamard"

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.pairs = FieldAwarePairs(config, space, model="fat_deepffm", product=config.product)
        self.linear = first_order_of(space, num_tasks)
        self.filters = nn.Parameter(torch.empty(sum(self.pairs.num_cells), config.dim))
        with torch.no_grad():
            initialise(self.filters[:, None])  # each reads the k numbers of one vector
        self.gates = Excitation(*self.pairs.num_cells, reduction=config.reduction, never_negative=True)
        self.mlp = SplitMLP(0, (self.pairs.num_uu + self.pairs.num_rest) * self.pairs.width, config.hidden, num_tasks,
                            activation=config.activation, norm=config.norm, dropout=config.dropout, out_bias=False)
        self.representation_width = (0, *config.hidden)[-1]

    def encode_request(self, batch: Batch) -> FatDeepFfmState:
        """The request's pairs and its share of the gates."""
        cells_QNK = self.pairs.cells_of_request(batch)
        products_QPK, left_QPK = self.pairs.of_request(cells_QNK)
        return FatDeepFfmState(
            gates_QR=self.gates.of_request(self._composed(cells_QNK, self.filters[:self.pairs.num_cells[0]])),
            products_QPK=products_QPK, left_QPK=left_QPK, linear_QT=self.linear.of_request(batch))

    def score_candidates(self, state: FatDeepFfmState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        cells_QCNK = self.pairs.cells_of_candidates(batch)
        of_request_QCN1, own_QCN1 = self._gates(state, cells_QCNK).unsqueeze(-1).split(self.pairs.num_cells, -2)
        scale_QCP1, left_QCP1 = self.pairs.of_request(of_request_QCN1)
        products_QCPK = (self.pairs.of_candidates(state.left_QPK[:, None], cells_QCNK)
                         * self.pairs.of_candidates(left_QCP1, own_QCN1))
        bias_QH = self.mlp.of_request(state.gates_QR[:, :0])  # the bias alone
        hidden_QCH = split_with_rescaled(self.mlp.first, bias_QH, state.products_QPK, scale_QCP1.squeeze(-1),
                                         [products_QCPK])
        return self.linear(state.linear_QT, batch) + self.mlp.upper(hidden_QCH, batch.mask_QC)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`gates` [Q, C, m (m - 1)] of the vectors, those of the request first; `shut` [Q, C]: the share at 0."""
        gates_QCN = self._gates(self.encode_request(batch), self.pairs.cells_of_candidates(batch))
        return {"gates": gates_QCN, "shut": self.gates.share_of_zeros(gates_QCN)}

    def _gates(self, state: FatDeepFfmState, cells_QCNK: Tensor) -> Tensor:
        """S [Q, C, n]."""
        return self.gates(state.gates_QR, self._composed(cells_QCNK, self.filters[self.pairs.num_cells[0]:]))

    def _composed(self, cells: Tensor, filters: Tensor) -> Tensor:
        """D [..., n] of some cells."""
        return torch.relu((cells * filters).sum(-1))
