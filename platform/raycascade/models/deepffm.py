"""deepffm: an MLP over field-aware products (the model that arXiv 1905.06336, FAT-DeepFFM, starts from)."""

from dataclasses import dataclass

from pydantic import Field as Option
from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._deep import LinearAndDeep
from raycascade.models._field_aware import FieldAwarePairs, ProductName
from raycascade.models._first_order import first_order_of
from raycascade.models._layers import SplitMLP
from raycascade.models._stacks import DeepStackOptions
from raycascade.schema import FeatureSpace


@dataclass(frozen=True)
class DeepFfmState:
    """The request's half: its vectors for the candidate's fields [Q, P_uc, k], its pairs' share of the MLP's first
    layer [Q, H], and its first-order terms [Q, T]."""

    left_QPK: Tensor
    request_QH: Tensor
    linear_QT: Tensor


class DeepFfm(LinearAndDeep):
    """z = w_0 + sum w + MLP(h), h = V[i, j] * V[j, i] for all pairs of fields i < j, or their inner products.

    A field has a vector for each of the m - 1 others: an embedding costs (m - 1) k numbers. A column of the history is
    one field, its mean. ConfigError with fewer than two fields.
    """

    class Config(DeepStackOptions):
        """Options of deepffm."""

        presets = {"paper": {"dim": 10, "hidden": (1600, 1600, 1600), "dropout": 0.5}}

        dim: int = Option(default=4, ge=1)
        product: ProductName = "hadamard"

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.pairs = FieldAwarePairs(config, space, model="deepffm", product=config.product)
        self.linear = first_order_of(space, num_tasks)
        self.mlp = SplitMLP(self.pairs.num_uu * self.pairs.width, self.pairs.num_rest * self.pairs.width,
                            config.hidden, num_tasks, activation=config.activation, norm=config.norm,
                            dropout=config.dropout, out_bias=False)
        self.representation_width = (0, *config.hidden)[-1]

    def encode_request(self, batch: Batch) -> DeepFfmState:
        """The request's pairs."""
        products_QPK, left_QPK = self.pairs.of_request(self.pairs.cells_of_request(batch))
        return DeepFfmState(left_QPK=left_QPK, request_QH=self.mlp.of_request(products_QPK.flatten(1)),
                            linear_QT=self.linear.of_request(batch))

    def score_candidates(self, state: DeepFfmState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        products_QCPK = self.pairs.of_candidates(state.left_QPK[:, None], self.pairs.cells_of_candidates(batch))
        return (self.linear(state.linear_QT, batch)
                + self.mlp(state.request_QH, products_QCPK.flatten(-2), batch.mask_QC))
