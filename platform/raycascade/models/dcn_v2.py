"""dcn_v2: the improved deep and cross network (Wang et al. 2021, arXiv 2008.13535)."""

from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._deep import DeepOptions, DeepPart
from raycascade.models._inputs import FieldInputs
from raycascade.models._layers import MLP, SplitLinear, initialise, linear
from raycascade.models._model import RepresentingModel
from raycascade.schema import FeatureSpace


class FullCross(nn.Module):
    """x_0 * (W x_l + b) + x_l. `first`: x_l is x_0, whose request part is multiplied once a request."""

    def __init__(self, widths: tuple[int, int], *, first: bool) -> None:
        super().__init__()
        width = sum(widths)
        self.map = SplitLinear(*widths, width) if first else linear(width, width)

    def of_request(self, x_QD: Tensor) -> tuple[Tensor, ...]:
        """The request's share of W x_0 + b [Q, D]."""
        assert isinstance(self.map, SplitLinear)
        return (self.map.of_request(x_QD),)

    def forward(self, x0_QCD: Tensor, x_QCD: Tensor, share: tuple[Tensor, ...] = ()) -> Tensor:
        """x_{l+1} [Q, C, D]. In the first layer x is the candidate's part of x_0, and `share` is `of_request`'s."""
        if isinstance(self.map, SplitLinear):
            return torch.addcmul(x0_QCD, x0_QCD, self.map(*share, x_QCD))
        return torch.addcmul(x_QCD, x0_QCD, self.map(x_QCD))


class LowRankCross(nn.Module):
    """sum_e G_e(x_l) x_0 * (U_e tanh(C_e tanh(V_e^T x_l)) + b) + x_l with G = softmax(W_g x_l), 1 for one expert.

    The gates sum to 1, so that all U_e are one map of the gated inner vectors, and b is added once.
    """

    def __init__(self, widths: tuple[int, int], *, rank: int, experts: int, first: bool) -> None:
        super().__init__()
        width, self.experts = sum(widths), experts
        inner = rank * experts
        self.down = SplitLinear(*widths, inner, bias=False) if first else linear(width, inner, bias=False)
        self.core = nn.Parameter(torch.empty(experts, rank, rank))
        for matrix in self.core.data:
            initialise(matrix)
        self.up = linear(inner, width)
        self.gate: SplitLinear | nn.Linear | None = None
        if experts > 1:  # the gate of a single expert would be 1, whatever it learned
            self.gate = (SplitLinear(*widths, experts, bias=False) if first
                         else linear(width, experts, bias=False))

    def of_request(self, x_QD: Tensor) -> tuple[Tensor, ...]:
        """The request's share of V^T x_0 [Q, E * R] and of the gates [Q, E]."""
        maps = (self.down, self.gate)
        return tuple(m.of_request(x_QD) for m in maps if isinstance(m, SplitLinear))

    def gates(self, x_QCD: Tensor, share: tuple[Tensor, ...] = ()) -> Tensor:
        """G [Q, C, E]."""
        assert self.gate is not None
        logits = self.gate(share[1], x_QCD) if isinstance(self.gate, SplitLinear) else self.gate(x_QCD)
        return torch.softmax(logits, -1)

    def forward(self, x0_QCD: Tensor, x_QCD: Tensor, share: tuple[Tensor, ...] = ()) -> Tensor:
        """x_{l+1} [Q, C, D]. In the first layer x is the candidate's part of x_0, and `share` is `of_request`'s."""
        down_QCR = self.down(share[0], x_QCD) if isinstance(self.down, SplitLinear) else self.down(x_QCD)
        inner_QCER = torch.tanh(down_QCR).unflatten(-1, (self.experts, -1))
        inner_QCER = torch.tanh(torch.einsum("qcer,esr->qces", inner_QCER, self.core))
        if self.gate is not None:
            inner_QCER = inner_QCER * self.gates(x_QCD, share).unsqueeze(-1)
        before_QCD = x0_QCD if isinstance(self.down, SplitLinear) else x_QCD
        return torch.addcmul(before_QCD, x0_QCD, self.up(inner_QCER.flatten(-2)))


class DcnV2(RepresentingModel):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, or a mixture of low-rank experts in place of W_l.

    parallel: z = w^T [x_n; MLP(x_0)] + b; stacked: z = w^T MLP(x_n) + b. Only the first layer reads x_0 alone and is
    split into request and candidate. ConfigError for experts without a rank.
    """

    class Config(DeepOptions):
        """`rank`: null is the full matrix W_l; a mixture saves time only where experts * rank < width / 2. The paper's
        rank is about a quarter of the width, 256 for Criteo."""

        presets = {"paper": {"num_layers": 3, "experts": 4, "rank": 256}}

        num_layers: int = Option(default=2, ge=1)
        structure: Literal["parallel", "stacked"] = "parallel"
        rank: int | None = Option(default=None, ge=1)
        experts: int = Option(default=1, ge=1)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__()
        if config.rank is None and config.experts > 1:
            raise ConfigError(f"dcn_v2: experts is {config.experts}, but the matrix is full; set a rank or experts: 1")
        self.inputs = FieldInputs(config, space, model="dcn_v2")
        widths = self.inputs.request_width(history=True), self.inputs.candidate_width
        self.crosses = nn.ModuleList(self._cross(config, widths, first=n == 0) for n in range(config.num_layers))
        self.bias = nn.Parameter(torch.zeros(num_tasks)) if num_tasks else None
        self.deep: DeepPart | None = None
        above, self.representation_width = config.hidden, (sum(widths), *config.hidden)[-1]
        if config.structure == "parallel":
            self.deep = DeepPart(config, *widths, num_tasks)
            above, self.representation_width = (), sum(widths) + (0, *config.hidden)[-1]
        self.out = MLP(sum(widths), above, num_tasks, activation=config.activation, norm=config.norm,
                       dropout=config.dropout, out_bias=False) if above or num_tasks else None

    @staticmethod
    def _cross(config: Config, widths: tuple[int, int], *, first: bool) -> FullCross | LowRankCross:
        if config.rank is None:
            return FullCross(widths, first=first)
        return LowRankCross(widths, rank=config.rank, experts=config.experts, first=first)

    def silence(self) -> None:
        """Logits start at the bias, 0."""
        assert self.out is not None
        self.out.silence()
        if self.deep is not None:
            self.deep.silence()

    def encode_request(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """The request's part of x_0 [Q, d_u], its shares of the first cross layer and of the MLP's first layer."""
        x_QD = self.inputs.request_matrix(batch, history=True)
        deep_QH = x_QD[:, :0] if self.deep is None else self.deep.of_request(x_QD)
        return x_QD, self._first.of_request(x_QD), deep_QH

    def score_candidates(self, state: tuple[Tensor, tuple[Tensor, ...], Tensor], batch: Batch) -> Tensor:
        """Logits [Q, C, T]."""
        request_QD, share, deep_QH = state
        candidate_QCD = self.inputs.candidate_matrix(batch)
        x_QCD = self._layers(request_QD, share, candidate_QCD)[-1]
        own = x_QCD if self.out is None else self.out(x_QCD, batch.mask_QC)
        parts = [own] if self.deep is None else [own, self.deep(deep_QH, candidate_QCD, batch.mask_QC)]
        return torch.cat(parts, -1) if self.bias is None else sum(parts, self.bias)

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """`gates` [layers, Q, C, E] of a mixture."""
        if not (isinstance(self._first, LowRankCross) and self._first.experts > 1):
            return {}
        request_QD, share, _ = self.encode_request(batch)
        candidate_QCD = self.inputs.candidate_matrix(batch)
        x_LQCD = self._layers(request_QD, share, candidate_QCD)
        gates = [self._first.gates(candidate_QCD, share)]
        for cross, x_QCD in zip(self.crosses[1:], x_LQCD[:-1], strict=True):
            assert isinstance(cross, LowRankCross)
            gates.append(cross.gates(x_QCD))
        return {"gates": torch.stack(gates)}

    @property
    def _first(self) -> FullCross | LowRankCross:
        first = self.crosses[0]
        assert isinstance(first, FullCross | LowRankCross)
        return first

    def _layers(self, request_QD: Tensor, share: tuple[Tensor, ...], candidate_QCD: Tensor) -> list[Tensor]:
        """x_1 to x_n, each [Q, C, D]."""
        request_QCD = request_QD[:, None].expand(-1, candidate_QCD.shape[1], -1)
        x0_QCD = torch.cat([request_QCD, candidate_QCD], -1)
        layers = [self._first(x0_QCD, candidate_QCD, share)]
        for cross in self.crosses[1:]:
            layers.append(cross(x0_QCD, layers[-1]))
        return layers
