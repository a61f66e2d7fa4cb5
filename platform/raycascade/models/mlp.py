"""mlp: a multi-layer perceptron over the request's and the candidate's features."""

from pydantic import Field as Option
from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import ActivationName, NormName, SplitMLP
from raycascade.models._model import TorchModel
from raycascade.schema import FeatureSpace


class Mlp(TorchModel):
    """z = MLP([x_u; x_c]); the history enters x_u as the mean of each of its columns."""

    class Config(InputOptions):
        """`hidden`: widths of the hidden layers; [400, 400, 400] is the size of published comparisons."""

        hidden: tuple[int, ...] = (64, 32)
        activation: ActivationName = "relu"
        norm: NormName = "none"
        dropout: float = Option(default=0.0, ge=0, lt=1)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldInputs(config, space, model="mlp")
        self.mlp = SplitMLP(self.inputs.request_width(history=True), self.inputs.candidate_width, config.hidden,
                            num_tasks, activation=config.activation, norm=config.norm, dropout=config.dropout)

    def encode_request(self, batch: Batch) -> Tensor:
        """The request's share of the first layer [Q, H]."""
        return self.mlp.of_request(self.inputs.request_matrix(batch, history=True))

    def score_candidates(self, state: Tensor, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        return self.mlp(state, self.inputs.candidate_matrix(batch), batch.mask_QC)
