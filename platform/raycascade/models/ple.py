"""ple: progressive layered extraction (Tang et al. 2020, RecSys)."""

from dataclasses import dataclass

import torch
from pydantic import Field as Option
from torch import Tensor, nn

from raycascade.batch import Batch
from raycascade.models._experts import ExpertOptions, Experts, Gate, MultiTaskModel
from raycascade.schema import FeatureSpace


@dataclass(frozen=True)
class LevelState:
    """The request's share of a level: of each bank of experts, each task's gate, and the shared gate."""

    banks: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]


class Level(nn.Module):
    """One level of extraction: experts of each task and shared ones, and the gates that mix them.

    Inputs and outputs come as one tensor a task, then the shared one. The gate of a task sees its own and the shared
    experts, the shared gate all experts of all tasks. The last level has no shared gate, and no shared output.
    """

    def __init__(
        self, config: "Ple.Config", request_width: int, candidate_width: int, num_tasks: int, *, last: bool
    ) -> None:
        super().__init__()
        widths, own, shared = (request_width, candidate_width), config.own_experts, config.shared_experts
        self.banks = nn.ModuleList(Experts(config, *widths, num) for num in [own] * num_tasks + [shared])
        mixed = [own + shared] * num_tasks + ([] if last else [own * num_tasks + shared])
        self.gates = nn.ModuleList(Gate(*widths, mixtures=1, experts=num) for num in mixed)

    def of_request(self, x_QD: Tensor) -> LevelState:
        """What the request alone decides."""
        banks, gates = (tuple(part.of_request(x_QD) for part in parts)  # type: ignore[operator]
                        for parts in (self.banks, self.gates))
        return LevelState(banks, gates)

    def weights(self, state: LevelState, inputs: list[Tensor]) -> list[Tensor]:
        """Weights [Q, C, 1, E] of every gate."""
        gates = zip(self.gates, state.gates, inputs, strict=False)  # the last level has fewer gates than inputs
        return [gate(request_QH, x_QCD) for gate, request_QH, x_QCD in gates]

    def forward(self, state: LevelState, inputs: list[Tensor], mask_QC: Tensor) -> list[Tensor]:
        """Mixtures [Q, C, H], one for each gate."""
        found = [bank(request_QH, x_QCD, mask_QC)
                 for bank, request_QH, x_QCD in zip(self.banks, state.banks, inputs, strict=True)]
        seen = [torch.cat([own, found[-1]], 2) for own in found[:-1]] + [torch.cat(found, 2)]
        return [(weights @ experts).squeeze(2)
                for weights, experts in zip(self.weights(state, inputs), seen, strict=False)]


class Ple(MultiTaskModel):
    """Levels of experts that read the level before, z_t = MLP_t(last output of task t) (equations 5 to 8); the first
    level reads [x_u; x_c], or the representation of a tower."""

    class Config(ExpertOptions):
        """`own_experts` of each task and `shared_experts` of a level; `levels` of extraction."""

        presets = {"paper": {"levels": 2}}

        levels: int = Option(default=1, ge=1)
        own_experts: int = Option(default=2, ge=1)
        shared_experts: int = Option(default=1, ge=1)

    def __init__(self, config: Config, space: FeatureSpace, *, num_tasks: int = 1) -> None:
        super().__init__(config, space, num_tasks=num_tasks, model="ple")
        widths = [self.trunk.widths] + [(0, config.hidden[-1])] * (config.levels - 1)
        self.levels = nn.ModuleList(
            Level(config, *pair, num_tasks, last=n == config.levels) for n, pair in enumerate(widths, 1))
        self.num_tasks = num_tasks

    def of_request(self, x_QD: Tensor) -> list[LevelState]:
        """What the request alone decides, by level; of levels after the first only the biases."""
        return [level.of_request(x_QD if n == 0 else x_QD[:, :0])  # type: ignore[operator]
                for n, level in enumerate(self.levels)]

    def mixed(self, shares: list[LevelState], x_QCD: Tensor, mask_QC: Tensor) -> list[Tensor]:
        """The last level's output [Q, C, H] for every task."""
        mixtures = [x_QCD] * (self.num_tasks + 1)
        for level, share in zip(self.levels, shares, strict=True):
            mixtures = level(share, mixtures, mask_QC)
        return mixtures

    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """Shares of the experts: `task_gates.<level>` [Q, C, T, E], `shared_gate.<level>` [Q, C, 1, E] but the last;
        and what the tower explains."""
        state, found = self.encode_request(batch), {}
        mixtures = [self.trunk.of_candidates(state.trunk, batch)] * (self.num_tasks + 1)
        for n, (level, share) in enumerate(zip(self.levels, state.shares, strict=True), 1):
            weights = level.weights(share, mixtures)  # type: ignore[operator]
            found[f"task_gates.{n}"] = torch.cat(weights[:self.num_tasks], 2)
            found |= {f"shared_gate.{n}": shared for shared in weights[self.num_tasks:]}
            mixtures = level(share, mixtures, batch.mask_QC)
        return found | self.trunk.explain(batch)
