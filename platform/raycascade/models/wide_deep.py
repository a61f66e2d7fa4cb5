"""wide_deep: wide and deep learning (Cheng et al. 2016, arXiv 1606.07792)."""

from pydantic import Field as Option
from torch import Tensor

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._deep import DeepOptions, DeepPart
from raycascade.models._first_order import FirstOrder
from raycascade.models._inputs import FieldInputs
from raycascade.models._model import TorchModel
from raycascade.schema import FeatureSpace, near_miss


class WideDeep(TorchModel):
    """z = lr(x, crosses) + MLP(x_0): the wide part has weights of its own, one per value and per cross product.

    ConfigError where `crosses` names what is no id field of the stage.
    """

    class Config(DeepOptions):
        """`crosses`: fields that the wide part alone sees, usually the schema's features of kind cross (the AND of
        their parts). Without any the model is lr + mlp."""

        presets = {"paper": {"dim": 32, "hidden": (1024, 512, 256)}}

        hidden: tuple[int, ...] = Option(default=(64, 32), min_length=1)  # without the deep part it is lr
        crosses: tuple[str, ...] = ()

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        known = {f.name for f in space.fields if f.form in ("id", "ids")}
        for name in config.crosses:
            if name not in known:
                raise ConfigError(f"wide_deep: crosses names {name!r}, which is no id field of the stage"
                                  f"{near_miss(name, known)}; declare it in the schema as a feature of kind cross")
        self.linear = FirstOrder(space, num_tasks)
        self.inputs = FieldInputs(config, space.without(config.crosses), model="wide_deep")
        self.deep = DeepPart(config, self.inputs.request_width(history=True), self.inputs.candidate_width, num_tasks)

    def first_order(self) -> tuple[FirstOrder]:
        """The wide part."""
        return (self.linear,)

    def silence(self) -> None:
        """Logits start at w_0."""
        self.linear.silence()
        self.deep.silence()

    def encode_request(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The request's share of the wide part [Q, T] and of the MLP's first layer [Q, H]."""
        return self.linear.of_request(batch), self.deep.of_request(self.inputs.request_matrix(batch, history=True))

    def score_candidates(self, state: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        wide_QT, request_QH = state
        deep_QCT = self.deep(request_QH, self.inputs.candidate_matrix(batch), batch.mask_QC)
        return self.linear(wide_QT, batch) + deep_QCT
