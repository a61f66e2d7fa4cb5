"""The tables of the early-stage comparison: a page's section, and every run as CSV."""

import csv
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _early_arms import ARMS, BASE, CACHED_BASE, KEEPS

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
STAGE, WHOLE, ALONE = f"recall@{KEEPS[1]}", f"recall@{KEEPS[2]}", f"recall@{KEEPS[1]}/retriever"
FIGURES = (f"recall@{KEEPS[0]}", STAGE, WHOLE, "ranker_agrees", ALONE)
Runs = Sequence[dict[str, Any]]


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _gain(own: Runs, base: Runs, name: str) -> str:
    """Mean and deviation of the differences seed by seed."""
    before = {run["seed"]: run[name] for run in base}
    gains = [run[name] - before[run["seed"]] for run in own if run["seed"] in before]
    if not gains:
        return "-"
    return f"{statistics.fmean(gains):+.4f}" + (f" ± {statistics.stdev(gains):.4f}" if len(gains) > 1 else "")


def quality_table(runs: Runs) -> str:
    """Markdown of one data set."""
    base = [run for run in runs if run["arm"] == BASE]
    retriever = [run[ALONE] for run in {run["seed"]: run for run in runs}.values()]
    lines = [f"{runs[0]['positives']:,} held-out positives of {runs[0]['requests']:,} requests; the retriever alone, "
             f"cut to {KEEPS[1]}: {_cell(retriever)}.", "",
             f"| pre-ranker | seeds | {STAGE}, of the stage | against {BASE} | {WHOLE}, of the cascade "
             f"| against {BASE} | ranker's choice kept | weights without tables | training, s |", f"|{'---|' * 9}"]
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        if own:
            columns = {name: [run[name] for run in own] for name in (*FIGURES, "train_seconds")}
            cells = [arm, str(len(own)), _cell(columns[STAGE]), _gain(own, base, STAGE), _cell(columns[WHOLE]),
                     _gain(own, base, WHOLE), _cell(columns["ranker_agrees"]), f"{own[0]['parameters']:,}",
                     f"{statistics.fmean(columns['train_seconds']):.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(run: dict[str, Any]) -> str:
    """Markdown of one `--speed`."""
    times = run["milliseconds"]
    through_stage = "stage_mean" in next(iter(times.values()))
    title = (f"{run['device']}, torch {run['torch']}, {run['threads']} thread, float32, one request of "
             f"{run['candidates']} candidates at a time; {run['requests']} requests, {run['rounds']} rounds in turns.")
    columns = ["pre-ranker", "encoded items"]
    columns += ["requests/s of the stage", f"against {BASE}", f"against {CACHED_BASE}", "p50, ms", "p95, ms",
                "processor, ms"] if through_stage else []
    columns += ["model alone, p50, ms", f"times {BASE}", f"times {CACHED_BASE}"]
    lines = [title, "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for arm, own in times.items():
        cells = [arm, "from the bundle" if arm in run["cached"] else "no"]
        if through_stage:
            cells.append(f"{1e3 / own['stage_mean']:,.0f}")
            for base in (BASE, CACHED_BASE):
                change = times[base]["stage_mean"] / own["stage_mean"] - 1 if base in times else None
                cells.append("-" if change is None or base == arm else f"{change:+.0%}")
            cells += [f"{own[name]:.2f}" for name in ("stage_p50", "stage_p95", "stage_processor_p50")]
        cells.append(f"{own['kernel_p50']:.2f}")
        for base in (BASE, CACHED_BASE):
            cells.append(f"{own['kernel_p50'] / times[base]['kernel_p50']:.2f}" if base in times else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(page: Path, runs: Runs) -> None:
    """Replaces the tables between the markers of a page, and writes the CSV of the same name."""
    quality, speeds = ([run for run in runs if run["kind"] == kind] for kind in ("quality", "speed"))
    parts = [f"### {data}: what is kept\n\n{quality_table([run for run in quality if run['data'] == data])}"
             for data in dict.fromkeys(run["data"] for run in quality)]
    newest = {(run["data"], run["device"]): run for run in speeds}
    parts += [f"### {data}: what it costs ({device})\n\n{speed_table(run)}" for (data, device), run in newest.items()]
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    section = f"{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}"
    page.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: section, text, flags=re.DOTALL))
    with page.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["data", "pre_ranker", "seed", "positives", *FIGURES])
        for run in quality:
            writer.writerow([run["data"], run["arm"], run["seed"], run["positives"],
                             *(f"{run[name]:.6f}" for name in FIGURES)])
