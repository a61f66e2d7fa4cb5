"""What multi-task models share: experts side by side, gates that mix them, and one tower per task."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.models._inputs import InputOptions
from raycascade.models._layers import MLP, ActivationName, HiddenUnits, SplitLinear, initialise


class ExpertOptions(InputOptions):
    """Options of every multi-task model. `hidden`: layers of each shared part or expert, an activation after the last
    one too; `tower_hidden`: hidden layers of each task's tower."""

    hidden: tuple[int, ...] = Option(default=(32,), min_length=1)
    tower_hidden: tuple[int, ...] = (16,)
    activation: ActivationName = "relu"
    dropout: float = Option(default=0.0, ge=0, lt=1)


class Experts(nn.Module):
    """E MLPs over [request; candidate], each with an activation after every layer, computed side by side.

    Their first layers are one `SplitLinear`, so that the request's share runs once a request.
    """

    def __init__(self, options: ExpertOptions, request_width: int, candidate_width: int, num: int) -> None:
        super().__init__()
        self.num, hidden = num, options.hidden
        self.first = SplitLinear(request_width, candidate_width, num * hidden[0], activation=options.activation)
        self.units = nn.ModuleList(
            HiddenUnits(num * width, activation=options.activation, norm="none", dropout=options.dropout)
            for width in hidden)
        shapes = [(num, after, before) for before, after in pairwise(hidden)]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape[:2])) for shape in shapes)
        for weight in self.weights:
            for expert in weight.detach():  # in place: views of the parameter
                initialise(expert, activation=options.activation)

    def of_request(self, x_QD: Tensor) -> Tensor:
        """The request's share of the first layers."""
        return self.first.of_request(x_QD)

    def forward(self, request_QH: Tensor, x_QCD: Tensor, mask_QC: Tensor) -> Tensor:
        """Outputs of the experts [Q, C, E, H], given `of_request`."""
        x = self.units[0](self.first(request_QH, x_QCD), mask_QC)
        for weight, bias, units in zip(self.weights, self.biases, list(self.units)[1:], strict=True):
            deeper = torch.einsum("qceh,ekh->qcek", x.unflatten(-1, (self.num, -1)), weight) + bias
            x = units(deeper.flatten(-2), mask_QC)
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
            MLP(options.hidden[-1], options.tower_hidden, 1, activation=options.activation, dropout=options.dropout)
            for _ in range(num_tasks))

    def silence(self) -> None:
        """Every task's logits start at 0."""
        for tower in self.of_task:
            tower.silence()  # type: ignore[operator]

    def forward(self, inputs: Sequence[Tensor], mask_QC: Tensor) -> Tensor:
        """Logits [Q, C, T] from one [Q, C, H] a task."""
        return torch.cat([tower(y_QCH, mask_QC) for tower, y_QCH in zip(self.of_task, inputs, strict=True)], -1)
