"""The tables of the comparison of semantic ids: a page's section, and every run as CSV."""

import csv
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _sid_arms import ARMS

from raycascade.bootstrap import WeightedAuc, interval
from raycascade.slices import METRICS, MOST_OF_TAIL, SLICES, TOO_FEW, members

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
BASE = "hash"
Runs = Sequence[dict[str, Any]]


def of_arm(runs: Runs, arm: str) -> dict[int, dict[str, Any]]:
    """Runs of an arm by seed."""
    return {run["seed"]: run for run in runs if run["arm"] == arm}


def mean(runs: Runs, kind: str, metric: str) -> str:
    """Mean and deviation over the seeds."""
    values = [run["slices"][kind].get(metric) for run in runs]
    if not values or any(value is None for value in values):
        return TOO_FEW
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def difference(out: Path, runs: Runs, arm: str, kind: str, draws: int) -> str:
    """AUC of an arm less that of hashed ids, a mean over the seeds that both have, with its paired 95% interval over
    requests: of every draw the same requests count for both arms and all seeds."""
    ours, base = of_arm(runs, arm), of_arm(runs, BASE)
    seeds = sorted(set(ours) & set(base))
    if arm == BASE or not seeds or any("auc" not in ours[seed]["slices"][kind] for seed in seeds):
        return "-"
    pairs, requests = [], np.zeros(0, np.int64)
    for seed in seeds:
        sides = []
        for run in (ours[seed], base[seed]):
            with np.load(out / run["data"] / "logits" / f"{run['key'].replace('/', '-')}.npz") as rows:
                chosen = members(rows["impressions"])[kind]
                sides.append(WeightedAuc(rows["logits"][chosen], rows["labels"][chosen] > 0.5))
                requests = rows["requests"][chosen]
        pairs.append(sides)

    def gain(weights_R: np.ndarray) -> float:
        return statistics.fmean(own(weights_R) - other(weights_R) for own, other in pairs)

    low, high = interval(gain, requests, draws=draws)
    return f"{gain(np.ones(len(requests))):+.4f} ({low:+.4f} to {high:+.4f})"


def table_of(out: Path, runs: Runs, draws: int) -> str:
    """Markdown of one data set and one kind of inputs."""
    counts = runs[0]["slices"]
    said = "; ".join(f"{kind}: {counts[kind]['rows']:,} rows, {counts[kind]['positives']:,} positives"
                     for kind in SLICES)
    lines = [f"Test rows, {said}.", "",
             "| arm | rows | seeds | AUC, all | AUC, cold | AUC, tail | cold against hash | all against hash "
             "| GAUC, all | log loss, all | log loss, cold |", f"|{'---|' * 11}"]
    for arm in ARMS:
        own = list(of_arm(runs, arm).values())
        if own:
            cells = [*(mean(own, kind, "auc") for kind in SLICES),
                     *(difference(out, runs, arm, kind, draws) for kind in ("cold", "all")),
                     mean(own, "all", "gauc"), mean(own, "all", "logloss"), mean(own, "cold", "logloss")]
            lines.append(f"| {arm} | {own[0]['rows']:,} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(page: Path, out: Path, runs: Runs, *, draws: int) -> None:
    """Replaces the tables between the markers of a page, and writes the CSV of the same name."""
    arms = "\n".join(f"- `{arm}`: {text}" for arm, text in ARMS.items())
    dim = runs[0]["dim"] if runs else 0
    parts = [f"Arms, all of width {dim}:\n\n{arms}\n\nCold: no impression in training; tail: 1 to {MOST_OF_TAIL}. "
             f"Figures are means over seeds ± their deviation; differences to `{BASE}` have a paired 95% interval over "
             f"requests ({draws:,} draws)."]
    for data, inputs in dict.fromkeys((run["data"], run["inputs"]) for run in runs):
        own = [run for run in runs if (run["data"], run["inputs"]) == (data, inputs)]
        parts.append(f"### {data}, inputs {inputs}\n\n{table_of(out, own, draws)}")
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    section = f"{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}"
    page.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: section, text, flags=re.DOTALL))
    with page.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [f"{kind}_{name}" for kind in SLICES for name in ("rows", "positives", *METRICS)]
        writer.writerow(["data", "inputs", "arm", "seed", "table_rows", "epochs", *names])
        for run in runs:
            figures = [run["slices"][kind].get(name, "") for kind in SLICES for name in ("rows", "positives", *METRICS)]
            shown = [f"{value:.6f}" if isinstance(value, float) else value for value in figures]
            writer.writerow([run["data"], run["inputs"], run["arm"], run["seed"], run["rows"],
                             len(run["valid_losses"]), *shown])
