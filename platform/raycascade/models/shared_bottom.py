"""shared_bottom: one MLP for all tasks, a tower for each (Caruana 1997)."""

from torch import Tensor

from raycascade.batch import Batch
from raycascade.models._experts import ExpertOptions, Experts, MultiTaskModel
from raycascade.schema import FeatureSpace


class SharedBottom(MultiTaskModel):
    """y = MLP(x), z_t = MLP_t(y) with x = [x_u; x_c], or the representation of a tower."""

    class Config(ExpertOptions):
        """`hidden` are the layers of the bottom."""

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__(config, space, num_tasks=num_tasks, model="shared_bottom")
        self.bottom = Experts(config, *self.trunk.widths, 1)

    def of_request(self, x_QD: Tensor) -> Tensor:
        """The request's share of the bottom's first layer [Q, H]."""
        return self.bottom.of_request(x_QD)

    def mixed(self, shares: Tensor, x_QCD: Tensor, mask_QC: Tensor) -> list[Tensor]:
        """The same y [Q, C, H] for every task."""
        return [self.bottom(shares, x_QCD, mask_QC).squeeze(-2)] * len(self.towers.of_task)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the tower explains."""
        return self.trunk.explain(batch)
