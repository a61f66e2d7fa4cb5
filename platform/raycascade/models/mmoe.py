"""mmoe: multi-gate mixture of experts (Ma et al. 2018, KDD)."""

from pydantic import Field as Option
from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._experts import ExpertOptions, Experts, Gate, MultiTaskModel
from raycascade.schema import FeatureSpace


class Mmoe(MultiTaskModel):
    """y_t = sum_e softmax(W_t x)_e MLP_e(x), z_t = MLP_t(y_t) (equations 5 to 7) with x = [x_u; x_c], or the
    representation of a tower."""

    class Config(ExpertOptions):
        """`experts` must be at least 2: the gates of one are constant."""

        presets = {"paper": {"experts": 8}}

        experts: int = Option(default=4, ge=2)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__(config, space, num_tasks=num_tasks, model="mmoe")
        self.experts = Experts(config, *self.trunk.widths, config.experts)
        self.gate = Gate(*self.trunk.widths, mixtures=num_tasks, experts=config.experts)

    def of_request(self, x_QD: Tensor) -> tuple[Tensor, Tensor]:
        """The request's shares of the experts' first layers and of the gates."""
        return self.experts.of_request(x_QD), self.gate.of_request(x_QD)

    def mixed(self, shares: tuple[Tensor, Tensor], x_QCD: Tensor, mask_QC: Tensor) -> tuple[Tensor, ...]:
        """y_t [Q, C, H] of every task."""
        return (self.gate(shares[1], x_QCD) @ self.experts(shares[0], x_QCD, mask_QC)).unbind(2)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`gates` [Q, C, T, E]: the share of every expert in every task; and what the tower explains."""
        state = self.encode_request(batch)
        gates_QCTE = self.gate(state.shares[1], self.trunk.of_candidates(state.trunk, batch))
        return {"gates": gates_QCTE, **self.trunk.explain(batch)}
