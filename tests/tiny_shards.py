"""Shards of the hand-made log and small training configs over them, without Ray."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raycascade import storage
from raycascade.config import Config, parse_config
from raycascade.shards import Shards, by_day, publish, write_part
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Place, Run, Save, fit
from tests.tiny_world import encoded_users, fitted, raw_items, raw_requests

SPLITS = {"train": range(6), "valid": range(6, 7), "test": range(7, 8)}  # which of a user's eight requests
STAGES = [
    {"name": "retriever", "keep": 40, "exclude": ["pair"],
     "model": {"name": "two_tower", "dim": 4, "hidden": [8], "vector_dim": 4}},
    {"name": "pre_ranker", "keep": 15, "model": {"name": "mlp", "dim": 4, "hidden": [8]}},
    {"name": "ranker", "keep": 5, "model": {"name": "mlp", "dim": 4, "hidden": [8], "dropout": 0.2}},
]
POINTWISE = {"name": "bce", "label": "click", "entry_levels": [0, 0, 0]}


def write_shards(root: str, *, num_files: int = 4, daily: bool = False) -> str:
    """150 requests for training in so many files (a worker reads whole files), 25 each to validate and to test.

    `daily`: no row group spans two days, as `prepare` writes them; the days are 1 to 6 January 2024.
    """
    state, raw = fitted(), raw_requests()
    encoded = state.encode_requests(raw, where="tiny")
    folder = storage.join(root, "v-1")
    state.save(storage.join(folder, "features"))
    counts = {}
    for split, positions in SPLITS.items():
        rows = np.flatnonzero(np.isin(np.arange(len(raw)) % 8, list(positions)))
        parts = np.array_split(rows, num_files if split == "train" else 2)
        counts[split] = sum(_written(folder, f"requests/{split}", i, encoded.take(part), daily=daily)
                            for i, part in enumerate(parts))
    _written(folder, "items", 0, state.encode_items(raw_items(), where="tiny"))
    _written(folder, "users", 0, encoded_users(state))
    publish(root, "v-1", {"requests": counts, "fingerprint": state.schema.fingerprint()})
    return root


def _written(folder: str, prefix: str, number: int, table: pa.Table, *, daily: bool = False) -> int:
    tables = by_day(table, utc_offset_hours=0.0) if daily else iter([table])
    return write_part(storage.join(folder, prefix, f"part-{number:05d}.parquet"), tables)


def train_config(
    shards: str, *, train: dict[str, Any] | None = None, stages: list[dict[str, Any]] | None = None,
    loss: dict[str, Any] | None = None, bundles: str = "", changes: dict[str, Any] | None = None,
) -> Config:
    """Pointwise training of three stages in batches of 16; `changes` replaces whole sections."""
    stages = stages or STAGES
    return parse_config({
        "paths": {"shards": shards, "bundles": bundles or f"{shards}-bundles"}, "dataset": {"name": "simulated"},
        "stages": stages, "loss": loss or POINTWISE,
        "lists": {"k": 2, "quotas": [5, 4, 3][:len(stages)]},
        "train": {"batch_size": 16, "lr": 0.01, "gpu": False, **(train or {})}, **(changes or {}),
    }, where="tiny")


def trained(config: Config, *, progress: Progress | None = None, run: Run | None = None) -> tuple[Run, Progress]:
    """The loop to its end in this process, no checkpoint kept."""
    run = run or Run.build(config, Shards.open(config.paths.shards), Place())
    return run, fit(run, progress or Progress(), _nothing)


def _nothing(progress: Progress, steps: int, save: Save | None) -> None:
    """Reports to nobody."""


def weights(run: Run) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {name: value.detach().clone() for name, value in run.cascade.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bitwise equality, name by name."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


