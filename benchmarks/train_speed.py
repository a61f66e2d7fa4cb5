"""Rows a second in training, ours and the peers', turn by turn on the same rows.

    PYTHONPATH=platform python benchmarks/train_speed.py [--loaders]

A click log of 26 id fields and 13 numbers (`_ctr_table.py`) in batches of 4,096 rows: embeddings of width 16, the same
hidden layers, Adam of the same rate, no regularisation, no dropout, the same number of threads on the same cores.

Steps alone (the default): batches lie in memory, each side's in its own form. Ours is the loop's step with all its
defaults (forward, backward, clipping, sparse update of the tables); a peer's is its own training loop.

`--loaders`: ours is the whole loop, `training.loop.fit`, which reads the shards, shuffles and makes the tensors in a
thread of its own (on the same cores). A peer is its training loop with its own loader over arrays in memory; fuxictr's
loaders read nothing but files that it has prepared, so it keeps its batches in memory.

Rounds of a few steps change turns; a rate is the median of the rounds. Beside the clock stands the processor time of
the whole process, which other work on the machine disturbs less.
"""

import sys
import tempfile
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from _ctr_table import SEEN, Table, arrays_of, batches_of, model_options, write_table
from _peers import PeerProcess, models_of, pin, table_parser
from _rates import OURS, Rates, header

from raycascade.batch import Batch
from raycascade.config import Config, parse_config
from raycascade.shards import Shards
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Place, Run, Save, _train_step, fit, lr_scales

WARM_UP = 3  # the first step allocates the moments
IN_MEMORY = 16  # batches that go round
BARS = {10_000: 1.3, 100_000: 4.0}
BARRED = ("deepfm", "dcn_v2", "wide_deep")


@dataclass
class Turns:
    """Clocks rounds of ours and of the peers. As the loop's report callback it lets them have their turn after some
    steps of ours.

    Ours begins a round one step late: the batch after a pause was made during it.
    """

    peers: dict[str, PeerProcess]
    steps: int
    rates: Rates
    seen: int = -WARM_UP
    started: tuple[float, float] = (0.0, 0.0)

    def __call__(self, progress: Progress, steps: int, save: Save | None) -> None:
        del progress, steps, save
        self.seen += 1
        if self.seen <= 0 or self.seen % (self.steps + 1) == 1:
            self.begin()
        elif self.seen % (self.steps + 1) == 0:
            self.end()

    def begin(self) -> None:
        """Starts the clock."""
        self.started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stops it after `steps` of ours; the peers' turn."""
        began, busy = self.started
        self.rates.add(OURS, time.perf_counter() - began, time.process_time() - busy)
        for name, peer in self.peers.items():
            answer = peer.ask(do="train", steps=self.steps)
            self.rates.add(name, answer["seconds"], answer["processor"])


def config_of(root: str, model: str, options: Namespace) -> Config:
    steps = WARM_UP + options.rounds * (options.steps + 1) + 1
    return parse_config({
        "paths": {"shards": root}, "dataset": {"name": "simulated"},
        "stages": [{"name": "ranker", "keep": 1,
                    "model": model_options(model, dim=options.dim, hidden=options.hidden)}],
        "loss": {"name": "bce", "label": "click", "entry_levels": [0]},
        "train": {"batch_size": options.batch, "max_steps": steps, "epochs": 1000, "checkpoint_steps": 1 << 30,
                  "table_momentum": 0.0, "gpu": False},  # the setting for click tables, as in configs/ctr_table.yaml
    }, where="benchmark")


def measure(model: str, shards: Shards, table: Table, arrays: str, options: Namespace) -> Rates:
    """All rounds of one model."""
    spec = table.spec(dim=options.dim, hidden=options.hidden, batch=options.batch, model=model)
    with ExitStack() as stack:
        peers = {}
        for name in models_of(model, options.libraries):
            peers[name] = stack.enter_context(PeerProcess(threads=options.threads))
            peers[name].ask(do="open", library=name, model=model, table=arrays, own_loader=options.loaders, spec=spec)
            peers[name].ask(do="train", steps=WARM_UP)
        run = Run.build(config_of(shards.folder, model, options), shards, Place())
        turns = Turns(peers, options.steps, Rates(options.steps * options.batch))
        if options.loaders:
            fit(run, Progress(), turns)
        else:
            steps_alone(run, batches_of(shards, options.batch)[:IN_MEMORY], turns, rounds=options.rounds)
    return turns.rates


def steps_alone(run: Run, batches: list[Batch], turns: Turns, *, rounds: int) -> None:
    """The loop's step over batches in memory, in rounds."""
    progress = Progress()
    following = cycle(batches)

    def steps(count: int) -> None:
        for _ in range(count):
            rng = np.random.default_rng(progress.total_steps)
            scales = lr_scales(run.config, progress.total_steps, 0.0)
            _train_step(run, next(following), rng, progress, scales=scales, record=False)
            progress.total_steps += 1

    steps(WARM_UP)
    for _ in range(rounds):
        turns.begin()
        steps(turns.steps)
        turns.end()


def main() -> int:
    parser = table_parser("Training rows a second against peers.", rounds=7, threads="of either side")
    parser.add_argument("--models", nargs="+", default=list(BARRED))
    parser.add_argument("--rows", type=int, nargs="+", default=list(BARS), help="values of an id field")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    options = parser.parse_args()
    pin(range(options.threads))
    torch.set_num_threads(options.threads)
    loading = "each side with its own loader" if options.loaders else "steps alone, batches in memory"
    print(f"command: python {' '.join(sys.argv)}\n26 id fields, 13 numbers, dim {options.dim}, hidden "
          f"{options.hidden}, batch {options.batch:,}, {options.threads} threads and cores, {options.rounds} rounds of "
          f"{options.steps} steps; din: {options.history} events of {len(SEEN)} fields; {loading}\n"
          f"rows a second (a second of processor time)\n\n{header(['model', 'values of a field'], options.libraries)}",
          flush=True)
    met = []
    for rows in options.rows:
        for history, models in ((0, [m for m in options.models if m != "din"]),
                                (options.history, [m for m in options.models if m == "din"])):
            if not models:
                continue
            requests = options.batch * (WARM_UP + 1 + options.rounds * (options.steps + 1))
            table = Table(rows=rows, requests=requests, items=2 * max(options.rows), history=history)
            with tempfile.TemporaryDirectory() as folder:
                shards = write_table(folder, table)
                arrays = str(Path(folder) / "table.npz")
                np.savez(arrays, allow_pickle=False, **arrays_of(batches_of(shards, options.batch)[:IN_MEMORY], table))
                for model in models:
                    rates = measure(model, shards, table, arrays, options)
                    bar = BARS.get(rows) if model in BARRED and options.libraries else None
                    line, reached = rates.row([model, f"{rows:,}"], options.libraries, bar)
                    print(line, flush=True)
                    met.append(reached)
    print(f"\nbars: {'all met' if all(met) else 'MISSED'}")
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main())
