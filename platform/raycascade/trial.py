"""One run of a comparison, in the process that calls it: train, then measure the cascade on logged lists.

Nothing is written, and no catalogue is searched: a run is as cheap as its training and one pass over the lists.
"""

import contextlib
import datetime as dt
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from raycascade.batch import collate
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.metrics import ListMetrics
from raycascade.shards import Shards
from raycascade.training.checkpoint import Progress
from raycascade.training.gbdt import fit_stages
from raycascade.training.loop import Place, Run, Save, fit, train_epoch

Group = tuple[str, int, int]  # file, row group, rows
EPOCH = dt.date(1970, 1, 1)


def run_once(config: Config, shards: Shards, place: Place, *, groups: Sequence[Group]) -> dict[str, Any]:
    """Trains on the split `train` and measures the row groups `groups`.

    Returns {"metrics", "requests", "seconds", "rows", "rows_per_s", "peak_gb"}: seconds of the training steps, rows =
    candidates trained on, and the most memory this process held, in units of 10^9 bytes; with a GPU, `gpu_peak_gb`.
    """
    _forget_peak()
    run = Run.build(config, shards, place)
    fit_stages(config, shards, run.cascade)
    progress = fit(run, Progress(), _tell_nobody)
    measured = measure(run, groups)
    return {"metrics": _defined(measured), "requests": measured.num_requests, **_cost(progress, place)}


def run_stream(config: Config, shards: Shards, place: Place) -> dict[str, Any]:
    """One pass over the days of all splits in order of time: every day but the first is measured with what was learned
    on the days before it, then trained on.

    Returns what `run_once` does, with the metrics of the last day, and "curve": [{"day", "requests", "metrics"}].
    """
    days = shards.days()
    _forget_peak()
    run = Run.build(streaming_config(config, num_days=len(days)), shards, place)
    if run.cascade.fitted:
        raise ConfigError(f"--streaming: {', '.join(run.cascade.fitted)}: trees are fitted at once and cannot learn "
                          "day by day; compare without --streaming, or with other models")
    progress, curve = Progress(), []
    for position, (day, groups) in enumerate(days.items()):
        if position:
            measured = measure(run, limited(groups, config.evaluate.max_requests))
            curve.append({"day": date_of(day), "requests": measured.num_requests, "metrics": _defined(measured)})
        if position < len(days) - 1:
            train_epoch(run, replace(run.reader("train"), split=date_of(day), only=tuple(groups)), progress,
                        _tell_nobody)
    last = curve[-1]
    return {"metrics": last["metrics"], "requests": last["requests"], "curve": curve, **_cost(progress, place)}


def streaming_config(config: Config, *, num_days: int) -> Config:
    """The config of a single pass in which every day but the last, which is never trained on, is an epoch of its own:
    all stages train on all of them, and rates reach their end with the last one."""
    stages = tuple(stage.model_copy(update={"epochs": None}) for stage in config.stages)
    train = config.train.model_copy(update={"epochs": max(1, num_days - 1), "early_stop": None, "max_steps": None})
    return config.model_copy(update={"stages": stages, "train": train})


def check_days(shards: Shards) -> list[str]:
    """The days that are missing between the first and the last one; ConfigError for shards of fewer than two days."""
    days = list(shards.days())
    if len(days) < 2:
        raise ConfigError(f"--streaming: {shards.folder} holds {len(days)} day; there must be two, one to train on and "
                          "the next to test on")
    return [date_of(missing) for before, after in pairwise(days) for missing in range(before + 1, after)]


def date_of(day: int) -> str:
    """A day number of the shards as an ISO date."""
    return (EPOCH + dt.timedelta(days=day)).isoformat()


def limited(groups: Sequence[Group], most: int | None) -> list[Group]:
    """The first row groups that hold at least `most` requests, or all."""
    kept, rows = [], 0
    for group in groups:
        if most is not None and rows >= most:
            break
        kept.append(group)
        rows += group[2]
    return kept


@torch.no_grad()
def measure(run: Run, groups: Sequence[Group]) -> ListMetrics:
    """The cascade on the logged lists of some row groups."""
    run.cascade.eval()
    found = ListMetrics(run.cascade.names, run.cascade.quotas, run.config.lists.k)
    size = run.config.evaluate.batch_size
    for name, group, rows in groups:
        table = run.shards.read_group(name, group)
        for start in range(0, rows, size):
            batch = collate(table.slice(start, size), run.shards.items, keep=run.cascade.quotas, k=run.config.lists.k)
            batch = batch.to(run.place.device)
            assert batch.targets is not None, "shards hold logged lists"
            found.update(run.cascade(batch), batch.targets, batch.request_ids, batch.candidates_QC)
    return found


def _defined(measured: ListMetrics) -> dict[str, float]:
    return {name: value for name, value in measured.result().items() if not math.isnan(value)}


def _cost(progress: Progress, place: Place) -> dict[str, Any]:
    cost = {"seconds": progress.seconds, "rows": progress.rows,
            "rows_per_s": progress.rows / max(progress.seconds, 1e-9), "peak_gb": _peak_bytes() / 1e9}
    on_gpu = place.device != "cpu"
    return {**cost, "gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else cost


def _forget_peak() -> None:
    """Lets the kernel count the peak from now on, where it can; a fresh process has none worth the name anyway."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes() -> int:
    """The most memory this process held at once (VmHWM; elsewhere than on Linux, what getrusage says)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tell_nobody(progress: Progress, steps: int, save: Save | None) -> None:
    """The report of a run that keeps no checkpoints."""
