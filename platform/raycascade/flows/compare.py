"""compare: objectives x seeds on the same shards, one Ray task and one process per run -> table, test, page.

What a run does is in trial.py; which runs there are, and their statistics, in comparison.py.
"""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from raycascade import __version__, storage
from raycascade.cascade import Cascade
from raycascade.comparison import Record, Runner, Trial, chosen, complete, plan, summarise
from raycascade.comparison_page import csv_of, render_comparison
from raycascade.config import Config
from raycascade.errors import ComparisonError, ConfigError, RaycascadeError
from raycascade.flows._cluster import num_cores
from raycascade.flows.train import check_funnel
from raycascade.shards import Shards
from raycascade.training.loop import Place
from raycascade.training.objective import Objective
from raycascade.trial import check_days, limited, run_once, run_stream


def compare(config: Config, *, streaming: bool = False, out: str | None = None) -> dict[str, Any]:
    """Runs what is missing of the comparison; returns {"out", "metric", "best", "objectives", "tests", "failed" ...}.

    `out` (default: `_compare` below paths.bundles) gets a file per finished run, comparison.json, .csv and .html. The
    figures of runs that failed are missing; ComparisonError if all did.
    """
    config = chosen(config)
    shards = _checked_shards(config, streaming=streaming)
    folder = storage.absolute(out) if out else storage.join(config.paths.bundles, "_compare")
    metric = config.compare.metric or f"joint_recall@{config.lists.k}@{config.quotas[-1]}"
    gpu = _on_gpu(config)
    trials = plan(config, shards=shards.digest(), streaming=streaming, gpu=gpu)
    records, failed = complete(trials, storage.join(folder, "runs"), _ray_runner(config, shards, streaming=streaming))
    if not records:
        raise ComparisonError(f"compare: all {len(failed)} runs failed; {next(iter(failed.values()))}")
    found = summarise(records, metric=metric, baseline=config.compare.baseline)
    problems = {f"{trial.label} seed {trial.seed}": problem for trial, problem in failed.items()}
    result = {"out": folder, **found, "streaming": streaming, "failed": problems, "shards": shards.folder,
              "raycascade": __version__, "loss": config.compare.objectives}
    name = "streaming" if streaming else "comparison"
    storage.write_json(storage.join(folder, f"{name}.json"), result)
    storage.write_bytes(storage.join(folder, f"{name}.csv"), csv_of(result).encode())
    storage.write_bytes(storage.join(folder, f"{name}.html"), render_comparison(result).encode())
    return {**result, "page": storage.join(folder, f"{name}.html")}


def _checked_shards(config: Config, *, streaming: bool) -> Shards:
    """The shards. Whatever is wrong with the data or with an objective shows here, before a run starts."""
    shards = Shards.open(config.paths.shards)
    if streaming:
        if missing := check_days(shards):
            sys.stderr.write(f"compare: the log has no requests on {', '.join(missing)}; the next day that has some is "
                             "tested after the one before the gap\n")
    else:
        for split in ("train", "test"):
            shards.require_split(split)
    check_funnel(config, shards.items.num_items)
    cascade = Cascade(config, shards.state.space)
    for label, spec in config.compare.objectives.items():
        try:
            Objective(config.model_copy(update={"loss": spec}), cascade)
        except ConfigError as error:
            raise ConfigError(f"compare.objectives.{label}: {error}") from None
    return shards


def _on_gpu(config: Config) -> bool:
    import ray

    there = ray.cluster_resources().get("GPU", 0) >= config.compare.gpus_per_run
    if config.train.gpu and not there:
        raise ConfigError("train.gpu: the cluster has no GPU; leave it out or set it to false")
    return there if config.train.gpu is None else config.train.gpu


def _ray_runner(config: Config, shards: Shards, *, streaming: bool) -> Runner:
    """Runs as Ray tasks, each in a process of its own that ends with it, so that no run sees another's memory."""
    import ray

    cpus, gpu = config.compare.cpus_per_run, _on_gpu(config)
    if ray.cluster_resources().get("CPU", 0) < cpus:
        raise ConfigError(f"compare.cpus_per_run: {cpus} is more than the cluster's "
                          f"{ray.cluster_resources().get('CPU', 0):g} CPUs; use fewer")
    # A local Ray has spare logical CPUs (_cluster.py), which are no cores; a cluster may grow with what is asked of it.
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    most = max(1, num_cores() // cpus) if nodes == 1 else 1 << 20
    groups = [] if streaming else limited(shards.groups("test"), config.evaluate.max_requests)
    options = {"folder": shards.folder, "manifest": shards.manifest, "groups": groups, "threads": cpus, "gpu": gpu}

    def run(trials: Sequence[Trial]) -> Iterator[tuple[Trial, Record]]:
        task: Any = ray.remote(max_calls=1, max_retries=0, num_cpus=cpus,
                               num_gpus=config.compare.gpus_per_run if gpu else 0)(_run)
        shared, waiting, running = ray.put(options), deque(trials), {}
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    trial = waiting.popleft()
                    running[task.remote(trial.config.model_dump(mode="json"), shared)] = trial
                (ready,), _ = ray.wait(list(running), num_returns=1)
                yield running.pop(ready), _outcome(ready)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    return run


def _run(tree: dict[str, Any], options: dict[str, Any]) -> Record:
    """One run, in its own process."""
    torch.set_num_threads(options["threads"])
    shards, place = Shards(options["folder"], options["manifest"]), Place(device="cuda" if options["gpu"] else "cpu")
    config, groups = Config.model_validate(tree), options["groups"]
    try:
        return run_once(config, shards, place, groups=groups) if groups else run_stream(config, shards, place)
    except RaycascadeError as error:
        return {"problem": str(error)}


def _outcome(reference: Any) -> Record:
    """What a task returned; where it died, why, in one line."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        return {"problem": f"{type(error.cause).__name__}: {' '.join(str(error.cause).split())}"}
    except RayError as error:
        return {"problem": f"{type(error).__name__}: its process died; {' '.join(str(error).split())[:300]}"}
