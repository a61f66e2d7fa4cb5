"""What a run of `serve_speed.py` says: the bars, and the tables of the page."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _rates import quantile

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
ALONE, IN_PROCESS, AGAIN = "in process, cascade alone", "in process", "in process, beside composed"
FUSED, COMPOSED, LONG = "fused", "composed", "fused, 1,000 candidates, one core"
BY_HAND, BY_HAND_2 = "by hand", "by hand, two workers"
MOST_RATIO, MOST_ABOVE_MS, LEAST_RATE, MOST_LONG_MS = 1.5, 8.0, 1.0, 100.0


@dataclass
class Clocked:
    """All rounds of one arm with so many clients (0: no server). `latency` in seconds; `processor` of the servers (in
    process: of the computation) and `client`: seconds of the processor in all."""

    arm: str
    clients: int
    latency: list[float]
    rates: list[float]  # requests a second of each round
    processor: float = 0.0
    client: float = 0.0

    @classmethod
    def empty(cls, arm: str, clients: int) -> "Clocked":
        return cls(arm, clients, [], [])

    def summary(self) -> dict[str, Any]:
        """Milliseconds, and requests a second: the median of the rounds."""
        count = max(1, len(self.latency))
        return {"arm": self.arm, "clients": self.clients, "requests": len(self.latency),
                **{f"p{round(100 * share)}": 1e3 * quantile(self.latency, share) for share in (0.5, 0.95, 0.99)},
                "rate": quantile(self.rates, 0.5), "processor": 1e3 * self.processor / count,
                "client": 1e3 * self.client / count}


@dataclass(frozen=True)
class Bar:
    """One promise: `found` must be at most `bar`, or at least it."""

    what: str
    found: float
    bar: float
    at_most: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.found <= self.bar if self.at_most else self.found >= self.bar

    @property
    def row(self) -> str:
        """Of the table."""
        limit = f"{'at most' if self.at_most else 'at least'} {self.bar:g}{self.unit}"
        return f"| {self.what} | {self.found:.2f}{self.unit} | {limit} | {'met' if self.met else '**missed**'} |"


def bars_of(rows: "list[dict[str, Any]]") -> list[Bar]:
    """The bars, from the summaries of all arms."""
    by = {(row["arm"], row["clients"]): row for row in rows}
    fused, alone = by[FUSED, 1]["p50"], by[IN_PROCESS, 0]["p50"]
    above = by[COMPOSED, 1]["p50"] - by[AGAIN, 0]["p50"]
    many = max(clients for _, clients in by)
    return [
        Bar("fused, p50 / in process, p50", fused / alone, MOST_RATIO, at_most=True),
        Bar("composed, p50, above in process", above, MOST_ABOVE_MS, at_most=True, unit=" ms"),
        Bar(f"fused, requests/s with {many} clients / server by hand", by[FUSED, many]["rate"] / by[BY_HAND, many][
            "rate"], LEAST_RATE, at_most=False),
        Bar("ranking 1,000 candidates, p99", by[LONG, 1]["p99"], MOST_LONG_MS, at_most=True, unit=" ms"),
    ]


def other_ratios(rows: "list[dict[str, Any]]") -> list[str]:
    """Ratios without a bar."""
    by = {(row["arm"], row["clients"]): row for row in rows}
    many = max(clients for _, clients in by)
    rate = {arm: by[arm, many]["rate"] for arm in (FUSED, COMPOSED, BY_HAND, BY_HAND_2)}
    return [
        f"fused, p50 / in process without encoding the query and naming the items: "
        f"{by[FUSED, 1]['p50'] / by[ALONE, 0]['p50']:.2f}",
        f"fused, requests/s with {many} clients / server by hand in two workers: {rate[FUSED] / rate[BY_HAND_2]:.2f}",
        f"composed, requests/s with {many} clients / server by hand: {rate[COMPOSED] / rate[BY_HAND]:.2f}",
        f"fused, p50 / server by hand, p50, one client: {by[FUSED, 1]['p50'] / by[BY_HAND, 1]['p50']:.2f}",
    ]


def tables(line: Mapping[str, Any]) -> str:
    """Markdown of one run."""
    size, load = line["size"], line["load"]
    title = (f"`{line['command']}`: {size['items']:,} items, keeps {' / '.join(map(str, size['keeps'].values()))}, "
             f"{line['rounds']} rounds in turns, {line['cores']} cores, torch {line['torch']}, ray {line['ray']}; load "
             f"average {load[0]:.1f} before and {load[1]:.1f} after the run.")
    lines = [title, "", "| bar | found | asked | |", "|---|---|---|---|", *(Bar(**bar).row for bar in line["bars"]), "",
             "| | clients | p50, ms | p95, ms | p99, ms | requests/s | processor, ms a request | of the client, ms |",
             f"|{'---|' * 8}"]
    for row in line["rows"]:
        cells = [row["arm"], str(row["clients"] or "-"), *(f"{row[name]:.2f}" for name in ("p50", "p95", "p99")),
                 f"{row['rate']:,.0f}", f"{row['processor']:.2f}", f"{row['client']:.2f}" if row["clients"] else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {ratio}" for ratio in other_ratios(line["rows"]))])


def plain(bars: list[Bar]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(bar) for bar in bars]


def write_report(page: Path, line: Mapping[str, Any]) -> None:
    """Replaces what is between the markers of a page."""
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    section = f"{BEGIN}\n{tables(line)}\n{END}"
    page.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: section, text, flags=re.DOTALL))
