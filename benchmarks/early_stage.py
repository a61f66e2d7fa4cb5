"""Early-stage rankers as the pre-ranker of one cascade: what they keep of the truth, and what they cost.

    PYTHONPATH=platform OMP_NUM_THREADS=1 python benchmarks/early_stage.py --data simulated --out DIR
    PYTHONPATH=platform OMP_NUM_THREADS=1 python benchmarks/early_stage.py --data kuairand --raw PATH --out DIR
    PYTHONPATH=platform OMP_NUM_THREADS=1 python benchmarks/early_stage.py --data simulated --out DIR --speed
    PYTHONPATH=platform python benchmarks/early_stage.py --out DIR --table docs/results/early-stage.md

`--raw` is the folder with the log's files. The catalogue -> 500 (two_tower) -> 100 (the arm, `_early_arms.py`) -> 20
(din). Stages share nothing and have losses of their own, so that each is trained alone: retriever and ranker once a
seed, every arm once a seed with the same rows, negatives, batches, epochs and rates. A run is one arm with one seed;
its figures are one line of `runs.jsonl` below `--out`, and what is there is not repeated, nor trained again.

`--speed`: a closed loop of one caller through the class that serves a stage (`StageServer`: requests as bytes, as
tensors, features, encoded items, scores, the best 100, answer), in this process, on one thread; arms change turns.
Beside it the model alone on tensors in memory. With `--device cuda` only the model alone, there.
"""

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from _early_arms import ARMS, KEEPS, LOGS, STAGES, stage_of
from _early_report import write_report
from _rates import quantile

from raycascade.bundle import Bundle, load_bundle, save_bundle
from raycascade.cascade import Cascade
from raycascade.config import Config, parse_config
from raycascade.evaluation import Evaluator
from raycascade.models._encoded_items import ItemEncodingModel
from raycascade.schema import PADDING
from raycascade.serving.stages import StageServer, Survivors, pack, unpack
from raycascade.shards import Shards
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Place, Run, Save, fit
from raycascade.trial import limited

FIRST_SEED = 1
ALONE = "retriever", "ranker"  # the same for all arms of a seed
AGREEING = 400  # requests on which the ranker judges what the arm dropped
CLOCKED, ROUNDS, BATCH = 64, 9, 64


@dataclass(frozen=True)
class Bench:
    """One log with its shards and everything that was trained on it."""

    data: str
    shards: Shards
    folder: Path
    options: Namespace

    @classmethod
    def open(cls, options: Namespace) -> "Bench":
        folder = Path(options.out) / options.data
        root = str(folder / "shards")
        if not Path(root, "manifest.json").exists():
            prepare_shards(options, root)
        return cls(options.data, Shards.open(root), folder, options)

    def config(self, stages: list[str], seed: int) -> Config:
        """A cascade of some of the stages; an arm's name stands for the pre-ranker."""
        log = LOGS[self.data]
        train = {**log.train, "seed": seed, "gpu": False, "checkpoint_steps": 1 << 30}
        if self.options.max_steps:
            train["max_steps"] = self.options.max_steps
        return parse_config({
            "paths": {"shards": str(self.folder / "shards")}, "dataset": log.dataset, "splits": log.splits,
            "stages": [stage_of(name, log, self.shards.state.schema) for name in stages], "lists": {"k": 10},
            "train": train,
            "evaluate": {"max_requests": self.options.requests, "popularity_hours": 48},
        }, where="benchmark")

    def weights(self, name: str, seed: int) -> tuple[dict[str, torch.Tensor], float]:
        """Trained weights of a stage or an arm, and the seconds of their training."""
        file = self.folder / "weights" / f"{name.replace(' ', '_').replace(',', '')}-{seed}.safetensors"
        if not file.exists():
            run = Run.build(self.config([name], seed), self.shards, Place())
            progress = fit(run, Progress(), _report_to_nobody)
            (stage,) = run.cascade.names
            file.parent.mkdir(exist_ok=True)
            part = file.with_suffix(".part")
            state = {key: value.contiguous() for key, value in run.cascade.stage_state(stage).items()}
            safetensors.torch.save_file(state, part, metadata={"seconds": f"{progress.seconds:.1f}"})
            part.rename(file)
        with safetensors.safe_open(file, "pt") as opened:
            seconds = float((opened.metadata() or {})["seconds"])
        return safetensors.torch.load_file(file), seconds

    def bundle(self, arm: str, seed: int) -> Bundle:
        """The cascade with an arm in its middle."""
        uri = self.folder / "bundles" / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"
        if not (uri / "manifest.json").exists():
            names = ["retriever", arm, "ranker"]
            config = self.config(names, seed)
            cascade = Cascade(config, self.shards.state.space)
            for stage, name in zip(STAGES, names, strict=True):
                cascade.load_stage_state(stage, self.weights(name, seed)[0])
            save_bundle(str(uri), config=config, cascade=cascade.eval(), items=self.shards.items,
                        encoded_items=self.shards.table("items"), users=self.shards.table("users"),
                        metrics={"train": {}, "curves": {}})
        return load_bundle(str(uri))

    def test_rows(self, most: int | None) -> list[pa.Table]:
        return [self.shards.read_group(name, group) for name, group, _ in limited(self.shards.groups("test"), most)]


def prepare_shards(options: Namespace, root: str) -> None:
    """The log as shards, by a local Ray that ends with it."""
    import ray

    from raycascade.flows._cluster import connect
    from raycascade.flows.prepare import prepare

    log = LOGS[options.data]
    connect()
    prepare(parse_config({"paths": {"raw": options.raw, "shards": root}, "dataset": log.dataset, "splits": log.splits,
                          "stages": [{"name": "ranker", "keep": 1, "model": {"name": "mlp"}}]}, where="benchmark"))
    ray.shutdown()


def _report_to_nobody(progress: Progress, steps: int, save: Save | None) -> None:
    """No checkpoints: what was trained is kept when it is finished."""


# ---------------------------------------------------------------- quality
def run_one(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """One arm with one seed, on the test split."""
    started = time.perf_counter()
    bundle = bench.bundle(arm, seed)
    evaluator = Evaluator(bundle)
    for table in bench.test_rows(bench.options.requests):
        for start in range(0, len(table), BATCH):
            evaluator.update(table.slice(start, BATCH))
    metrics = evaluator.measured.metrics()
    model = bundle.cascade.models["pre_ranker"]
    dense = sum(p.numel() for name, p in model.named_parameters() if "tables" not in name and "item_bias" not in name)
    found = {name: metrics[name] for name in metrics if name.startswith("recall@") or name.startswith("auc/")
             or name.startswith("gauc/")}
    return {"kind": "quality", "data": bench.data, "arm": arm, "seed": seed, **found,
            "positives": evaluator.measured.catalogue.positives, "requests": evaluator.measured.catalogue.requests,
            "ranker_agrees": agreement(bundle, bench.test_rows(AGREEING)), "parameters": dense,
            "train_seconds": bench.weights(arm, seed)[1], "seconds": time.perf_counter() - started}


@torch.no_grad()
def agreement(bundle: Bundle, tables: list[pa.Table]) -> float:
    """Of the 20 that the ranker would choose from all 500 retrieved, the share that the arm handed on."""
    cascade, hits, wanted = bundle.cascade, 0, 0
    rows = pa.concat_tables(tables).slice(0, AGREEING)
    for start in range(0, len(rows), 16):
        batch = bundle.batch(rows.slice(start, 16))
        retrieved = cascade.retrieve(batch, bundle.index)
        best, _ = cascade.narrow("ranker", KEEPS[2], batch, retrieved, bundle.items).kept()
        kept, _ = cascade.narrow("pre_ranker", KEEPS[1], batch, retrieved, bundle.items).kept()
        for top, survivors in zip(best, kept, strict=True):
            hits += len(set(top.tolist()) & set(survivors.tolist()) - {PADDING})
            wanted += int((top != PADDING).sum())
    return hits / wanted


def run_all(options: Namespace) -> None:
    """Every run that is not there yet, seed by seed."""
    path = Path(options.out) / "runs.jsonl"
    done = {(r["data"], r["arm"], r["seed"]) for r in finished(path) if r["kind"] == "quality"}
    jobs = [(arm, seed) for seed in range(FIRST_SEED, FIRST_SEED + options.seeds) for arm in options.arms]
    jobs = [(arm, seed) for arm, seed in jobs if (options.data, arm, seed) not in done]
    if not jobs:
        return
    bench = Bench.open(options)
    for arm, seed in jobs:
        line = run_one(bench, arm, seed)
        append(path, line)
        print(f"{options.data}/{arm:<22} seed {seed} recall@{KEEPS[1]} {line[f'recall@{KEEPS[1]}']:.4f} "
              f"recall@{KEEPS[2]} {line[f'recall@{KEEPS[2]}']:.4f} ranker agrees {line['ranker_agrees']:.4f} "
              f"trained {line['train_seconds']:.0f} s, all {line['seconds']:.0f} s", flush=True)


# ---------------------------------------------------------------- speed
@dataclass(frozen=True)
class Clocked:
    """An arm ready to be clocked: `stage` and `kernel` answer request number i."""

    arm: str
    stage: Callable[[int], object]
    kernel: Callable[[int], object]
    cached: bool


def clocked(bundle: Bundle, arm: str, requests: list[pa.Table], device: str) -> Clocked:
    server = StageServer(bundle, "pre_ranker")
    packed = [pack(rows) for rows in requests]
    retrieved = [StageServer(bundle, "retriever").run(bundle.batch(rows), None) for rows in requests]
    before = [Survivors(found.rows_QK[:, :KEEPS[0]], found.scores_QK[:, :KEEPS[0]]) for found in retrieved]
    model, cache = bundle.cascade.models["pre_ranker"].to(device), bundle.cascade.item_caches.get("pre_ranker")
    prepared = []
    for rows, found in zip(requests, before, strict=True):
        rows_QC = torch.from_numpy(found.rows_QK.astype(np.int64))
        batch = bundle.batch(rows).with_candidates(rows_QC, rows_QC != PADDING, bundle.items)
        encoded = cache.gather(rows_QC, rows_QC != PADDING, like=next(model.parameters()))[0] if cache else None
        prepared.append((batch.to(device), encoded))

    def stage(number: int) -> object:
        return server.run(bundle.batch(unpack(packed[number])), before[number])

    def kernel(number: int) -> object:
        batch, encoded = prepared[number]
        if encoded is not None:
            assert isinstance(model, ItemEncodingModel)
            found = model.score_encoded(model.encode_request(batch), encoded, batch)
        else:
            found = model(batch)
        if device != "cpu":
            torch.cuda.synchronize()
        return found

    return Clocked(arm, stage, kernel, cache is not None)


@torch.inference_mode()
def speed(options: Namespace) -> None:
    """One line with every arm's times of a request, in milliseconds of the clock and of the processor."""
    bench = Bench.open(options)
    rows = pa.concat_tables(bench.test_rows(CLOCKED)).slice(0, CLOCKED)
    requests = [rows.slice(i, 1) for i in range(len(rows))]
    arms = [clocked(bench.bundle(arm, FIRST_SEED), arm, requests, options.device) for arm in options.arms]
    measures = ("kernel",) if options.device != "cpu" else ("stage", "kernel")
    times: dict[str, dict[str, list[float]]] = {arm.arm: {} for arm in arms}
    for turn in range(1 + options.rounds):  # the first one warms up
        for arm in arms:
            for measure in measures:
                answer = getattr(arm, measure)
                for number in range(len(requests)):
                    started, busy = time.perf_counter(), time.process_time()
                    answer(number)
                    spent = 1e3 * (time.perf_counter() - started), 1e3 * (time.process_time() - busy)
                    if turn:
                        for name, value in zip((measure, f"{measure}_processor"), spent, strict=True):
                            times[arm.arm].setdefault(name, []).append(value)
    found = {name: {f"{measure}_{label}": pick(values) for measure, values in measured.items()
                    for label, pick in (("mean", lambda v: float(np.mean(v))), ("p50", lambda v: quantile(v, 0.5)),
                                        ("p95", lambda v: quantile(v, 0.95)))} for name, measured in times.items()}
    on = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    append(Path(options.out) / "runs.jsonl", {
        "kind": "speed", "data": options.data, "device": on, "torch": torch.__version__, "requests": len(requests),
        "rounds": options.rounds, "candidates": KEEPS[0], "threads": torch.get_num_threads(),
        "cached": [arm.arm for arm in arms if arm.cached], "milliseconds": found})
    print(json.dumps(found, indent=1))


# ---------------------------------------------------------------- both
def finished(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = ArgumentParser(description="Early-stage rankers in one cascade: quality and speed.")
    parser.add_argument("--data", choices=sorted(LOGS))
    parser.add_argument("--raw", default="", help="the folder with the log's files")
    parser.add_argument("--out", required=True, help="a folder for shards, weights, bundles and runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--requests", type=int, default=3_000, help="of the test split, about")
    parser.add_argument("--max-steps", type=int, help="of training, for a trial")
    parser.add_argument("--speed", action="store_true", help="clock the arms of the first seed")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu", help="of the model alone")
    parser.add_argument("--table", help="write the tables to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    if options.data and LOGS[options.data].needs_raw and not options.raw:
        parser.error(f"--data {options.data} needs --raw")
    if options.data:
        (speed if options.speed else run_all)(options)
    if options.table:
        write_report(Path(options.table), finished(Path(options.out) / "runs.jsonl"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
