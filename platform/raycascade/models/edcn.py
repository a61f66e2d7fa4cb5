"""edcn: enhanced deep and cross network, with bridges and field-wise gates (Chen et al. 2021, CIKM, "EDCN")."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.models._layers import SplitLinear, linear
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace

BridgeName = Literal["hadamard", "add", "concat", "attention"]


@dataclass(frozen=True)
class EdcnState:
    """The request's half of level 0: its gated fields and their shares of the cross and of the deep layer."""

    gated_QD: Tensor
    cross_Q1: Tensor
    deep_QD: Tensor


class Bridge(nn.Module):
    """f(c, d): c * d, c + d, ReLU(W [c; d]), or A1(c) * c + A2(d) * d with A = softmax(W2 ReLU(W1 .)) of each its
    own."""

    def __init__(self, name: BridgeName, width: int) -> None:
        super().__init__()
        self.name = name
        self.joint = linear(2 * width, width) if name == "concat" else None
        self.attention = nn.ModuleList(
            nn.Sequential(linear(width, width), nn.ReLU(), linear(width, width, bias=False),
                          nn.Softmax(-1)) for _ in range(2 if name == "attention" else 0))

    def forward(self, cross: Tensor, deep: Tensor) -> Tensor:
        """[..., D] and [..., D] -> [..., D]."""
        if self.name == "hadamard":
            return cross * deep
        if self.name == "add":
            return cross + deep
        if self.joint is not None:
            return torch.relu(self.joint(torch.cat([cross, deep], -1)))
        of_cross, of_deep = self.attention
        return of_cross(cross) * cross + of_deep(deep) * deep


class Edcn(RepresentingModel):
    """A cross and a deep stream, joined by a bridge and gated again at every level l; z = w^T [c; d; b] + b_0.

    x_c = g_c * b_{l-1}, x_d = g_d * b_{l-1} with b_{-1} the fields and g = softmax(theta / tau) over the fields;
    c_l = base (x_c . w_l) + beta_l + x_c with base the x_c of level 0; d_l = ReLU(W_l x_d + a_l); b_l = f(c_l, d_l).
    Dense features and columns of the history are fields too.
    """

    class Config(InputOptions):
        """`gate_scale: fields` multiplies the gates by the number of fields m, so that equal gates change nothing; with
        `none`, the authors' form, each level shrinks its input m times and a wide schema is hardly learned.
        `dense_std`: deviation of numbers' initial slopes, as wide as a linear map's; None: embedding_std."""

        presets = {"code": {"num_layers": 3}}

        dense: Literal["field"] = "field"  # pyright: ignore[reportIncompatibleVariableOverride]
        dense_std: float | None = Option(default=0.5, gt=0)
        num_layers: int = Option(default=2, ge=1)
        temperature: float = Option(default=1.0, gt=0)
        bridge: BridgeName = "hadamard"
        gate_scale: Literal["none", "fields"] = "fields"

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        self.inputs = FieldInputs(config, space, model="edcn", dense_std=config.dense_std)
        widths = self.inputs.request_width(history=True), self.inputs.candidate_width
        width, self.num_layers = sum(widths), config.num_layers
        num_fields = width // config.dim
        self.temperature = config.temperature
        self.gate_scale = float(num_fields) if config.gate_scale == "fields" else 1.0
        self.theta = nn.Parameter(torch.ones(2, self.num_layers, num_fields))  # of the cross and of the deep stream
        self.cross_first = SplitLinear(*widths, 1, bias=False)
        self.cross = nn.ModuleList(linear(width, 1, bias=False) for _ in range(1, self.num_layers))
        self.beta = nn.Parameter(torch.zeros(self.num_layers, width))
        self.deep_first = SplitLinear(*widths, width)
        self.deep = nn.ModuleList(linear(width, width) for _ in range(1, self.num_layers))
        self.bridges = nn.ModuleList(Bridge(config.bridge, width) for _ in range(self.num_layers))
        self.representation_width = 3 * width
        self.out = linear(3 * width, num_tasks) if num_tasks else nn.Identity()

    def silence(self) -> None:
        """Logits start at the bias of the output, 0."""
        nn.init.zeros_(self.out.get_parameter("weight"))

    def gates(self) -> Tensor:
        """g_c and g_d of every level [2, levels, F]; they sum to 1, or to F with `gate_scale: fields`."""
        return torch.softmax(self.theta / self.temperature, -1) * self.gate_scale

    def encode_request(self, batch: Batch) -> EdcnState:
        """The request's fields, gated, and their products."""
        x_QD = self.inputs.request_matrix(batch, history=True)
        cross_D, deep_D = self._entries()[:, 0, :x_QD.shape[-1]]
        gated_QD = x_QD * cross_D
        return EdcnState(gated_QD, self.cross_first.of_request(gated_QD), self.deep_first.of_request(x_QD * deep_D))

    def score_candidates(self, state: EdcnState, batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        return self.out(torch.cat(self.streams(state, batch), -1))

    def streams(self, state: EdcnState, batch: Batch) -> list[Tensor]:
        """c, d and b of the last level, each [Q, C, D]."""
        x_QCD = self.inputs.candidate_matrix(batch)
        entries = self._entries()
        cross_D, deep_D = entries[:, 0, state.gated_QD.shape[-1]:]
        gated_QCD = x_QCD * cross_D
        request_QCD = state.gated_QD[:, None].expand(-1, x_QCD.shape[1], -1)
        base_QCD = torch.cat([request_QCD, gated_QCD], -1)
        c_QCD = base_QCD * (self.cross_first(state.cross_Q1, gated_QCD) + 1.0) + self.beta[0]
        d_QCD = torch.relu(self.deep_first(state.deep_QD, x_QCD * deep_D))
        b_QCD = self.bridges[0](c_QCD, d_QCD)
        for level in range(1, self.num_layers):
            cross_D, deep_D = entries[:, level]
            x_QCD = b_QCD * cross_D
            d_QCD = torch.relu(self.deep[level - 1](b_QCD * deep_D))
            c_QCD = base_QCD * self.cross[level - 1](x_QCD) + self.beta[level] + x_QCD
            b_QCD = self.bridges[level](c_QCD, d_QCD)
        return [c_QCD, d_QCD, b_QCD]

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`cross_gates` and `deep_gates` [levels, F]: the same for every candidate."""
        return dict(zip(("cross_gates", "deep_gates"), self.gates(), strict=True))

    def _entries(self) -> Tensor:
        """The gates, one for each entry of x [2, levels, D]."""
        return self.gates().repeat_interleave(self.inputs.dim, -1)
