"""Blocks that models share: activations, masked statistics, masked softmax, MLPs and the split first layer.

Statistics of a batch (Dice, batch norm) are taken over valid entries only; a mask has the shape of the input without
its last axis, and None means that every entry is valid.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from raycascade.errors import ConfigError

ActivationName = Literal["relu", "leaky_relu", "prelu", "gelu", "silu", "sigmoid", "tanh", "dice"]
NormName = Literal["none", "layer", "batch"]
RECTIFIERS = ("relu", "leaky_relu", "prelu", "gelu", "silu", "dice")


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax along the last axis over valid entries; a row without any is all zeros. `mask` broadcasts."""
    weights = torch.softmax(logits.masked_fill(~mask, torch.finfo(logits.dtype).min), -1)
    return weights.masked_fill(~mask, 0.0)


def masked_mean(values_QLD: Tensor, mask_QL: Tensor) -> Tensor:
    """Mean over the valid entries of axis L [Q, D]; zero where there is none."""
    weights_QL = mask_QL.to(values_QLD.dtype)
    weights_QL = weights_QL / weights_QL.sum(-1, keepdim=True).clamp(min=1.0)
    return (weights_QL[:, None] @ values_QLD).flatten(1)


def linear(width: int, out: int, *, bias: bool = True, wide: bool = False) -> nn.Linear:
    """A linear map as `initialise` draws it; bias 0."""
    layer = nn.Linear(width, out, bias=bias)
    initialise(layer.weight, wide=wide)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def initialise(weight: Tensor, *, wide: bool = False) -> None:
    """Redraws a matrix [out, in] in place: `wide` uniform within sqrt(6 / in), which keeps the variance through
    rectifiers (He et al. 2015, equation 10), else within 1 / sqrt(in) as in `nn.Linear`.

    Hidden layers and vectors start wide, last layers do not: no step is spent on unlearning random logits (decision 7).
    """
    nn.init.kaiming_uniform_(weight, a=0.0 if wide else 5**0.5)


class RunningMoments(nn.Module):
    """Mean and population variance per unit over valid rows: of the batch in training, moving averages in evaluation.

    With fewer than two valid rows training uses the moving averages and leaves them as they are.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mean, var), each [D], for x [..., D]."""
        if not self.training:
            return self.mean, self.var
        rows = x.flatten(0, -2)
        valid = rows.new_ones(len(rows)) if mask is None else mask.flatten().to(rows.dtype)
        count = valid.sum()
        weights = valid / count.clamp(min=1.0)
        mean = weights @ rows
        var = weights @ (rows - mean).square()
        enough = count >= 2
        mean, var = torch.where(enough, mean, self.mean), torch.where(enough, var, self.var)
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            self.var.lerp_(var, self.momentum)
        return mean, var


class MaskedBatchNorm(nn.Module):
    """Batch norm over valid rows (Ioffe and Szegedy 2015), with a population variance in the moving average too."""

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.moments = RunningMoments(width, momentum=0.1)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalised x [..., D]."""
        mean, var = self.moments(x, mask)
        return (x - mean) * (torch.rsqrt(var + self.eps) * self.weight) + self.bias


class Dice(nn.Module):
    """f(s) = p s + (1 - p) alpha s with p = sigmoid((s - E[s]) / sqrt(Var[s] + eps)) (Zhou et al. 2018, eq. 3)."""

    def __init__(self, width: int, *, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.moments = RunningMoments(width, momentum=0.01)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [..., D] -> [..., D]."""
        mean, var = self.moments(x, mask)
        p = torch.sigmoid((x - mean) * torch.rsqrt(var + self.eps))
        return x * (self.alpha + p * (1.0 - self.alpha))


class PReLU(nn.Module):
    """max(0, x) + alpha min(0, x) with one slope per unit of the last axis, 0.25 at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((width,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if not torch.is_grad_enabled():
            return (x * self.alpha).addcmul_(torch.relu(x), 1.0 - self.alpha)
        return torch.relu(x) * (1.0 - self.alpha) + x * self.alpha  # half the time of F.prelu's backward on CPU


def activation_module(name: ActivationName, width: int) -> nn.Module:
    """The activation called `name` for `width` units."""
    if name == "dice":
        return Dice(width)
    if name == "prelu":
        return PReLU(width)
    return {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid,
            "tanh": nn.Tanh}[name]()


class HiddenUnits(nn.Module):
    """What follows the linear map of a hidden layer: norm, activation, dropout."""

    def __init__(self, width: int, *, activation: ActivationName, norm: NormName, dropout: float) -> None:
        super().__init__()
        self.norm = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": MaskedBatchNorm}[norm](width)
        self.activation = activation_module(activation, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [..., D] -> [..., D]."""
        x = self.norm(x, mask) if isinstance(self.norm, MaskedBatchNorm) else self.norm(x)
        x = self.activation(x, mask) if isinstance(self.activation, Dice) else self.activation(x)
        return self.dropout(x)


class UpperLayers(nn.Module):
    """An MLP without its first linear map: units of `hidden`, each followed by a linear map, `out` at the end. With
    `out` 0 there is no last map: the last units are the result. `vector`: the result is no logits but a vector, whose
    length a cosine takes away: steps turn a short one faster than a long one, so it starts as wide as the layers."""

    def __init__(
        self, hidden: tuple[int, ...], out: int, *, activation: ActivationName = "relu", norm: NormName = "none",
        dropout: float = 0.0, out_bias: bool = True, vector: bool = False,
    ) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            HiddenUnits(width, activation=activation, norm=norm, dropout=dropout) for width in hidden)
        pairs = list(pairwise((*hidden, out) if out else hidden))
        last = len(hidden) - 1
        self.linears = nn.ModuleList(
            linear(a, b, bias=out_bias if n == last else norm != "batch",
                   wide=vector or (n != last and activation in RECTIFIERS)) for n, (a, b) in enumerate(pairs))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Result of the first linear map [..., H] -> [..., out]."""
        for n, units in enumerate(self.units):
            x = units(x, mask)
            if n < len(self.linears):
                x = self.linears[n](x)
        return x


def first_width(hidden: tuple[int, ...], out: int) -> int:
    """Width of an MLP's first linear map; ConfigError for an MLP without any map."""
    width = (*hidden, out)[0]
    if not width:
        raise ConfigError("without hidden layers there is no vector before the output; give the tower hidden layers")
    return width


class SplitLinear(nn.Module):
    """y = W_u x_q + W_c x_qc + b: a linear map of [request; candidate] whose first product runs once a request.

    Either side may have width 0.
    """

    def __init__(
        self, request_width: int, candidate_width: int, out: int, *, bias: bool = True,
        wide: bool = False,
    ) -> None:
        super().__init__()
        self.out = out
        self.request = nn.Linear(request_width, out, bias=False) if request_width else None
        self.candidate = nn.Linear(candidate_width, out, bias=False) if candidate_width else None
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        whole = torch.empty(out, request_width + candidate_width)
        initialise(whole, wide=wide)
        with torch.no_grad():
            if self.request is not None:
                self.request.weight.copy_(whole[:, :request_width])
            if self.candidate is not None:
                self.candidate.weight.copy_(whole[:, request_width:])

    def silence(self) -> None:
        """Zeroes the map; its bias stays."""
        for side in (self.request, self.candidate):
            if side is not None:
                nn.init.zeros_(side.weight)

    def of_request(self, x_QD: Tensor) -> Tensor:
        """W_u x + b [Q, out]."""
        y = x_QD.new_zeros(*x_QD.shape[:-1], self.out) if self.request is None else self.request(x_QD)
        return y if self.bias is None else y + self.bias

    def forward(self, request_QH: Tensor, x_QCD: Tensor) -> Tensor:
        """The whole map [Q, C, out], given `of_request`."""
        request_Q1H = request_QH[:, None]
        if self.candidate is None:
            return request_Q1H.expand(*x_QCD.shape[:-1], self.out)
        return self.candidate(x_QCD) + request_Q1H


class MLP(nn.Module):
    """Linear -> norm -> activation -> dropout for each width of `hidden`, then a bare linear map to `out` (0: none)."""

    def __init__(
        self, width: int, hidden: tuple[int, ...], out: int, *, activation: ActivationName = "relu",
        norm: NormName = "none", dropout: float = 0.0, out_bias: bool = True, vector: bool = False,
    ) -> None:
        super().__init__()
        bias = norm != "batch" if hidden else out_bias  # the norm's own bias makes the map's redundant
        self.first = linear(width, first_width(hidden, out), bias=bias,
                            wide=vector or (bool(hidden) and activation in RECTIFIERS))
        self.upper = UpperLayers(hidden, out, activation=activation, norm=norm, dropout=dropout, out_bias=out_bias,
                                 vector=vector)

    def silence(self) -> None:
        """Zeroes the last linear map; its bias stays."""
        nn.init.zeros_((self.upper.linears[-1] if len(self.upper.linears) else self.first).weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [..., width] -> [..., out]."""
        return self.upper(self.first(x), mask)


class SplitMLP(nn.Module):
    """An MLP over [request; candidate] whose first layer is a `SplitLinear`."""

    def __init__(
        self, request_width: int, candidate_width: int, hidden: tuple[int, ...], out: int, *,
        activation: ActivationName = "relu", norm: NormName = "none", dropout: float = 0.0, out_bias: bool = True,
    ) -> None:
        super().__init__()
        self.first = SplitLinear(
            request_width, candidate_width, first_width(hidden, out), bias=norm != "batch" if hidden else out_bias,
            wide=bool(hidden) and activation in RECTIFIERS)
        self.upper = UpperLayers(hidden, out, activation=activation, norm=norm, dropout=dropout, out_bias=out_bias)

    def silence(self) -> None:
        """Zeroes the last linear map; its bias stays."""
        if len(self.upper.linears):
            nn.init.zeros_(self.upper.linears[-1].weight)  # type: ignore[arg-type]
        else:
            self.first.silence()

    def of_request(self, x_QD: Tensor) -> Tensor:
        """The request's share of the first layer [Q, H]."""
        return self.first.of_request(x_QD)

    def forward(self, request_QH: Tensor, x_QCD: Tensor, mask_QC: Tensor | None = None) -> Tensor:
        """[Q, C, out], given `of_request`."""
        return self.upper(self.first(request_QH, x_QCD), mask_QC)
