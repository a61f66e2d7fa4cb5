"""What joint training costs: a step with `lcron` against one with `bce`, and each loss alone on long lists.

    PYTHONPATH=platform OMP_NUM_THREADS=1 python benchmarks/joint_cost.py

Steps: a two_tower, an mlp and a din of the sizes of RecFlow's reference cascade on lists of 50 candidates and histories
of 50 events, 1,024 requests a step. Both losses train in one process, turn by turn on the same batch, so that whatever
else the machine does meets both. The bar holds for the processor's time and for the clock, which wants a quiet machine.
Losses alone: forward and backward of every loss on three stages of scores, one fresh process each; memory is what the
process's peak grows by.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from _shards import publish_shards

from raycascade import plugins
from raycascade.batch import Batch, Targets, collate
from raycascade.config import Config, parse_config
from raycascade.schema import FeatureSchema
from raycascade.shards import Shards
from raycascade.training.loop import Place, Run

NUM_ITEMS, NUM_USERS, WIDTH, PER_LEVEL = 50_000, 38_000, 50, 10
START_MS = 1_705_104_000_000
QUOTAS, K = (40, 30, 20), 10
TIME_BAR, MEMORY_BAR_MB = 1.05, 1024
ALONE = (8, 1000)
USER_IDS = {"device": 38_000, "gender": 3, "age": 8, "province": 40}
ITEM_IDS = {"author": 20_000, "category_one": 40, "category_two": 180, "upload_type": 30}
STAGES = [
    {"name": "retriever", "keep": QUOTAS[0],
     "model": {"name": "two_tower", "dim": 8, "hidden": [128, 64], "vector_dim": 32, "similarity": "dot"}},
    {"name": "pre_ranker", "keep": QUOTAS[1], "model": {"name": "mlp", "dim": 8, "hidden": [128, 64, 32]}},
    {"name": "ranker", "keep": QUOTAS[2],
     "model": {"name": "din", "dim": 8, "hidden": [128, 128, 32], "activation": "relu", "attention_hidden": [80],
               "attention_activation": "relu", "normalise": "softmax"}},
]


# ---------------------------------------------------------------- a step of the cascade
def schema() -> FeatureSchema:
    """RecFlow's fields."""
    ids = [{"kind": "id", "name": "user_id", "side": "user"}, {"kind": "id", "name": "item_id", "side": "item"}]
    ids += [{"kind": "id", "name": name, "side": "user"} for name in USER_IDS]
    ids += [{"kind": "id", "name": name, "side": "item"} for name in ITEM_IDS]
    clocks: list[dict[str, Any]] = []
    for part in ("weekday", "hour", "minute"):
        clocks.append({"kind": "clock", "name": part, "part": part, "table": part})
        clocks.append({"kind": "clock", "name": f"upload_{part}", "part": part, "side": "item", "table": part,
                       "source": "upload_ms"})
    return FeatureSchema.model_validate({"features": [*ids, *clocks, {"kind": "history", "max_len": 50}],
                                         "labels": ["click"], "positive": "click"})


def write_shards(root: str, *, num_requests: int) -> Shards:
    """Requests drawn at random: 50 candidates of five levels of ten, the last one ranked, and 50 past events."""
    draw = np.random.default_rng(3)
    count, ends = num_requests * WIDTH, np.arange(0, num_requests * WIDTH + 1, WIDTH, dtype=np.int32)

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(ends, pa.array(values))

    level = np.tile(np.repeat(np.arange(4, -1, -1), PER_LEVEL), num_requests)
    rank = np.where(level == 4, np.tile(np.arange(WIDTH), num_requests), 0)
    requests = pa.table({
        "request_id": np.arange(num_requests), "user_id": draw.integers(0, NUM_USERS, num_requests),
        **{name: draw.integers(0, size, num_requests) for name, size in USER_IDS.items()},
        "time_ms": START_MS + np.arange(num_requests) * 1000,
        "candidates": lists(draw.integers(0, NUM_ITEMS, count)), "history": lists(draw.integers(0, NUM_ITEMS, count)),
        "reached": lists(level), "relevance": lists(np.where(level == 4, 30.0 - rank, 5.0 + level)),
        "click": lists(draw.integers(0, 2, count)),
    })
    items = pa.table({"item_id": np.arange(NUM_ITEMS), "upload_ms": START_MS - draw.integers(0, 1 << 32, NUM_ITEMS),
                      **{name: draw.integers(0, size, NUM_ITEMS) for name, size in ITEM_IDS.items()}})
    return publish_shards(root, schema(), requests, items, as_of_ms=START_MS + (1 << 32))


def config_of(root: str, loss: dict[str, Any]) -> Config:
    return parse_config({
        "paths": {"shards": root}, "dataset": {"name": "simulated"}, "stages": STAGES, "loss": loss,
        "lists": {"k": K, "quotas": list(QUOTAS)}, "train": {"lr": 0.01, "gpu": False},
    }, where="benchmark")


def step(run: Run, batch: Batch) -> tuple[float, float, float]:
    """One training step: seconds by the clock, seconds of the processor, and megabytes at the peak of the process."""
    forget_peak()
    clock, processor = time.perf_counter(), time.process_time()
    run.optimisers.zero()
    run.objective(run.cascade, batch, run.catalogue, np.random.default_rng(0)).total.backward()
    run.optimisers.step()
    return time.perf_counter() - clock, time.process_time() - processor, peak_mb()


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def compare_steps(*, requests: int, steps: int, warm_up: int) -> float:
    """Prints the table of both losses and gives the larger of the ratios by processor and by clock."""
    losses = {"bce": {"name": "bce", "entry_levels": [0, 1, 3]}, "lcron": {"name": "lcron"}}
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in losses}
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(folder, num_requests=requests)
        batch = collate(shards.table("requests/train"), shards.items, keep=QUOTAS, k=K)
        runs = {name: Run.build(config_of(folder, loss), shards, Place()) for name, loss in losses.items()}
        for turn in range(warm_up + steps):
            for name in sorted(runs, reverse=turn % 2 == 1):  # neither is always the one that warms the cache
                taken[name].append(step(runs[name], batch))
    medians = {name: [statistics.median(column) for column in zip(*rows[warm_up:], strict=True)]
               for name, rows in taken.items()}
    print(f"a step of {requests:,} requests x {WIDTH} candidates, two_tower + mlp + din, medians of {steps}, "
          f"{torch.get_num_threads()} threads")
    print(f"{'loss':<14}{'processor':>12}{'peak':>12}{'clock':>12}{'least clock':>14}")
    rows = {name: (processor, memory, clock, min(row[0] for row in taken[name][warm_up:]))
            for name, (clock, processor, memory) in medians.items()}
    for name, (processor, memory, clock, least) in rows.items():
        print(f"{name:<14}{processor:>10.2f} s{memory:>9,.0f} MB{clock:>10.2f} s{least:>12.2f} s")
    ratios = [after / before for before, after in zip(rows["bce"], rows["lcron"], strict=True)]
    print("{:<14}{:>12.3f}{:>12.3f}{:>12.3f}{:>14.3f}".format("lcron / bce", *ratios), flush=True)
    return max(ratios[0], ratios[2])


# ---------------------------------------------------------------- a loss alone
def run_alone(name: str, *, requests: int, width: int) -> float:
    """Forward and backward of one loss on three stages of random scores; seconds of the processor."""
    generator = torch.Generator().manual_seed(5)
    names, keep = tuple(stage["name"] for stage in STAGES), (width * 4 // 5, width * 3 // 5, width * 2 // 5)
    order_QC = torch.rand(requests, width, generator=generator).argsort(dim=1)
    targets = Targets(relevance_QC=order_QC.float(), reached_QC=order_QC * 5 // width,
                      mask_QC=torch.ones(requests, width, dtype=torch.bool), keep=keep, k=width // 5, labels={})
    scores = {stage: torch.randn(requests, width, generator=generator).requires_grad_() for stage in names}
    plugin, config = plugins.options("losses", {"name": name}, "loss")
    loss = plugin(config, names)
    started = time.process_time()
    loss(scores, targets).total.backward()
    return time.process_time() - started


def measure_alone(name: str) -> None:
    """Prints seconds and megabytes of this fresh process."""
    run_alone(name, requests=ALONE[0], width=10)  # what the first call loads is not the loss's
    forget_peak()
    before = peak_mb()
    seconds = run_alone(name, requests=ALONE[0], width=ALONE[1])
    print(seconds, peak_mb() - before)


def compare_alone() -> float:
    """Prints the table of all losses and gives the largest memory in megabytes."""
    print(f"a loss alone, {ALONE[0]} requests x {ALONE[1]:,} candidates, three stages, forward and backward")
    print(f"{'loss':<14}{'processor':>12}{'memory':>12}")
    largest = 0.0
    for name in plugins.names("losses"):
        command = [sys.executable, __file__, "--alone", name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, memory = map(float, printed.split())
        largest = max(largest, memory)
        print(f"{name:<14}{seconds:>10.2f} s{memory:>9,.0f} MB", flush=True)
    return largest


def main() -> int:
    parser = ArgumentParser(description="The cost of joint training.")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)  # the first step allocates the moments
    parser.add_argument("--alone", choices=plugins.names("losses"), help="measure this loss only, in this process")
    options = parser.parse_args()
    if options.alone:
        measure_alone(options.alone)
        return 0
    ratio = compare_steps(requests=options.requests, steps=options.steps, warm_up=options.warm_up)
    largest = compare_alone()
    met = ratio <= TIME_BAR and largest < MEMORY_BAR_MB
    print(f"command: python {' '.join(sys.argv)}; bars: lcron / bce <= {TIME_BAR} by processor and by clock, "
          f"a loss alone < {MEMORY_BAR_MB:,} MB: {'met' if met else 'missed'}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
