"""lr: logistic regression, a weight per value (Richardson et al. 2007)."""

from torch import Tensor

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._first_order import FirstOrder
from raycascade.models._model import TorchModel
from raycascade.plugins import PluginConfig
from raycascade.schema import FeatureSpace


class Lr(TorchModel):
    """z = w_0 + sum_f w_f[value] + sum_dense w_f x_f + sum_vector w_f . x; crosses are fields like the others.

    It orders a request's candidates by their own fields and by pairs (crosses, matches) alone. ConfigError without a
    candidate field.
    """

    class Config(PluginConfig):
        """There is nothing to choose."""

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        if not space.of("item", "pair"):
            raise ConfigError("lr: no feature of the candidates is left; exclude fewer features from the stage")
        self.linear = FirstOrder(space, num_tasks)

    def first_order(self) -> tuple[FirstOrder]:
        """All of it."""
        return (self.linear,)

    def silence(self) -> None:
        """Every weight is 0, every logit w_0."""
        self.linear.silence()

    def encode_request(self, batch: Batch) -> Tensor:
        """w_0 and the weights of the request [Q, T]."""
        return self.linear.of_request(batch)

    def score_candidates(self, state: Tensor, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        return self.linear(state, batch)
