"""What stands for an item in a ranker, on all items and on new ones: hashed ids, content, semantic ids.

    PYTHONPATH=platform OMP_NUM_THREADS=1 python benchmarks/semantic_ids.py --data simulated --out DIR
    PYTHONPATH=platform OMP_NUM_THREADS=1 python benchmarks/semantic_ids.py --data movietweetings --raw PATH --out DIR
    PYTHONPATH=platform python benchmarks/semantic_ids.py --out DIR --table docs/results/semantic-ids.md

`--raw` is the folder with the log's files. A run is one arm (`_sid_arms.py`) with one seed; its figures are one line of
`runs.jsonl` below `--out`, and a run that is there is not repeated. `--table` writes the tables of all runs there are
into a Markdown page, and every run as CSV beside it.

All arms of a seed have the same model (`din`), features, rows, order and number of steps at most; training stops at the
first epoch without a lower log loss on the validation rows, and the epoch before it counts. Candidate and history have
the same fields; the history stands for the user, whose id is left out. Inputs `ids`: of an item nothing else but its
duration and age, where there are any; `every`: all features that the log has (author, category or genre, counts, ...),
the content vector only in its own arm.
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
import pyarrow as pa
import torch
from _cold_tables import CONTENT, READERS, ContentTable, publish_encoded
from _ctr_tables import SPLITS
from _sid_arms import ARMS, FIELD, TokenMaker
from _sid_report import write_report

from raycascade.batch import collate
from raycascade.config import Config, parse_config
from raycascade.features import FeatureState
from raycascade.keys import to_keys
from raycascade.semantic_ids.artefact import ItemContent
from raycascade.shards import Shards
from raycascade.slices import SLICES, Slice, members, training_impressions
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Place, Run, Save, fit

DIM, HIDDEN, BATCH, LR, EPOCHS = 16, (64, 32), 256, 1e-3, 12
FIRST_SEED = 1
BARE = "movietweetings", "ids", "none"  # nothing at all would be left of an item


@dataclass(frozen=True)
class Job:
    """One run."""

    data: str
    inputs: str
    arm: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.data}/{self.inputs}/{self.arm}/{self.seed}"


@dataclass(frozen=True)
class Prepared:
    """A table, encoded once for all arms."""

    table: ContentTable
    state: FeatureState
    encoded: dict[str, pa.Table]
    folder: Path

    @classmethod
    def make(cls, data: str, raw: str, out: Path) -> "Prepared":
        table = READERS[data](raw)
        state = table.fitted()
        encoded = {f"requests/{name}": state.encode_requests(table.requests[name], where=name) for name in SPLITS}
        encoded["items"] = state.encode_items(table.items, where="items")
        folder = out / data
        folder.mkdir(parents=True, exist_ok=True)
        return cls(table, state, encoded, folder)

    def maker(self, seed: int, steps: int) -> TokenMaker:
        content = ItemContent.of(self.encoded["items"], CONTENT, self.state.counters)
        return TokenMaker(content, self.table.end_ms, seed, steps)

    def shards(self, arm: str, maker: TokenMaker) -> Shards:
        """The log with the arm's tokens as a field of the items."""
        tokens, encoded, state = maker.of(arm), dict(self.encoded), self.state
        if tokens is not None:
            state, encoded["items"] = tokens.appended(state, encoded["items"])
        root = self.folder / "shards"
        shutil.rmtree(root, ignore_errors=True)
        return publish_encoded(str(root), state, encoded)


def config_of(job: Job, table: ContentTable, folder: str, epochs: int) -> Config:
    """A cascade of one stage."""
    exclude = ["item_id", "user_id", *([] if job.arm == "content" else [CONTENT])]
    exclude += list(table.known) if job.inputs == "ids" else []
    model: dict[str, Any] = {"name": "din", "dim": DIM, "hidden": HIDDEN, "activation": "relu"}
    if (job.inputs, job.arm) == ("ids", "none"):  # an event of the history is then no item that could be attended to
        model, exclude = {"name": "mlp", "dim": DIM, "hidden": HIDDEN}, [*exclude, "history"]
    stage = {"name": "ranker", "keep": 1, "model": model, "exclude": exclude}
    return parse_config({
        "paths": {"shards": folder}, "dataset": {"name": "simulated"}, "stages": [stage],
        "loss": {"name": "bce", "label": table.schema.positive, "entry_levels": [0]}, "lists": {"k": 1},
        "train": {"batch_size": BATCH, "epochs": epochs, "early_stop": 1, "seed": job.seed, "lr": LR, "gpu": False,
                  "checkpoint_steps": 1 << 30},
    }, where="benchmark")


def run_one(prepared: Prepared, job: Job, maker: TokenMaker, epochs: int) -> dict[str, Any]:
    """Trains an arm and measures it on the test rows; their logits are kept for paired intervals."""
    started = time.perf_counter()
    shards = prepared.shards(job.arm, maker)
    run = Run.build(config_of(job, prepared.table, str(prepared.folder / "shards"), epochs), shards, Place())

    def report(progress: Progress, steps: int, save: Save | None) -> None:
        del progress, steps, save

    progress = fit(run, Progress(), report)
    rows, positive = shards.table("requests/test"), shards.state.schema.positive
    logits, labels, items = measured_rows(run, positive)
    impressions_N = training_impressions(shards.items)
    users_Q, requests_Q = to_keys(rows["user_key"]), to_keys(rows["request_id"])
    figures: dict[str, Any] = {}
    for name, mask in members(impressions_N[items.numpy()]).items():
        one = Slice()
        one.update(logits, labels, mask, users_Q, requests_Q)
        found = one.figures(name, "ranker")
        figures[name] = {"rows": found.rows, "positives": found.positives, **(found.metrics or {})}
    known = ~labels.isnan().numpy()
    folder = prepared.folder / "logits"
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{job.key.replace('/', '-')}.npz", logits=logits.numpy()[known], labels=labels.numpy()[known],
             impressions=impressions_N[items.numpy()][known],
             requests=np.broadcast_to(requests_Q[:, None], known.shape)[known])
    space = shards.state.space
    table_rows = space[FIELD].num_rows if any(f.name == FIELD for f in space.fields) else 0
    return {"key": job.key, **vars(job), "rows": table_rows, "dim": DIM, "slices": figures,
            "valid_losses": [loss for _, loss in progress.curves["valid_loss"]],
            "seconds": time.perf_counter() - started}


@torch.no_grad()
def measured_rows(run: Run, label: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels (NaN: none) and item rows [Q, C] of the test requests, which all have the same number."""
    run.cascade.eval()
    logits, labels, items = [], [], []
    for rows in run.reader("test", shuffle=False).batches(0):
        batch = collate(rows, run.shards.items)
        assert batch.targets is not None
        logits.append(run.cascade.models["ranker"](batch)[..., 0])
        labels.append(torch.where(batch.mask_QC, batch.targets.labels[label], torch.nan))
        items.append(batch.candidates_QC)
    return torch.cat(logits), torch.cat(labels), torch.cat(items)


# ---------------------------------------------------------------- all runs
def finished(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(options: Namespace) -> None:
    """Every run that is not there yet, seed by seed."""
    path = Path(options.out) / "runs.jsonl"
    done = {run["key"] for run in finished(path)}
    jobs = [Job(options.data, inputs, arm, seed) for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)
            for inputs in options.inputs for arm in options.arms if (options.data, inputs, arm) != BARE]
    jobs = [job for job in jobs if job.key not in done]
    if not jobs:
        return
    prepared = Prepared.make(options.data, options.raw, Path(options.out))
    makers: dict[int, TokenMaker] = {}
    for job in jobs:
        maker = makers.setdefault(job.seed, prepared.maker(job.seed, options.steps))
        line = run_one(prepared, job, maker, options.epochs)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        auc = {name: line["slices"][name].get("auc", float("nan")) for name in SLICES}
        print(f"{job.key:<40} rows {line['rows']:>6,} auc {auc['all']:.4f} cold {auc['cold']:.4f} tail "
              f"{auc['tail']:.4f} epochs {len(line['valid_losses'])} {line['seconds']:.0f} s", flush=True)


def main() -> int:
    parser = ArgumentParser(description="What stands for an item in a ranker, at equal tables.")
    parser.add_argument("--data", choices=sorted(READERS))
    parser.add_argument("--raw", default="", help="the folder with the log's files")
    parser.add_argument("--out", required=True, help="a folder for runs, logits and shards")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--inputs", nargs="*", choices=("ids", "every"), default=["ids", "every"])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="at most")
    parser.add_argument("--steps", type=int, default=1500, help="of the RQ-VAE")
    parser.add_argument("--draws", type=int, default=1000, help="of the intervals in the tables")
    parser.add_argument("--table", help="write the tables to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(options.out)
    if options.data:
        out.mkdir(parents=True, exist_ok=True)
        run_all(options)
    if options.table:
        write_report(Path(options.table), out, finished(out / "runs.jsonl"), draws=options.draws)
    return 0


if __name__ == "__main__":
    sys.exit(main())
