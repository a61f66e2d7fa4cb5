"""Rows a second in scoring, ours and the peers', and the time of one request of 1,000 candidates.

    PYTHONPATH=platform python benchmarks/score_speed.py [--loaders]

The log and the sizes are those of `train_speed.py`. Three measures, each in evaluation mode without gradients, from
tensors in memory in each side's own form to probabilities; rounds change turns, a rate is the median of the rounds:

tables: 4,096 rows with a user and an item each. requests: one user with 500 or 1,000 candidates; ours gets the user
once, a peer as many rows with the user's values repeated (which is not clocked). time of a request: p50 and p99 of ours
for 1,000 candidates of one user; the second figure gathers the candidates' fields, too, as a stage of the cascade does.

`--loaders`: the first two from each side's stored data: ours reads the shards and makes the tensors, a peer has its own
loader over arrays in memory (fuxictr, whose loaders read nothing but files that it has prepared, keeps its batches).
"""

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from _ctr_table import SEEN, Table, arrays_of, batches_of, model_options, write_table
from _peers import PeerProcess, models_of, pin, table_parser
from _rates import OURS, Rates, header, quantile
from torch import nn

from raycascade import plugins
from raycascade.batch import Batch, collate
from raycascade.shards import ShardReader, Shards

BAR, BAR_MS = 2.0, 25.0
TIMED = ("din", "dcn_v2")  # models whose time of a request has a bar
TABLE_BATCHES, REQUESTS = 4, 16


def build(model: str, shards: Shards, options: Namespace) -> nn.Module:
    """Our model with fresh weights."""
    torch.manual_seed(7)
    spec = model_options(model, dim=options.dim, hidden=options.hidden)
    plugin, config = plugins.options("models", spec, "benchmark")
    return plugin(config, shards.state.space).eval()


def clocked(score: Callable[[Batch], object], batches: Sequence[Batch]) -> tuple[list[float], list[float]]:
    """Seconds and processor seconds of each batch."""
    seconds, processor = [], []
    with torch.inference_mode():
        for batch in batches:
            started, busy = time.perf_counter(), time.process_time()
            score(batch)
            seconds.append(time.perf_counter() - started)
            processor.append(time.process_time() - busy)
    return seconds, processor


@torch.inference_mode()
def scored(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Probabilities of batches."""
    for batch in batches:
        torch.sigmoid(model(batch))


def read_and_scored(model: nn.Module, shards: Shards, size: int) -> None:
    """Probabilities of all requests of the shards, in batches of so many."""
    reader = ShardReader(shards, "train", size, shuffle=False)
    scored(model, (collate(rows, shards.items) for rows in reader.batches(0)))


def compare(model: str, shards: Shards, table: Table, folder: str, candidates: int, options: Namespace) -> bool:
    """One row of the table for batches of one candidate or of many; whether the bar is met."""
    size = options.batch if candidates == 1 else 1
    batches = batches_of(shards, size)
    rows = len(batches) * size * candidates
    arrays = str(Path(folder) / "table.npz")
    np.savez(arrays, allow_pickle=False, **arrays_of(batches, table))
    spec = table.spec(dim=options.dim, hidden=options.hidden, batch=size * candidates, model=model)
    ours, rates = build(model, shards, options), Rates(rows)
    with ExitStack() as stack:
        peers = {}
        for name in models_of(model, options.libraries):
            peers[name] = stack.enter_context(PeerProcess(threads=options.threads))
            peers[name].ask(do="open", library=name, model=model, table=arrays, own_loader=options.loaders, spec=spec)
            peers[name].ask(do="score", steps=len(batches))
        passes = (lambda: read_and_scored(ours, shards, size)) if options.loaders else (lambda: scored(ours, batches))
        passes()
        for _ in range(options.rounds):
            started, busy = time.perf_counter(), time.process_time()
            passes()
            rates.add(OURS, time.perf_counter() - started, time.process_time() - busy)
            for name, peer in peers.items():
                answer = peer.ask(do="score", steps=len(batches))
                rates.add(name, answer["seconds"], answer["processor"])
    shape = f"{size:,} rows" if candidates == 1 else f"1 user x {candidates:,}"
    line, met = rates.row([model, shape], options.libraries, BAR if peers else None)
    print(line, flush=True)
    return met


def time_of_request(model: str, shards: Shards, candidates: int, options: Namespace) -> bool:
    """p50 and p99 of one request; whether the bar is met by the model alone."""
    batches = batches_of(shards, 1)
    ours = build(model, shards, options)
    repeated = [batches[n % len(batches)] for n in range(options.requests)]

    def gathered(batch: Batch) -> None:
        ours(batch.with_candidates(batch.candidates_QC, batch.mask_QC, shards.items))

    texts, slowest = [], 0.0
    for score in (ours, gathered):
        clocked(score, batches)
        seconds, processor = clocked(score, repeated)
        p50, p99 = 1000 * quantile(seconds, 0.5), 1000 * quantile(seconds, 0.99)
        texts.append(f"p50 {p50:.1f} ms, p99 {p99:.1f} ms (processor p50 {1000 * quantile(processor, 0.5):.1f},"
                     f" p99 {1000 * quantile(processor, 0.99):.1f})")
        slowest = slowest or p99
    met = slowest <= BAR_MS
    print(f"| {model} | 1 user x {candidates:,} | {' | '.join(texts)} | p99 {BAR_MS:g} ms: "
          f"{'met' if met else 'MISSED'} |", flush=True)
    return met


def main() -> int:
    parser = table_parser("Scored rows a second against peers.", rounds=9,
                          threads="of the rates; a request is timed on one")
    parser.add_argument("--models", nargs="+", default=["deepfm", "dcn_v2", "wide_deep"])
    parser.add_argument("--rows", type=int, default=100_000, help="values of an id field")
    parser.add_argument("--candidates", type=int, nargs="*", default=[500, 1000])
    parser.add_argument("--requests", type=int, default=500, help="requests timed")
    options = parser.parse_args()
    pin(range(options.threads))
    torch.set_num_threads(options.threads)
    loading = "each side with its own loader" if options.loaders else "batches in memory"
    print(f"command: python {' '.join(sys.argv)}\n26 id fields of {options.rows:,} values, 13 numbers, dim "
          f"{options.dim}, hidden {options.hidden}, {options.threads} threads and cores, {options.rounds} rounds; din: "
          f"{options.history} events of {len(SEEN)} fields; {loading}\n"
          f"rows a second (a second of processor time)\n\n{header(['model', 'batch'], options.libraries)}", flush=True)
    met = []
    for candidates in (1, *options.candidates):
        for model in options.models:
            count = options.batch * TABLE_BATCHES if candidates == 1 else REQUESTS
            table = Table(rows=options.rows, requests=count, items=2 * options.rows,
                          history=options.history if model == "din" else 0)
            with tempfile.TemporaryDirectory() as folder:
                shards = write_table(folder, table, candidates=candidates)
                met.append(compare(model, shards, table, folder, candidates, options))
    print("\n| model | request | model alone | and its candidates' fields gathered | bar |\n|---|---|---|---|---|")
    pin([0])
    torch.set_num_threads(1)
    for model in TIMED:
        table = Table(rows=options.rows, requests=REQUESTS, items=2 * options.rows,
                      history=options.history if model == "din" else 0)
        with tempfile.TemporaryDirectory() as folder:
            shards = write_table(folder, table, candidates=1000)
            met.append(time_of_request(model, shards, 1000, options))
    print(f"\nbars: {'all met' if all(met) else 'MISSED'}")
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main())
