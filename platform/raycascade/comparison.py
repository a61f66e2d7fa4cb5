"""Comparing objectives on equal terms: which runs there are, which are finished, and what their figures say.

A run is one objective with one seed. Its record is one JSON file, named by a hash of everything that can change its
figures, so that a comparison that was interrupted or extended does only what is missing.
"""

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycascade import plugins, storage
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.schema import near_miss

RECORD_FORMAT = 1  # raise it when a run of the same config would measure something else
SIGNIFICANT = 0.05
LESS_IS_BETTER = ("lost", "wasted", "logloss", "calibration_error")  # beginnings of names of metrics
NOT_OF_A_RUN = ("run", "checkpoint_steps", "workers", "gpu")  # of `train`: they leave the figures as they are

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Trial:
    """One run: `config` has its loss and its seed; `key` names its record."""

    label: str
    seed: int
    config: Config
    key: str


Runner = Callable[[Sequence[Trial]], Iterator[tuple[Trial, Record]]]


def chosen(config: Config, *, losses: Sequence[str] = (), seeds: int | None = None) -> Config:
    """The config with `losses` as its objectives and so many seeds, where they are given.

    A name stands for the objective of that label, for the config's own loss of that name, or for the loss with its
    defaults. ConfigError where nothing is left to compare, or for a baseline that is not compared.
    """
    objectives = config.compare.objectives
    if losses:
        own = {config.loss["name"]: config.loss, **objectives}
        objectives = {name: own.get(name, {"name": name}) for name in losses}
    if not objectives:
        raise ConfigError("compare: there is no objective; name some with --losses bce,lcron or under "
                          "compare.objectives")
    for label, spec in objectives.items():
        plugins.options("losses", spec, f"compare.objectives.{label}")
    baseline = config.compare.baseline
    if baseline is not None and baseline not in objectives:
        raise ConfigError(f"compare.baseline: {baseline!r} is not compared{near_miss(baseline, list(objectives))}")
    changes = {"objectives": objectives, "seeds": config.compare.seeds if seeds is None else seeds}
    compare = type(config.compare).model_validate({**config.compare.model_dump(), **changes})
    return config.model_copy(update={"compare": compare})


def plan(config: Config, *, shards: str, streaming: bool, gpu: bool) -> list[Trial]:
    """Every run of a comparison, all objectives of a seed before the next seed. `shards`: a digest of the data."""
    trials = []
    for seed in range(config.train.seed, config.train.seed + config.compare.seeds):
        for label, spec in config.compare.objectives.items():
            train = config.train.model_copy(update={"seed": seed, "workers": 1, "run": None, "gpu": gpu})
            own = config.model_copy(update={"loss": spec, "train": train})
            trials.append(Trial(label, seed, own, run_key(own, shards=shards, streaming=streaming, gpu=gpu)))
    return trials


def run_key(config: Config, *, shards: str, streaming: bool, gpu: bool) -> str:
    """A hash of all that can change the figures of a run: the data, the stages, the losses with their defaults spelled
    out, the protocol, the training with its seed, and what it runs on. Not: places, the index, the other objectives."""
    tree = config.model_dump(mode="json")
    stages = [{**stage, "model": _spelled_out("models", stage["model"]),
               "loss": _spelled_out("losses", stage["loss"]) if stage["loss"] else None} for stage in tree["stages"]]
    matters = {
        "format": RECORD_FORMAT, "shards": shards, "streaming": streaming, "gpu": gpu, "stages": stages,
        "loss": _spelled_out("losses", config.loss), "lists": tree["lists"],
        "max_requests": config.evaluate.max_requests,
        "train": {name: value for name, value in tree["train"].items() if name not in NOT_OF_A_RUN},
    }
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:20]


def _spelled_out(folder: str, spec: dict[str, Any]) -> dict[str, Any]:
    _, options = plugins.options(folder, spec, folder)
    return {"name": spec["name"], **options.model_dump(mode="json")}


def complete(trials: Sequence[Trial], folder: str, runner: Runner) -> tuple[dict[Trial, Record], dict[Trial, str]]:
    """The records of all runs, and the one-line problems of those that failed.

    Runs with a record in `folder` are not given to `runner`. Each of the others is recorded as it ends, so nothing that
    is finished can be lost; a failed one is not recorded, and the next call tries it again.
    """
    places = {trial: storage.join(folder, f"{trial.key}.json") for trial in trials}
    records = {trial: storage.read_json(place) for trial, place in places.items() if storage.exists(place)}
    missing = [trial for trial in trials if trial not in records]
    sys.stderr.write(f"compare: {len(trials)} runs, {len(records)} of them finished before\n")
    failed: dict[Trial, str] = {}
    for trial, record in runner(missing):
        if problem := record.get("problem"):
            failed[trial] = problem
            sys.stderr.write(f"compare: {trial.label} seed {trial.seed} failed: {problem}\n")
            continue
        storage.write_json(places[trial], {"objective": trial.label, "seed": trial.seed, **record})
        records[trial] = record
        sys.stderr.write(f"compare: {trial.label} seed {trial.seed} trained in {record['seconds']:.1f} s "
                         f"({len(records) + len(failed)} of {len(trials)})\n")
    return {trial: records[trial] for trial in trials if trial in records}, failed


def summarise(records: Mapping[Trial, Record], *, metric: str, baseline: str | None) -> dict[str, Any]:
    """{"metric", "best", "objectives": {label: ...}, "tests": {label: ...}}, for `--json` and for the tables.

    ConfigError where `metric` was not measured.
    """
    by_label: dict[str, dict[int, Record]] = {}
    for trial, record in records.items():
        by_label.setdefault(trial.label, {})[trial.seed] = record
    objectives = {label: _of_objective(runs) for label, runs in by_label.items()}
    for label, found in objectives.items():
        if metric not in found["metrics"]:
            raise ConfigError(f"compare.metric: {metric!r} was not measured for {label!r}"
                              f"{near_miss(metric, list(found['metrics']))}")
    order = ranked(objectives, metric)
    tests = {label: _tests(objectives, label, opponent) for label in objectives
             if (opponent := _opponent(order, label, baseline)) is not None}
    return {"metric": metric, "best": order[0], "objectives": objectives, "tests": tests}


def ranked(objectives: Mapping[str, Any], metric: str) -> list[str]:
    """The labels from best to worst mean."""
    sign = 1.0 if metric.startswith(LESS_IS_BETTER) else -1.0
    return sorted(objectives, key=lambda label: sign * objectives[label]["metrics"][metric]["mean"])


def _opponent(order: Sequence[str], label: str, baseline: str | None) -> str | None:
    """Whom an objective is tested against: the baseline, or the best of the others."""
    others = [other for other in order if other != label and baseline in (None, other)]
    return others[0] if others else None


def _of_objective(runs: Mapping[int, Record]) -> dict[str, Any]:
    """One objective over its seeds; metrics that one of its runs could not measure are left out."""
    seeds = sorted(runs)
    records = [runs[seed] for seed in seeds]
    names = [name for name in records[0]["metrics"] if all(name in record["metrics"] for record in records)]
    found: dict[str, Any] = {
        "metrics": {name: moments([record["metrics"][name] for record in records]) for name in names},
        "seeds": seeds, "seconds": statistics.fmean(record["seconds"] for record in records),
        "rows_per_s": statistics.fmean(record["rows_per_s"] for record in records),
        "peak_gb": max(record["peak_gb"] for record in records),
    }
    on_gpu = [record["gpu_peak_gb"] for record in records if "gpu_peak_gb" in record]
    found |= {"gpu_peak_gb": max(on_gpu)} if on_gpu else {}
    return found | ({"curve": _curve([record["curve"] for record in records])} if "curve" in records[0] else {})


def _curve(curves: Sequence[Sequence[Record]]) -> list[Record]:
    """Day by day over the seeds."""
    points = []
    for days in zip(*curves, strict=True):
        names = [name for name in days[0]["metrics"] if all(name in day["metrics"] for day in days)]
        points.append({"day": days[0]["day"], "requests": days[0]["requests"],
                       "metrics": {name: moments([day["metrics"][name] for day in days]) for name in names}})
    return points


def moments(values: Iterable[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (ddof 1; None for a single value) and the values themselves."""
    values = list(values)
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "values": values}


def _tests(objectives: Mapping[str, Any], label: str, against: str) -> dict[str, Any]:
    """Paired tests of one objective against another on the seeds and metrics that both have."""
    mine, theirs = objectives[label], objectives[against]
    seeds = [seed for seed in mine["seeds"] if seed in theirs["seeds"]]
    metrics = {}
    for name in (name for name in mine["metrics"] if name in theirs["metrics"]):
        a, b = ([side["metrics"][name]["values"][side["seeds"].index(seed)] for seed in seeds]
                for side in (mine, theirs))
        metrics[name] = paired_t_test(a, b)
    return {"against": against, "seeds": len(seeds), "metrics": metrics}


def paired_t_test(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Two-sided paired t-test: {"difference": mean of a - b, "t", "p", "significant": p < 0.05}.

    t and p are None for fewer than two pairs. Where all differences are the same there is no variance: p is 1 if they
    are 0, else 0, and t is None.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return {"difference": differences[0] if differences else None, "t": None, "p": None, "significant": False}
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        p, t = (1.0 if mean == 0 else 0.0), None
    else:
        from scipy import stats

        t = mean / (deviation / math.sqrt(len(differences)))
        p = float(2 * stats.t.sf(abs(t), len(differences) - 1))
    return {"difference": mean, "t": t, "p": p, "significant": p < SIGNIFICANT}
