"""The tables of a comparison of quality: a page's section, and the same figures as CSV."""

import csv
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _quality_pairs import ALONE, PAIRS, Pair

BAR = 0.001  # of AUC that ours may lie below a peer's
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
FIGURES = ("test_auc", "test_gauc", "test_logloss", "valid_auc")


@dataclass(frozen=True)
class Compared:
    """One pair on one data set: figures of the seeds that both sides have, in the order of seeds."""

    data: str
    pair: Pair
    ours: list[dict[str, Any]]
    peers: list[dict[str, Any]]

    def mean(self, figure: str) -> tuple[float, float]:
        """(ours, the peer's)."""
        ours, peers = (statistics.fmean(run[figure] for run in runs) for runs in (self.ours, self.peers))
        return ours, peers

    def spread(self, figure: str) -> tuple[float, float]:
        """Standard deviations over the seeds, 0 for a single one."""
        ours, peers = ([run[figure] for run in runs] for runs in (self.ours, self.peers))
        return (statistics.stdev(ours), statistics.stdev(peers)) if len(ours) > 1 else (0.0, 0.0)

    @property
    def gain(self) -> float:
        """AUC of ours above the peer's."""
        ours, peer = self.mean("test_auc")
        return ours - peer

    @property
    def met(self) -> bool:
        return self.gain >= -BAR


def compare(runs: list[dict[str, Any]]) -> list[Compared]:
    """Every pair that has a seed on both sides, by data set and in the order of `PAIRS`."""
    by_key = {(run["data"], run["side"], run["model"], run["inputs"], run["seed"]): run for run in runs}
    found = []
    for data in sorted({run["data"] for run in runs}):
        for pair in PAIRS:
            ours, peers = ({seed: run for (d, side, model, inputs, seed), run in by_key.items()
                            if (d, side, model, inputs) == (data, name, pair.model, pair.inputs)}
                           for name in ("ours", pair.peer))
            seeds = sorted(set(ours) & set(peers))
            if seeds:
                found.append(Compared(data, pair, [ours[s] for s in seeds], [peers[s] for s in seeds]))
    return found


def table_of(compared: list[Compared]) -> str:
    """Markdown of one data set; `missed` where ours is below the peer's by more than the bar."""
    lines = ["| model | peer | inputs | seeds | AUC, ours | AUC, peer | difference | GAUC, ours | GAUC, peer | bar |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for c in compared:
        auc, deviation, gauc = c.mean("test_auc"), c.spread("test_auc"), c.mean("test_gauc")
        cells = [f"{value:.4f}"[1:] + (f" ± {spread:.4f}".replace("0.", ".", 1) if len(c.ours) > 1 else "")
                 for value, spread in zip(auc, deviation, strict=True)]
        gaucs = [f"{value:.4f}"[1:] for value in gauc]
        note = f" ({c.pair.note})" if c.pair.note else ""
        gain = f"{c.gain:+.4f}".replace("0.", ".", 1)
        lines.append(f"| {c.pair.model} | {c.pair.peer}{note} | {c.pair.inputs} | {len(c.ours)} | {cells[0]} | "
                     f"{cells[1]} | {gain} | {gaucs[0]} | {gaucs[1]} | {'met' if c.met else 'missed'} |")
    return "\n".join(lines)


def alone(runs: list[dict[str, Any]], data: str) -> list[list[dict[str, Any]]]:
    """Our runs of each model that no peer has, in the order of seeds."""
    found = [sorted((run for run in runs if (run["data"], run["side"], run["model"]) == (data, "ours", model)),
                    key=lambda run: run["seed"]) for model in ALONE]
    return [own for own in found if own]


def table_alone(models: list[list[dict[str, Any]]]) -> str:
    """Markdown of them."""
    lines = ["| model no peer has | inputs | seeds | AUC | GAUC |", "|---|---|---|---|---|"]
    for runs in models:
        auc, gauc = ([run[figure] for run in runs] for figure in ("test_auc", "test_gauc"))
        spread = f" ± {statistics.stdev(auc):.4f}".replace("0.", ".", 1) if len(auc) > 1 else ""
        cells = [runs[0]["model"], runs[0]["inputs"], f"{len(runs)}", f"{statistics.fmean(auc):.4f}"[1:] + spread,
                 f"{statistics.fmean(gauc):.4f}"[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(page: Path, runs: list[dict[str, Any]]) -> None:
    """Replaces the tables between the markers of a page, and writes the CSV of the same name."""
    found = compare(runs)
    parts = []
    for data in sorted({c.data for c in found}):
        own = [c for c in found if c.data == data]
        parts.append(f"### {data}\n\n{table_of(own)}\n\n{sum(c.met for c in own)} of {len(own)} within the bar.")
        parts += [table_alone(others)] if (others := alone(runs, data)) else []
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    section = f"{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}"
    page.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: section, text, flags=re.DOTALL))
    with page.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["data", "model", "peer", "inputs", "seed", *(f"{side}_{figure}" for figure in FIGURES
                                                                       for side in ("ours", "peer"))])
        for c in found:
            for ours, peer in zip(c.ours, c.peers, strict=True):
                figures = [f"{run[figure]:.6f}" for figure in FIGURES for run in (ours, peer)]
                writer.writerow([c.data, c.pair.model, c.pair.peer, c.pair.inputs, ours["seed"], *figures])
        for run in (run for data in sorted({c.data for c in found}) for own in alone(runs, data) for run in own):
            figures = [text for figure in FIGURES for text in (f"{run[figure]:.6f}", "")]
            writer.writerow([run["data"], run["model"], "", run["inputs"], run["seed"], *figures])
