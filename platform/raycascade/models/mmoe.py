"""mmoe: multi-gate mixture of experts (Ma et al. 2018, KDD)."""

from pydantic import Field as Option
from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._experts import ExpertOptions, Experts, Gate, Towers
from raycascade.models._inputs import FieldInputs
from raycascade.models._model import TorchModel
from raycascade.schema import FeatureSpace


class Mmoe(TorchModel):
    """y_t = sum_e softmax(W_t x)_e MLP_e(x), z_t = MLP_t(y_t) with x = [x_u; x_c] (equations 5 to 7); the history
    enters x_u as the mean of each of its columns."""

    class Config(ExpertOptions):
        """The paper's size is 8 experts. `experts` must be at least 2: the gates of one are constant."""

        experts: int = Option(default=4, ge=2)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldInputs(config, space, model="mmoe")
        widths = self.inputs.request_width(history=True), self.inputs.candidate_width
        self.experts = Experts(config, *widths, config.experts)
        self.gate = Gate(*widths, mixtures=num_tasks, experts=config.experts)
        self.towers = Towers(config, num_tasks)

    def silence(self) -> None:
        """Logits start at the biases of the towers' last layers, 0."""
        self.towers.silence()

    def encode_request(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The request's shares of the experts' first layers and of the gates."""
        x_QD = self.inputs.request_matrix(batch, history=True)
        return self.experts.of_request(x_QD), self.gate.of_request(x_QD)

    def score_candidates(self, state: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        x_QCD = self.inputs.candidate_matrix(batch)
        mixed_QCTH = self.gate(state[1], x_QCD) @ self.experts(state[0], x_QCD, batch.mask_QC)
        return self.towers(mixed_QCTH.unbind(2), batch.mask_QC)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`gates` [Q, C, T, E]: the share of every expert in every task."""
        return {"gates": self.gate(self.encode_request(batch)[1], self.inputs.candidate_matrix(batch))}
