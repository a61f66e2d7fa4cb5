"""Training checkpoints: weights, optimiser state, position and curves as safetensors and JSON. No pickle.

Randomness needs no saving: every step seeds its own generators from (seed, epoch, step, rank).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from raycascade.cascade import Cascade
from raycascade.training.optimisers import Optimisers


@dataclass
class Progress:
    """How far a run is, and what it measured on the way. `step` is the next one of `epoch`."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    finished: bool = False
    best_valid: float | None = None
    epochs_without_gain: int = 0
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


@dataclass
class Best:
    """The cascade's weights after the epoch with the least validation loss, on the CPU; empty before there is one."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def keep(self, cascade: nn.Module) -> None:
        """Remembers the weights as they are now."""
        self.weights = {name: value.detach().to("cpu", copy=True) for name, value in cascade.state_dict().items()}

    def restore(self, cascade: nn.Module) -> None:
        """Puts the remembered weights back, if there are any."""
        if self.weights:
            cascade.load_state_dict(self.weights)


def save(
    folder: str, cascade: Cascade, objective: nn.Module, optimisers: Optimisers, progress: Progress, *,
    best: Best | None = None,
) -> None:
    """Writes a checkpoint into an empty local folder."""
    tensors, numbers = optimisers.state()
    weights = {name: value.contiguous() for name, value in cascade.state_dict().items()}
    safetensors.torch.save_file(weights, f"{folder}/weights.safetensors")
    safetensors.torch.save_file(dict(objective.state_dict()), f"{folder}/objective.safetensors")
    safetensors.torch.save_file(tensors, f"{folder}/optimiser.safetensors")
    if best is not None and best.weights:
        safetensors.torch.save_file({k: v.contiguous() for k, v in best.weights.items()}, f"{folder}/best.safetensors")
    Path(folder, "progress.json").write_text(json.dumps({"progress": asdict(progress), "optimiser": numbers}))


def load(
    folder: str, cascade: Cascade, objective: nn.Module, optimisers: Optimisers, *, best: Best | None = None
) -> Progress:
    """Restores everything in place; returns how far the run was."""
    cascade.load_state_dict(safetensors.torch.load_file(f"{folder}/weights.safetensors"))
    objective.load_state_dict(safetensors.torch.load_file(f"{folder}/objective.safetensors"))
    facts = json.loads(Path(folder, "progress.json").read_text())
    optimisers.load(safetensors.torch.load_file(f"{folder}/optimiser.safetensors"), facts["optimiser"])
    if best is not None and Path(folder, "best.safetensors").exists():
        best.weights = safetensors.torch.load_file(f"{folder}/best.safetensors")
    return Progress(**facts["progress"])


def load_weights(folder: str, cascade: Cascade) -> Progress:
    """The weights alone, for the bundle."""
    cascade.load_state_dict(safetensors.torch.load_file(f"{folder}/weights.safetensors"))
    return Progress(**json.loads(Path(folder, "progress.json").read_text())["progress"])
