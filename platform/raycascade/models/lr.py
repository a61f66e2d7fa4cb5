"""lr: logistic regression, a weight per value (Richardson et al. 2007)."""

from pydantic import Field as Option
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

    default_l2_touched = 1e-6

    class Config(PluginConfig):
        """`linear_rate`: its learning rate in multiples of the stage's, because single weights have further to go than
        entries of vectors."""

        linear_rate: float = Option(default=10.0, gt=0)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        if not space.of("item", "pair"):
            raise ConfigError("lr: no feature of the candidates is left; exclude fewer features from the stage")
        self.linear = FirstOrder(space, num_tasks)
        self.linear_rate = config.linear_rate

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
