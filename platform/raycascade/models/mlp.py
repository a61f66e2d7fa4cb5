"""mlp: a multi-layer perceptron over the request's and the candidate's features."""

import torch
from pydantic import Field as Option
from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._history import GroupedHistory
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import ActivationName, NormName, SplitMLP
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace


class Mlp(RepresentingModel):
    """z = MLP([x_u; x_c]); the history enters x_u as the mean of each of its columns."""

    class Config(InputOptions):
        """`hidden`: widths of the hidden layers.

        `interest`: also feeds the products of the candidate's item vector with the history's, pooled per value of the
        event field `history_by` (`GroupedHistory`): what a tower computes, as an input."""

        presets = {"paper": {"hidden": (400, 400, 400)}}

        hidden: tuple[int, ...] = (64, 32)
        activation: ActivationName = "relu"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)
        interest: bool = False
        history_by: str | None = None

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldInputs(config, space, model="mlp")
        self.pools = GroupedHistory(self.inputs, space, config.history_by) if config.interest else None
        self.product_scale = 1.0 / config.embedding_std  # products of two embeddings start at the scale of one
        pooled = self.pools.width if self.pools else 0
        self.mlp = SplitMLP(self.inputs.request_width(history=self.pools is None) + pooled,
                            self.inputs.candidate_width + pooled, config.hidden, num_tasks,
                            activation=config.activation, norm=config.norm, dropout=config.dropout)
        self.representation_width = (0, *config.hidden)[-1]

    def silence(self) -> None:
        """Logits start at the bias of the MLP's last layer, 0."""
        self.mlp.silence()

    def encode_request(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The request's share of the first layer [Q, H], and the pooled histories [Q, G, d_h]."""
        if self.pools is None:
            return self.mlp.of_request(self.inputs.request_matrix(batch, history=True)), None
        pools_QGD = self.pools(batch)
        own_QD = self.inputs.request_matrix(batch, history=False)
        return self.mlp.of_request(torch.cat([own_QD, pools_QGD.flatten(1)], -1)), pools_QGD

    def score_candidates(self, state: tuple[Tensor, Tensor | None], batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        request_QH, pools_QGD = state
        x_QCD = self.inputs.candidate_matrix(batch)
        if pools_QGD is not None:
            products_QCGD = self.inputs.as_event(x_QCD)[:, :, None] * pools_QGD[:, None] * self.product_scale
            x_QCD = torch.cat([x_QCD, products_QCGD.flatten(2)], -1)
        return self.mlp(request_QH, x_QCD, batch.mask_QC)
