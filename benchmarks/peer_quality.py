"""Quality side by side: our models and the peers' on the same rows, features, order and sizes.

    PYTHONPATH=platform OMP_NUM_THREADS=1 python benchmarks/peer_quality.py --data kuairand --raw DIR --out DIR

`--raw` is the folder with the log's official files. A run is one model, one seed, one side; its figures are one line of
`runs.jsonl` below `--out`, and a run that is there is not repeated, so that the command can be stopped and started
again. `--table FILE` writes the tables of all runs there are as Markdown, and the same as CSV beside it.

Ours trains through the real loop (`training.loop.fit`) with one candidate a request; the peers get the values that our
models see, and the order in which our reader hands out the training rows. Both use Adam at the same rate, stop at the
first epoch without a lower log loss on the validation rows and keep the epoch before it.
"""

import json
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _ctr_tables import ClickTable, describe, export, kuairand, movietweetings, publish_table
from _peers import PeerProcess
from _quality_pairs import ALONE, INPUTS, OURS, PAIRS, SIZES, TASKS
from _quality_report import write_report

from raycascade.batch import collate
from raycascade.cascade import Cascade
from raycascade.config import Config, parse_config
from raycascade.metrics import BinaryMetrics
from raycascade.shards import ShardReader, Shards
from raycascade.training.checkpoint import Progress
from raycascade.training.gbdt import fit_stages
from raycascade.training.loop import Place, Run, Save, fit

READERS = {"kuairand": kuairand, "movietweetings": movietweetings}
WORKER = Path(__file__).parent / "_peer_quality_worker.py"
FIRST_SEED = 1
LR = 1e-3
PEER_RATES = {"lr": 1e-2}  # ours takes ten times the rate by itself: `linear_rate`


@dataclass(frozen=True)
class Job:
    """One run. `side` is "ours" or the name of a peer."""

    data: str
    side: str
    model: str
    inputs: str
    seed: int

    @property
    def key(self) -> str:
        return "/".join((self.data, self.side, self.model, self.inputs, str(self.seed)))


@dataclass(frozen=True)
class Prepared:
    """A table on disk, for both sides."""

    table: ClickTable
    shards: Shards
    folder: Path

    @classmethod
    def make(cls, data: str, raw: str, out: Path) -> "Prepared":
        folder = out / data
        shutil.rmtree(folder, ignore_errors=True)  # made anew: the table may have changed since the last call
        folder.mkdir(parents=True)
        table = READERS[data](raw)
        prepared = cls(table, publish_table(str(folder / "shards"), table), folder)
        np.savez(folder / "table.npz", **export(prepared.shards))  # type: ignore[arg-type]
        return prepared

    def orders(self, seed: int) -> Path:
        """The places of the training rows in the order our reader hands them out, by epoch."""
        path = self.folder / f"orders-{seed}.npz"
        if not path.exists():
            run = Run.build(self.config("lr", "all", seed), self.shards, Place())
            epochs = {str(epoch): np.concatenate([rows["request_id"].to_numpy() for rows in
                                                  run.reader("train").batches(epoch)])
                      for epoch in range(SIZES["epochs"])}
            np.savez(path, **epochs)  # type: ignore[arg-type]
        return path

    def labels(self, model: str) -> tuple[str, ...]:
        return self.table.schema.labels if model in TASKS else self.table.schema.labels[:1]

    def config(self, model: str, inputs: str, seed: int) -> Config:
        """A cascade of one stage; trees come behind another one."""
        labels = self.labels(model)
        of_trees = {"label": labels[0]} if model == "gbdt" else {}
        stage: dict[str, Any] = {"name": "ranker", "keep": 1, "model": OURS[model] | of_trees,
                                 "exclude": INPUTS[inputs].excluded(describe(self.shards))}
        loss: dict[str, Any] = {"name": "bce", "label": labels[0]}
        if len(labels) > 1:
            stage |= {"tasks": labels, "fusion": {"sum": {labels[0]: 1.0}}, "loss": {"name": "bce"}}
        first = [{"name": "first", "keep": 1, "model": {"name": "lr"}}] if model == "gbdt" else []
        return parse_config({
            "paths": {"shards": str(self.folder / "shards")}, "dataset": {"name": "simulated"},
            "stages": [*first, stage],
            "loss": loss, "lists": {"k": 1},
            "train": {"batch_size": SIZES["batch"], "epochs": SIZES["epochs"], "early_stop": 1, "seed": seed,
                      "lr": LR, "table_momentum": 0.0, "gpu": False, "checkpoint_steps": 1 << 30},
        }, where="benchmark")


# ---------------------------------------------------------------- one run
def run_ours(prepared: Prepared, job: Job) -> tuple[dict[str, np.ndarray], list[float]]:
    """Logits of the first label by split, and the validation loss of every epoch (trees: none)."""
    config = prepared.config(job.model, job.inputs, job.seed)
    if job.model == "gbdt":
        cascade = Cascade(config, prepared.shards.state.space)
        fit_stages(config, prepared.shards, cascade, threads=1)
        return {split: our_logits(cascade, prepared, split) for split in ("valid", "test")}, []
    run = Run.build(config, prepared.shards, Place())

    def report(progress: Progress, steps: int, save: Save | None) -> None:
        del progress, steps, save

    progress = fit(run, Progress(), report)
    logits = {split: our_logits(run.cascade, prepared, split) for split in ("valid", "test")}
    return logits, [loss for _, loss in progress.curves["valid_loss"]]


@torch.no_grad()
def our_logits(cascade: Cascade, prepared: Prepared, split: str) -> np.ndarray:
    """Of every row, in the table's order."""
    cascade.eval()
    model, shards = cascade.model("ranker"), prepared.shards
    batches = ShardReader(shards, split, SIZES["batch"], shuffle=False).batches(0)
    return torch.cat([model(collate(rows, shards.items))[:, 0, 0] for rows in batches]).double().numpy()


def run_peer(
    prepared: Prepared, job: Job, process: PeerProcess
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The same of a peer's model."""
    fields = [f for f in describe(prepared.shards) if INPUTS[job.inputs].sees(f)]
    labels, out = prepared.labels(job.model), prepared.folder / "logits.npz"
    answer = process.ask(
        table=str(prepared.folder / "table.npz"), orders=str(prepared.orders(job.seed)), peer=job.side, model=job.model,
        fields=fields, labels=list(labels), num_tasks=len(labels), history_len=prepared.shards.state.space.history_len,
        sizes=SIZES, lr=PEER_RATES.get(job.model, LR), seed=job.seed, out=str(out))
    with np.load(out) as arrays:
        return {split: arrays[split] for split in ("valid", "test")}, answer["losses"]


def measured(prepared: Prepared, logits: dict[str, np.ndarray]) -> dict[str, float]:
    """AUC, GAUC by user and log loss of the first label, by split; the same code for both sides."""
    figures = {}
    for split, values in logits.items():
        rows = prepared.table.requests[split]
        metrics = BinaryMetrics()
        truth = rows[prepared.table.schema.labels[0]].combine_chunks().flatten().to_numpy()
        metrics.update(values, truth, prepared.table.groups[split])
        figures |= {f"{split}_{name}": value for name, value in metrics.result().items()
                    if name in ("auc", "gauc", "logloss")}
    return figures


# ---------------------------------------------------------------- all runs
def jobs_of(options: Namespace) -> list[Job]:
    """Ours and the peers' of every pair, seed by seed, so that an unfinished comparison has whole seeds."""
    pairs = [p for p in PAIRS if (not options.models or p.model in options.models)
             and (not options.peers or p.peer in options.peers)]
    jobs = []
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        for pair in pairs:
            sides = {"ours": ["ours"], "peers": [pair.peer], "both": ["ours", pair.peer]}[options.side]
            jobs += [Job(options.data, side, pair.model, pair.inputs, seed) for side in sides]
        if options.side != "peers" and not options.peers:
            jobs += [Job(options.data, "ours", model, "all", seed) for model in ALONE
                     if not options.models or model in options.models]
    return list(dict.fromkeys(jobs))


def finished(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(options: Namespace) -> None:
    """Every run that is not there yet."""
    path = Path(options.out) / "runs.jsonl"
    done = {run["key"] for run in finished(path)}
    left = [job for job in jobs_of(options) if job.key not in done]
    if not left:
        return
    prepared = Prepared.make(options.data, options.raw, Path(options.out) / options.side)
    with PeerProcess(threads=1, script=WORKER) as process:
        for job in left:
            started = time.perf_counter()
            logits, losses = run_ours(prepared, job) if job.side == "ours" else run_peer(prepared, job, process)
            line = {"key": job.key, **vars(job), **measured(prepared, logits), "valid_losses": losses,
                    "seconds": time.perf_counter() - started}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{job.key:<55} auc {line['test_auc']:.4f} gauc {line['test_gauc']:.4f} valid "
                  f"{line['valid_auc']:.4f} epochs {len(losses)} {line['seconds']:.0f} s", flush=True)


def main() -> int:
    parser = ArgumentParser(description="Our models beside the peers', on the same rows.")
    parser.add_argument("--data", choices=sorted(READERS))
    parser.add_argument("--raw", help="the folder with the log's files")
    parser.add_argument("--out", required=True, help="a folder for tables and runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "peers", "both"), default="both")
    parser.add_argument("--models", nargs="*", choices=sorted(OURS))
    parser.add_argument("--peers", nargs="*", choices=sorted({p.peer for p in PAIRS}))
    parser.add_argument("--table", help="write the tables to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.data:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        run_all(options)
    if options.table:
        write_report(Path(options.table), finished(Path(options.out) / "runs.jsonl"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
