"""Rows of the tables that the benchmarks against peers print, in Markdown, so that a page can be pasted from a run."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OURS = "raycascade"


@dataclass
class Rates:
    """Clocked rounds of every side. `rows`: in a round."""

    rows: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float, processor: float) -> None:
        """One more round of a side."""
        self.seconds.setdefault(name, []).append(seconds)
        self.processor.setdefault(name, []).append(processor)

    def by_clock(self) -> dict[str, float]:
        """Rows a second of every side: the median of its rounds."""
        return {name: self.rows / statistics.median(rounds) for name, rounds in self.seconds.items()}

    def by_processor(self) -> dict[str, float]:
        """Rows a second of processor time."""
        return {name: self.rows / statistics.median(rounds) for name, rounds in self.processor.items()}

    def row(self, titles: Sequence[str], libraries: Sequence[str], bar: float | None) -> tuple[str, bool]:
        """A row of the table, and whether the ratio by the clock meets the bar."""
        clock, processor = self.by_clock(), self.by_processor()
        cells = [f"{clock[n]:,.0f} ({processor[n]:,.0f})" if n in clock else "-" for n in (OURS, *libraries)]
        ratio, by_processor = ratio_to_best(clock), ratio_to_best(processor)
        met = bar is None or (ratio is not None and ratio[1] >= bar)
        verdict = "-" if bar is None else f"{bar:g}: {'met' if met else 'MISSED'}"
        shown = [f"{r[1]:.2f} ({r[0]})" if r else "-" for r in (ratio, by_processor)]
        return f"| {' | '.join([*titles, *cells, *shown, verdict])} |", met


def header(titles: Sequence[str], libraries: Sequence[str]) -> str:
    """The two lines above the rows."""
    columns = [*titles, OURS, *libraries, "ratio to the best", "by processor time", "bar"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def ratio_to_best(rates: Mapping[str, float]) -> tuple[str, float] | None:
    """The fastest peer and our rate over its; None without a peer."""
    peers = {name: rate for name, rate in rates.items() if name != OURS}
    if not peers:
        return None
    name = max(peers, key=lambda library: peers[library])
    return name, rates[OURS] / peers[name]


def quantile(seconds: Sequence[float], share: float) -> float:
    """The least value that so large a share of the values does not exceed."""
    return sorted(seconds)[max(0, math.ceil(share * len(seconds)) - 1)]
