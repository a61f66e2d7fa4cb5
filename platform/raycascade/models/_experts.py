"""What multi-task models share: experts side by side, gates that mix them, and one tower per task."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field as Option, model_validator
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._inputs import InputOptions
from raycascade.models._layers import MLP, RECTIFIERS, ActivationName, HiddenUnits, SplitLinear, initialise
from raycascade.models._model import TorchModel
from raycascade.models._trunks import FieldTrunk, TowerTrunk, refuse_unfit_tower
from raycascade.schema import FeatureSpace


class ExpertOptions(InputOptions):
    """Options of every multi-task model. `tower`: a model such as {name: dcn_v2}, whose vector before the output the
    experts read; None: the fields. `hidden`: layers of each shared part or expert, an activation after the last one
    too; `tower_hidden`: hidden layers of each task's tower."""

    tower: dict[str, Any] | None = None
    hidden: tuple[int, ...] = Option(default=(32,), min_length=1)
    tower_hidden: tuple[int, ...] = (16,)
    activation: ActivationName = "relu"
    norm: Literal["none", "batch"] = "none"  # in experts and towers, not in gates
    dropout: float = Option(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _tower_fits(self) -> "ExpertOptions":
        if self.tower is not None:
            refuse_unfit_tower(self.tower, beside=self.model_fields_set & set(InputOptions.model_fields))
        return self


class Experts(nn.Module):
    """E MLPs over [request; candidate], each with an activation after every layer, computed side by side.

    Their first layers are one `SplitLinear`, so that the request's share runs once a request.
    """

    def __init__(self, options: ExpertOptions, request_width: int, candidate_width: int, num: int) -> None:
        super().__init__()
        self.num, hidden = num, options.hidden
        biased = options.norm == "none"  # the norm's own bias makes the map's redundant
        self.first = SplitLinear(request_width, candidate_width, num * hidden[0], bias=biased,
                                 wide=options.activation in RECTIFIERS)
        self.units = nn.ModuleList(
            HiddenUnits(num * width, activation=options.activation, norm=options.norm, dropout=options.dropout)
            for width in hidden)
        shapes = [(num, after, before) for before, after in pairwise(hidden)]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape[:2])) for shape in shapes if biased)
        for weight in self.weights:
            for expert in weight.detach():  # in place: views of the parameter
                initialise(expert, wide=options.activation in RECTIFIERS)

    def of_request(self, x_QD: Tensor) -> Tensor:
        """The request's share of the first layers."""
        return self.first.of_request(x_QD)

    def forward(self, request_QH: Tensor, x_QCD: Tensor, mask_QC: Tensor) -> Tensor:
        """Outputs of the experts [Q, C, E, H], given `of_request`."""
        x = self.units[0](self.first(request_QH, x_QCD), mask_QC)
        for n, weight in enumerate(self.weights):
            deeper = torch.einsum("qceh,ekh->qcek", x.unflatten(-1, (self.num, -1)), weight)
            x = self.units[n + 1]((deeper + self.biases[n] if len(self.biases) else deeper).flatten(-2), mask_QC)
        return x.unflatten(-1, (self.num, -1))


class Gate(nn.Module):
    """softmax(W x) over E experts for each of so many mixtures: one linear map, no bias, no norm, no hidden layer."""

    def __init__(self, request_width: int, candidate_width: int, *, mixtures: int, experts: int) -> None:
        super().__init__()
        self.shape = (mixtures, experts)
        self.map = SplitLinear(request_width, candidate_width, mixtures * experts, bias=False)

    def of_request(self, x_QD: Tensor) -> Tensor:
        """The request's share."""
        return self.map.of_request(x_QD)

    def forward(self, request_QH: Tensor, x_QCD: Tensor) -> Tensor:
        """Weights [Q, C, mixtures, E], given `of_request`."""
        return self.map(request_QH, x_QCD).unflatten(-1, self.shape).softmax(-1)


class Towers(nn.Module):
    """z_t = MLP_t(y_t), a tower for each task."""

    def __init__(self, options: ExpertOptions, num_tasks: int) -> None:
        super().__init__()
        self.of_task = nn.ModuleList(
            MLP(options.hidden[-1], options.tower_hidden, 1, activation=options.activation, norm=options.norm,
                dropout=options.dropout)
            for _ in range(num_tasks))

    def silence(self) -> None:
        """Every task's logits start at 0."""
        for tower in self.of_task:
            tower.silence()  # type: ignore[operator]

    def forward(self, inputs: Sequence[Tensor], mask_QC: Tensor) -> Tensor:
        """Logits [Q, C, T] from one [Q, C, H] a task."""
        return torch.cat([tower(y_QCH, mask_QC) for tower, y_QCH in zip(self.of_task, inputs, strict=True)], -1)


@dataclass(frozen=True)
class MultiTaskState:
    """The request's half: its shares of the experts and gates that read the trunk, and the trunk's own state."""

    shares: Any
    trunk: Any


class MultiTaskModel(TorchModel):
    """Experts over a trunk, mixed for every task, and a tower for each task: z_t = MLP_t(y_t).

    The trunk is x = [x_u; x_c], where the history enters x_u as the mean of each of its columns, or the representation
    of another model (`ExpertOptions.tower`). A subclass builds its experts over `trunk.widths`.
    """

    def __init__(self, config: ExpertOptions, space: FeatureSpace, *, num_tasks: int, model: str) -> None:
        super().__init__()
        self.trunk = (FieldTrunk(config, space, model=model) if config.tower is None
                      else TowerTrunk(config.tower, space))
        self.towers = Towers(config, num_tasks)

    @property
    def training_needs(self) -> frozenset[str]:
        """Those of the trunk."""
        return self.trunk.training_needs

    def silence(self) -> None:
        """Logits start at the biases of the towers' last layers, 0."""
        self.towers.silence()

    @abstractmethod
    def of_request(self, x_QD: Tensor) -> Any:
        """The request's shares of all that reads the trunk, from its request part."""

    @abstractmethod
    def mixed(self, shares: Any, x_QCD: Tensor, mask_QC: Tensor) -> Sequence[Tensor]:
        """y_t [Q, C, H] of every task, given `of_request` and the trunk's candidate part."""

    def encode_request(self, batch: Batch) -> MultiTaskState:
        """What the request alone decides."""
        x_QD, trunk = self.trunk.of_request(batch)
        return MultiTaskState(self.of_request(x_QD), trunk)

    def score_candidates(self, state: MultiTaskState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        x_QCD = self.trunk.of_candidates(state.trunk, batch)
        return self.towers(self.mixed(state.shares, x_QCD, batch.mask_QC), batch.mask_QC)

    def train_outputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Logits [Q, C, T], and the trunk's auxiliary losses."""
        x_QD, x_QCD, extra = self.trunk.train_outputs(batch)
        mixed = self.mixed(self.of_request(x_QD), x_QCD, batch.mask_QC)
        return self.towers(mixed, batch.mask_QC), extra
