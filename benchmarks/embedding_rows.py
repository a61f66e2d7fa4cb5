"""Time of a training step with embedding tables of 100 thousand and of 10 million rows.

    PYTHONPATH=platform python benchmarks/embedding_rows.py

The real loop (`training.loop.fit`: read, collate, forward, backward, clip, update) trains a two_tower and an mlp on
synthetic shards. Users and items are hashed into tables of so many rows, one of each per stage; all else is equal.
Beside it the same with dense gradients and AdamW over whole tables, which is what the sparse path avoids.
"""

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from _shards import publish_shards

from raycascade.config import Config, parse_config
from raycascade.schema import FeatureSchema
from raycascade.shards import Shards
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Place, Run, Save, fit
from raycascade.training.optimisers import Optimisers

NUM_REQUESTS, NUM_ITEMS, NUM_CANDIDATES, BATCH = 20_000, 50_000, 20, 256
WARM_UP = 5  # the first step allocates the moments
BAR = 1.3


def write_shards(root: str, *, rows: int) -> Shards:
    """Random requests whose users and items are hashed into tables of `rows` rows."""
    schema = FeatureSchema.model_validate({
        "features": [{"kind": "id", "name": "user", "side": "user", "buckets": rows},
                     {"kind": "id", "name": "item", "side": "item", "buckets": rows}],
        "labels": ["click"], "positive": "click"})
    draw = np.random.default_rng(3)
    lists = np.arange(0, NUM_REQUESTS * NUM_CANDIDATES + 1, NUM_CANDIDATES, dtype=np.int32)
    count = NUM_REQUESTS * NUM_CANDIDATES
    users = draw.integers(0, 1 << 40, NUM_REQUESTS)
    requests = pa.table({
        "request_id": np.arange(NUM_REQUESTS), "user_id": users, "user": users,
        "time_ms": np.arange(NUM_REQUESTS) * 1000,
        "candidates": pa.ListArray.from_arrays(lists, pa.array(draw.integers(0, NUM_ITEMS, count))),
        "click": pa.ListArray.from_arrays(lists, pa.array(draw.integers(0, 2, count)))})
    items = pa.table({"item_id": np.arange(NUM_ITEMS), "item": np.arange(NUM_ITEMS)})
    return publish_shards(root, schema, requests, items, as_of_ms=NUM_REQUESTS * 1000)


def config_of(root: str, *, steps: int) -> Config:
    stages = [{"name": "retriever", "keep": 10, "model": {"name": "two_tower", "dim": 8}},
              {"name": "ranker", "keep": 5, "model": {"name": "mlp", "dim": 8}}]
    return parse_config({
        "paths": {"shards": root}, "dataset": {"name": "simulated"}, "stages": stages,
        "loss": {"name": "bce", "label": "click", "entry_levels": [0, 0]},
        "train": {"batch_size": BATCH, "max_steps": steps + WARM_UP, "checkpoint_steps": 1 << 30, "gpu": False},
    }, where="benchmark")


def with_dense_tables(run: Run) -> Run:
    """The same run with dense gradients and AdamW for the tables."""
    for module in run.cascade.modules():
        if isinstance(module, torch.nn.Embedding):
            module.sparse = False
    return replace(run, optimisers=Optimisers(run.cascade, run.objective, run.config.train))


def median_step_ms(rows: int, *, steps: int, dense: bool) -> float:
    """Median time between the ends of two steps."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(folder, rows=rows)
        run = Run.build(config_of(folder, steps=steps), shards, Place())
        run = with_dense_tables(run) if dense else run
        ends: list[float] = []

        def tick(progress: Progress, steps: int, save: Save | None) -> None:
            del progress, steps, save
            ends.append(time.perf_counter())

        fit(run, Progress(), tick)
    taken = np.diff(ends[:-1])[WARM_UP - 1:]  # the last report is the end of the run
    return 1000 * statistics.median(taken)


def main() -> int:
    parser = ArgumentParser(description="Step time by table size.")
    parser.add_argument("--rows", type=int, nargs=2, default=[100_000, 10_000_000])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dense-steps", type=int, default=6)
    options = parser.parse_args()
    ratios = {}
    for kind, steps in (("sparse", options.steps), ("dense", options.dense_steps)):
        small, large = (median_step_ms(rows, steps=steps, dense=kind == "dense") for rows in options.rows)
        ratios[kind] = large / small
        print(f"{kind}: {options.rows[0]:,} rows {small:.1f} ms, {options.rows[1]:,} rows {large:.1f} ms a step, "
              f"ratio {large / small:.2f} (median of {steps} steps of {BATCH} requests x {NUM_CANDIDATES} candidates, "
              f"{torch.get_num_threads()} threads)", flush=True)
    met = ratios["sparse"] <= BAR
    print(f"command: python {' '.join(sys.argv)}; bar: sparse ratio <= {BAR}: {'met' if met else 'missed'}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
