"""The page of all models: what each is for, its size and cost, its speed, and its AUC on two public data sets.

    PYTHONPATH=platform python benchmarks/zoo_page.py            # writes docs/models.md
    PYTHONPATH=platform python benchmarks/zoo_page.py --measure  # times every model first (one thread)

Parameters and floating point operations are counted on the spot, at the size below; a test counts them again. Speeds
come from docs/results/zoo-speeds.csv, which `--measure` writes, AUCs from docs/results/zoo-quality.csv, which
peer_quality.py writes.
"""

import csv
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.schema import FeatureSpace, Field
from raycascade.training.row_adam import RowAdam, coalesce_gradients

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/models.md"
SPEEDS, QUALITY = ROOT / "docs/results/zoo-speeds.csv", ROOT / "docs/results/zoo-quality.csv"
DIM, HIDDEN, ROWS, HISTORY = 16, [128, 64], 1002, 50
REQUESTS, CANDIDATES = 64, 50  # of a timed training step and of a timed scoring call
TREES, DEPTH = 200, 6
PURPOSES = {
    "lr": "a floor and a fallback whose weights can be read",
    "gbdt": "small data, mostly numbers and counts; no tuning of embeddings",
    "two_tower": "retriever over millions of items, first pre-ranker",
    "mlp": "pre-ranker or ranker with a few thousand candidates on CPUs",
    "wide_deep": "pairs that are known to matter, named as crosses",
    "deepfm": "many sparse ids and no time to tune",
    "dcn": "bounded-order crosses at the price of an MLP",
    "dcn_v2": "the strongest plain ranker for its price",
    "edcn": "crosses and deep part that underuse each other",
    "afm": "few fields, small data, a readable weight per pair",
    "fibinet": "fields of very uneven value",
    "deepffm": "few fields that behave differently with each partner",
    "fat_deepffm": "the same, with a learned weight per pair of fields",
    "autoint": "interactions of high order between many fields",
    "dlrm": "many numbers beside the ids",
    "din": "the part of the history that a candidate is about",
    "bst": "short histories with clear recency",
    "dien": "interests that drift, small candidate sets",
    "int_tower": "pre-ranker: late interaction of several heads, candidates cached",
    "gesr": "pre-ranker that sees user and item together, candidates cached",
    "hstu": "long histories shared by many candidates; wants a GPU",
    "shared_bottom": "several related labels, cheapest sharing",
    "mmoe": "several labels that conflict",
    "ple": "several labels that conflict strongly: private experts protect each",
}


def space() -> FeatureSpace:
    """8 fields of the request, 6 of a candidate (with 1,000 values each), 50 events of 2 fields; dlrm: 3 numbers."""
    request = [Field(name=f"u{n}", side="request", form="id", table=f"u{n}", num_rows=ROWS) for n in range(8)]
    item = [Field(name=f"i{n}", side="item", form="id", table=f"i{n}", num_rows=ROWS) for n in range(6)]
    return FeatureSpace(fields=(*request, *item), history_len=HISTORY, history_fields=("i0", "i1"))


def batch_of(requests: int, candidates: int) -> Batch:
    """Random rows of every field, no padding."""
    draw = torch.Generator().manual_seed(7)

    def rows(*shape: int) -> Tensor:
        return torch.randint(2, ROWS, shape, generator=draw)

    item = {f"i{n}": rows(requests, candidates) for n in range(6)}
    history = {f"i{n}": rows(requests, HISTORY) for n in range(2)}
    return Batch(user={f"u{n}": rows(requests) for n in range(8)}, item=item, history=history,
                 history_mask_QL=torch.ones(requests, HISTORY, dtype=torch.bool), history_rows_QL=history["i0"],
                 candidates_QC=item["i0"], mask_QC=torch.ones(requests, candidates, dtype=torch.bool),
                 time_ms_Q=torch.zeros(requests), history_negatives={n: rows(requests, HISTORY) for n in history})


def build(name: str) -> Any:
    """The model at the page's size, its other options at their defaults; None for one without PyTorch parameters."""
    cls, defaults = plugins.options("models", {"name": name}, name)
    if not issubclass(cls, nn.Module):
        return None
    fields = type(defaults).model_fields
    sizes = {"dim": DIM, "hidden": HIDDEN, "user_hidden": HIDDEN, "item_hidden": HIDDEN}
    _, config = plugins.options("models", {"name": name, **{k: v for k, v in sizes.items() if k in fields}}, name)
    torch.manual_seed(0)
    return cls(config, space())


def operations(model: Any) -> tuple[float, float]:
    """Thousands of floating point operations (a multiply-add is 2) of matrix products: per request, per candidate."""
    counted = []
    for candidates in (1, 101):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model.eval()(batch_of(1, candidates))
        counted.append(counter.get_total_flops() / 1e3)
    per_candidate = (counted[1] - counted[0]) / 100
    return counted[0] - per_candidate, per_candidate


def counts(name: str) -> dict[str, str]:
    """What is counted rather than measured, as the page shows it."""
    model = build(name)
    if model is None:
        return {"parameters": "trees", "request": "0", "candidate": f"{TREES * DEPTH / 1000:.1f} comparisons"}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    beside = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    request, candidate = operations(model)
    return {"parameters": f"{beside:,} + {sum(p.numel() for p in model.parameters()) - beside:,}",
            "request": _short(request), "candidate": _short(candidate)}


def _short(kilo: float) -> str:
    return f"{kilo:,.0f}" if kilo >= 10 else f"{kilo:.2g}"


def measure(name: str, *, repeats: int) -> dict[str, int]:
    """Candidate rows a second of a training step (forward, backward, update) and of scoring, medians of one run."""
    model = build(name)
    batch = batch_of(REQUESTS, CANDIDATES)
    labels_QC1 = (torch.rand(REQUESTS, CANDIDATES, 1, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    chosen = {id(p) for p in tables}
    dense = torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], lr=1e-3)
    sparse = RowAdam(tables, lr=1e-3)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        logits, extra = model.train_outputs(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels_QC1)
        torch.stack([loss, *extra.values()]).sum().backward()
        coalesce_gradients(tables)
        sparse.step()
        dense.step()

    def score() -> None:
        with torch.inference_mode():
            model(batch)

    rows = REQUESTS * CANDIDATES
    model.train()
    training = rows / _median_seconds(train, repeats=repeats)
    model.eval()
    return {"training": round(training), "scoring": round(rows / _median_seconds(score, repeats=repeats))}


def _median_seconds(step: Callable[[], None], *, repeats: int) -> float:
    taken = []
    for n in range(repeats + 3):
        started = time.perf_counter()
        step()
        if n >= 3:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV; none where the file is missing."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def mean_auc(rows: list[dict[str, str]], data: str, model: str) -> str:
    """Our test AUC with the richest inputs that were measured, the mean over seeds."""
    mine = [row for row in rows if (row["data"], row["model"]) == (data, model)]
    richest = max((row["inputs"] for row in mine), key=lambda name: (name.startswith("all"), len(name)), default="")
    by_seed = {row["seed"]: float(row["ours_test_auc"]) for row in mine if row["inputs"] == richest}
    return f"{statistics.mean(by_seed.values()):.4f}".lstrip("0") if by_seed else "-"


def page() -> str:
    """docs/models.md."""
    speeds, quality = {row["model"]: row for row in read(SPEEDS)}, read(QUALITY)
    head = ("model", "what it is for", "parameters beside + in tables", "kFLOP a request", "kFLOP a candidate",
            "training rows/s", "scoring rows/s", "KuaiRand AUC", "MovieTweetings AUC")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in plugins.names("models"):
        counted, speed = counts(name), speeds.get(name, {})
        cells = (f"[`{name}`](config.md#{name})", PURPOSES[name], *counted.values(),
                 *(f"{int(speed[key]):,}" if key in speed else "-" for key in ("training", "scoring")),
                 *(mean_auc(quality, data, name) for data in ("kuairand", "movietweetings")))
        lines.append(f"| {' | '.join(cells)} |")
    return TEXT.format(table="\n".join(lines), dim=DIM, hidden="-".join(map(str, HIDDEN)), values=ROWS - 2,
                       history=HISTORY, requests=REQUESTS, candidates=CANDIDATES)


TEXT = """# Models

Every model is one file of `platform/raycascade/models/` and one word in a stage's `model: {{name: ...}}`. Each follows
its paper; each is saved, served, batch-scored and explained the same way, and computes what depends on the request
alone once a request. Options and the papers' sizes: [config.md](config.md). A new one:
[add-a-model.md](add-a-model.md).

{table}

How to read it. Size of the table: 8 id fields of the request and 6 of a candidate with {values:,} values each, vectors
of width {dim}, {history} events of 2 fields, MLP {hidden}, one task, all other options at their defaults. Operations
are those of matrix products, a multiply-add being two; lookups and element-wise work come on top, and below some 50
kFLOP a candidate they decide. Speeds: {requests} requests of {candidates} candidates, one thread of a shared CPU
without a GPU; they compare the models with each other, not with other machines. AUCs: the mean of three seeds at one
setting for all models ([results/zoo-quality.md](results/zoo-quality.md)); "-" was not measured.

`gbdt` has its trees fitted by XGBoost; the numbers of its row are those of 200 trees of depth 6.

Written by `PYTHONPATH=platform python benchmarks/zoo_page.py`; a test counts parameters and operations again.
"""


def main() -> int:
    parser = ArgumentParser(description="Writes docs/models.md.")
    parser.add_argument("--measure", action="store_true", help="time every model before")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(1)
        with SPEEDS.open("w", newline="") as file:
            writer = csv.DictWriter(file, ("model", "training", "scoring"), lineterminator="\n")
            writer.writeheader()
            for name in plugins.names("models"):
                if build(name) is not None:
                    row: dict[Any, Any] = {"model": name, **measure(name, repeats=options.repeats)}
                    writer.writerow(row)
                    print(row, flush=True)
    PAGE.write_text(page())
    print(f"command: python {' '.join(sys.argv)}; wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
