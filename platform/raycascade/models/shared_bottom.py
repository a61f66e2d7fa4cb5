"""shared_bottom: one MLP for all tasks, a tower for each (Caruana 1997)."""

from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._experts import ExpertOptions, Experts, Towers
from raycascade.models._inputs import FieldInputs
from raycascade.models._model import TorchModel
from raycascade.schema import FeatureSpace


class SharedBottom(TorchModel):
    """y = MLP([x_u; x_c]), z_t = MLP_t(y); the history enters x_u as the mean of each of its columns."""

    class Config(ExpertOptions):
        """`hidden` are the layers of the bottom."""

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldInputs(config, space, model="shared_bottom")
        self.bottom = Experts(config, self.inputs.request_width(history=True), self.inputs.candidate_width, 1)
        self.towers = Towers(config, num_tasks)

    def silence(self) -> None:
        """Logits start at the biases of the towers' last layers, 0."""
        self.towers.silence()

    def encode_request(self, batch: Batch) -> Tensor:
        """The request's share of the bottom's first layer [Q, H]."""
        return self.bottom.of_request(self.inputs.request_matrix(batch, history=True))

    def score_candidates(self, state: Tensor, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        y_QCH = self.bottom(state, self.inputs.candidate_matrix(batch), batch.mask_QC).squeeze(-2)
        return self.towers([y_QCH] * len(self.towers.of_task), batch.mask_QC)
