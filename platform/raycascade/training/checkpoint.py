"""Training checkpoints: weights, optimiser state, position and curves as safetensors and JSON. No pickle.

Randomness needs no saving: every step seeds its own generators from (seed, epoch, step, rank).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
from torch import nn

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


def save(folder: str, cascade: Cascade, objective: nn.Module, optimisers: Optimisers, progress: Progress) -> None:
    """Writes a checkpoint into an empty local folder."""
    tensors, numbers = optimisers.state()
    safetensors.torch.save_file({k: v.contiguous() for k, v in cascade.state_dict().items()}, f"{folder}/weights.safetensors")
    safetensors.torch.save_file(dict(objective.state_dict()), f"{folder}/objective.safetensors")
    safetensors.torch.save_file(tensors, f"{folder}/optimiser.safetensors")
    Path(folder, "progress.json").write_text(json.dumps({"progress": asdict(progress), "optimiser": numbers}))


def load(folder: str, cascade: Cascade, objective: nn.Module, optimisers: Optimisers) -> Progress:
    """Restores everything in place; returns how far the run was."""
    cascade.load_state_dict(safetensors.torch.load_file(f"{folder}/weights.safetensors"))
    objective.load_state_dict(safetensors.torch.load_file(f"{folder}/objective.safetensors"))
    facts = json.loads(Path(folder, "progress.json").read_text())
    optimisers.load(safetensors.torch.load_file(f"{folder}/optimiser.safetensors"), facts["optimiser"])
    return Progress(**facts["progress"])


def load_weights(folder: str, cascade: Cascade) -> Progress:
    """The weights alone, for the bundle."""
    cascade.load_state_dict(safetensors.torch.load_file(f"{folder}/weights.safetensors"))
    return Progress(**json.loads(Path(folder, "progress.json").read_text())["progress"])
