"""What a load under faults comes to: lines of JSON, and tables of a page in Markdown."""

import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _serve_load import Failure, Tally

SHOWN = 5  # of what went wrong
HEADER = ("| set-up | done (median) | requests (a second) | p50 / p99, ms | failed | wrong | degraded "
          "| without history | excused | bar |\n|---|---|---|---|---|---|---|---|---|---|")


@dataclass(frozen=True)
class Outcome:
    """Of one set-up. `failed`: requests without the answer that they should have had, without those that are `excused`;
    `done`: what was done to the server, `seconds`: how long each time took."""

    part: str
    set_up: str
    rate: float
    tally: Tally
    failed: list[Failure]
    wrong: list[str]
    done: dict[str, int]
    seconds: dict[str, list[float]]
    excused: int

    def line(self) -> dict[str, Any]:
        """As one line of JSON."""
        tally = self.tally
        return {
            "part": self.part, "set_up": self.set_up, "met": not self.failed and not self.wrong,
            "rate": round(self.rate, 1), "done": self.done, "seconds": self.seconds, "sent": tally.sent,
            "held_back": tally.held_back, "failed": len(self.failed), "wrong": len(self.wrong),
            "excused": self.excused, "statuses": dict(tally.statuses), "degraded": dict(tally.degraded),
            "unheard": tally.unheard, "versions": len(tally.versions), "p50_ms": round(tally.percentile_ms(0.5), 1),
            "p99_ms": round(tally.percentile_ms(0.99), 1), "first_failures": [str(one) for one in self.failed[:SHOWN]],
            "first_wrong": self.wrong[:SHOWN]}


def row(line: dict[str, Any]) -> str:
    """A line of JSON as a row of the table."""
    done = ", ".join(f"{count} {name}" + (f" ({statistics.median(line['seconds'][name]):.0f} s)"
                                          if line["seconds"].get(name) else "") for name, count in line["done"].items())
    degraded = ", ".join(f"{count} {name}" for name, count in sorted(line["degraded"].items())) or "0"
    cells = [line["set_up"], done, f"{line['sent']:,} ({line['rate']:.0f})",
             f"{line['p50_ms']:.0f} / {line['p99_ms']:.0f}", line["failed"], line["wrong"], degraded, line["unheard"],
             line["excused"], "met" if line["met"] else "MISSED"]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def finish(
    lines: list[dict[str, Any]], *, out: str, table: str, header: str = HEADER,
    as_row: Callable[[dict[str, Any]], str] = row,
) -> int:
    """Prints lines of JSON, adds them to a file, writes the tables of their parts into a page; the exit status."""
    for line in lines:
        sys.stdout.write(json.dumps(line) + "\n")
    if out:
        with open(out, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    for part in dict.fromkeys(line["part"] for line in lines):
        text = "\n".join([header, *(as_row(line) for line in lines if line["part"] == part)])
        sys.stdout.write(f"\n{text}\n")
        if table:
            write_part(Path(table), part, text)
    return 0 if all(line["met"] for line in lines) else 1


def write_part(page: Path, part: str, text: str) -> None:
    """Replaces what stands between the marks of a part; the page must have them."""
    marks = re.compile(rf"(<!-- {part}: begin -->\n).*?(<!-- {part}: end -->)", re.DOTALL)
    old = page.read_text()
    assert marks.search(old), f"{page} has no marks of {part}"
    page.write_text(marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", old))
