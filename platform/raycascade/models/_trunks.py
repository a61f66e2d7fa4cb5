"""What the experts of multi-task models read: the fields, or the vector that another model makes of a candidate."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace


class FieldTrunk(nn.Module):
    """x_0 = [x_u; x_c], in its two parts of `widths`; the history enters x_u as the mean of each of its columns."""

    training_needs: frozenset[str] = frozenset()

    def __init__(self, options: InputOptions, space: FeatureSpace, *, model: str) -> None:
        super().__init__()
        self.inputs = FieldInputs(options, space, model=model)
        self.widths = (self.inputs.request_width(history=True), self.inputs.candidate_width)

    def of_request(self, batch: Batch) -> tuple[Tensor, None]:
        """x_u [Q, d_u]; the candidates need no more of the request."""
        return self.inputs.request_matrix(batch, history=True), None

    def of_candidates(self, state: None, batch: Batch) -> Tensor:
        """x_c [Q, C, d_c]."""
        return self.inputs.candidate_matrix(batch)

    def train_outputs(self, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """x_u, x_c, and no auxiliary loss."""
        return self.of_request(batch)[0], self.of_candidates(None, batch), {}

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class TowerTrunk(nn.Module):
    """The representation of a `RepresentingModel`. It depends on the candidate as a whole: its request part has width
    0, and what the request alone decides is the state of the model."""

    _anchor: Tensor

    def __init__(self, spec: Mapping[str, Any], space: FeatureSpace) -> None:
        super().__init__()
        plugin, options = plugins.options("models", dict(spec), "tower")
        try:
            self.tower: RepresentingModel = plugin(options, space, num_tasks=0)
        except ConfigError as error:
            raise ConfigError(f"tower: {error}") from None
        self.widths = (0, self.tower.representation_width)
        self.register_buffer("_anchor", torch.zeros(0), persistent=False)  # follows the module's device and dtype

    @property
    def training_needs(self) -> frozenset[str]:
        """Those of the tower."""
        return self.tower.training_needs

    def of_request(self, batch: Batch) -> tuple[Tensor, Any]:
        """[Q, 0], and the tower's state."""
        return self._anchor.new_zeros(batch.num_requests, 0), self.tower.encode_request(batch)

    def of_candidates(self, state: Any, batch: Batch) -> Tensor:
        """The representations [Q, C, H]."""
        return self.tower.score_candidates(state, batch)

    def train_outputs(self, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """[Q, 0], the representations [Q, C, H], and the tower's auxiliary losses."""
        representations_QCH, extra = self.tower.train_outputs(batch)
        return self._anchor.new_zeros(batch.num_requests, 0), representations_QCH, extra

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the tower explains, as `tower.<name>`."""
        return {f"tower.{name}": weights for name, weights in self.tower.explain(batch).items()}


def refuse_unfit_tower(spec: Mapping[str, Any], *, beside: Collection[str]) -> None:
    """ConfigError for a tower without a representation, and for options `beside` it that only embeddings need."""
    plugin, _ = plugins.options("models", dict(spec), "tower")
    if not issubclass(plugin, RepresentingModel):
        known = [n for n in plugins.names("models") if issubclass(plugins.find("models", n), RepresentingModel)]
        raise ConfigError(f"tower: {spec['name']} makes no vector of a candidate that experts could read; "
                          f"use one of {', '.join(known)}")
    if beside:
        raise ConfigError(f"tower: the embeddings are the tower's, so {', '.join(sorted(beside))} of the model mean "
                          f"nothing; set them in the tower, such as tower.{min(beside)}")
