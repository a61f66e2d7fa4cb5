"""A comparison as one HTML file with its figure inside (inline SVG), as CSV, and as rows for a terminal."""

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from raycascade import drawing
from raycascade.drawing import NONE, STYLE, number

WIDTH, LEFT, RIGHT, ROW, TOP = 660, 150, 96, 34, 12  # of the figure, in SVG units; a row per objective
Sheet = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """The tables of a comparison: what it is judged by, what the runs cost, and all metrics."""
    metric, objectives, tests = result["metric"], result["objectives"], result["tests"]
    judged, cost = [], []
    for label in _ranked(result):
        found, test = objectives[label], tests.get(label)
        by = test["metrics"][metric] if test else {"difference": None, "t": None, "p": None}
        difference = NONE if by["difference"] is None else f"{by['difference']:+.4f}"
        judged.append([label, spread(found["metrics"][metric]), str(len(found["seeds"])), difference,
                       test["against"] if test else NONE, number(by["t"]), p_value(by)])
        cost.append([label, f"{found['seconds']:,.1f}", f"{found['rows_per_s']:,.0f}", f"{found['peak_gb']:.2f}",
                     f"{found['gpu_peak_gb']:.2f}" if "gpu_peak_gb" in found else NONE])
    names = list(dict.fromkeys(name for found in objectives.values() for name in found["metrics"]))
    rows = [[name, *(spread(found["metrics"].get(name)) for found in objectives.values())] for name in names]
    return [(metric + _last_day(result), ["objective", "mean ± std", "seeds", "difference", "from", "t", "p"], judged),
            ("Cost of a run", ["objective", "seconds", "rows/s", "peak GB", "GPU GB"], cost),
            ("All metrics" + _last_day(result), ["metric", *objectives], rows)]


def brief_sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """The first two, as narrow as a terminal; everything stands in the page and in the CSV."""
    (title, columns, judged), cost, _ = sheets(result)
    kept = [i for i, column in enumerate(columns) if column not in ("seeds", "t")]
    narrow = [[row[i] for i in kept] for row in (columns, *judged)]
    return [(title, narrow[0], narrow[1:]), cost]


def spread(found: Mapping[str, Any] | None) -> str:
    """Mean and sample standard deviation."""
    if found is None:
        return NONE
    return number(found["mean"]) + (f" ± {found['std']:.4f}" if found["std"] is not None else "")


def p_value(test: Mapping[str, Any]) -> str:
    """p with a star where it is below 0.05; a dash where there is none."""
    if test["p"] is None:
        return NONE
    return (f"{test['p']:.4f}" if test["p"] >= 0.0001 else f"{test['p']:.1e}") + " *" * test["significant"]


def csv_of(result: Mapping[str, Any]) -> str:
    """One line per objective and metric, the values by seed at its end."""
    seeds = sorted({seed for found in result["objectives"].values() for seed in found["seeds"]})
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["objective", "metric", "mean", "std", "against", "difference", "t", "p", "seconds", "rows_per_s",
                    "peak_gb", *(f"seed_{seed}" for seed in seeds)])
    for label, found in result["objectives"].items():
        test = result["tests"].get(label, {"against": "", "metrics": {}})
        for name, figures in found["metrics"].items():
            by = test["metrics"].get(name, {})
            values = dict(zip(found["seeds"], figures["values"], strict=True))
            lines.writerow([label, name, figures["mean"], figures["std"], test["against"], by.get("difference"),
                            by.get("t"), by.get("p"), found["seconds"], found["rows_per_s"], found["peak_gb"],
                            *(values.get(seed) for seed in seeds)])
    return text.getvalue()


def render_comparison(result: Mapping[str, Any]) -> str:
    """The whole page; the same result gives the same bytes."""
    metric, objectives = result["metric"], result["objectives"]
    title = f"{len(objectives)} objectives by {metric}"
    lead = (f"Best: {result['best']}, {spread(objectives[result['best']]['metrics'][metric])} "
            "(mean and sample standard deviation over seeds).")
    figure = _days_figure(result) if result["streaming"] else _dots_figure(result)
    text = ("Day after day: trained on all days before, measured before it is trained on." if result["streaming"] else
            "A dot per seed; the bar is one sample standard deviation to each side of the mean.")
    body = drawing.section("Objectives", text, drawing.beside(figure))
    texts = ("Two-sided t-test, paired by seed; a star: p below 0.05.",
             "Seconds of training, candidates trained on per second, and the most memory a run's process held, in "
             "units of 10^9 bytes.", "")
    for (caption, columns, rows), note in zip(sheets(result), texts, strict=True):
        body += drawing.section(escape(caption), note, drawing.table(caption, columns, rows))
    facts = [["shards", result["shards"]], ["raycascade", result["raycascade"]]]
    facts += [[f"objective {label}", ", ".join(f"{k}: {v}" for k, v in spec.items())]
              for label, spec in result["loss"].items()]
    facts += [[f"failed: {name}", problem] for name, problem in result["failed"].items()]
    table = drawing.table("Facts", ["Fact", "Value"], facts)
    body += drawing.section("The comparison", "", f"<div class='narrow'>{table}</div>")
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p></header>\n<main>\n{body}</main>\n"
        "</body></html>\n"
    )


def _dots_figure(result: Mapping[str, Any]) -> str:
    """A row per objective from best to worst: every seed, the mean and one standard deviation around it."""
    metric = result["metric"]
    found = {label: result["objectives"][label]["metrics"][metric] for label in _ranked(result)}
    spans = [(f["mean"] - (f["std"] or 0), f["mean"] + (f["std"] or 0)) for f in found.values()]
    edges = [edge for span in spans for edge in span] + [v for f in found.values() for v in f["values"]]
    low, high = min(edges), max(edges)
    wide = (high - low) or 1.0
    height = TOP + ROW * len(found) + 30

    def x(value: float) -> float:
        return LEFT + (value - low) / wide * (WIDTH - LEFT - RIGHT)

    ink = ""
    for value in dict.fromkeys((low, (low + high) / 2, high)):
        ink += (f"<path class='grid' d='M{x(value):.1f} {TOP}V{height - 26}'/>"
                f"<text class='mid soft' x='{x(value):.1f}' y='{height - 8}'>{number(value)}</text>")
    for row, ((label, figures), (left, right)) in enumerate(zip(found.items(), spans, strict=True)):
        y, style = TOP + ROW * (row + 0.5), 1 if label == result["best"] else 0
        name = label if len(label) <= 20 else label[:19] + "…"
        ink += (f"<text class='end' x='{LEFT - 12}' y='{y + 4}'>{escape(name)}</text>"
                f"<path class='axis' d='M{x(left):.1f} {y}H{x(right):.1f}'/>"
                + "".join(f"<circle class='dot s{style}' cx='{x(v):.1f}' cy='{y}' r='4'/>" for v in figures["values"])
                + f"<path class='axis' d='M{x(figures['mean']):.1f} {y - 9}V{y + 9}'/>"
                f"<text x='{WIDTH - RIGHT + 14}' y='{y + 4}'>{number(figures['mean'])}</text>")
    chart = f"<svg role='img' viewBox='0 0 {WIDTH} {height}'><!--alt-->{ink}</svg>"
    said = ", ".join(f"{label} {spread(figures)}" for label, figures in found.items())
    return drawing.figure(metric, f"{metric}: {said}.", chart, [])


def _days_figure(result: Mapping[str, Any]) -> str:
    """A line per objective over the tested days, the mean over its seeds."""
    metric, objectives = result["metric"], result["objectives"]
    curves = {label: [(float(i), point["metrics"][metric]["mean"]) for i, point in enumerate(objectives[label]["curve"])
                      if metric in point["metrics"]] for label in _ranked(result)}
    days = [point["day"] for point in next(iter(objectives.values()))["curve"]]
    step = -(-len(days) // 12)
    slots = [(day[8:] if i % step == 0 else "", "") for i, day in enumerate(days)]  # a slot may be as wide as 2 digits
    said = ", ".join(f"{label} {number(points[-1][1])}" for label, points in curves.items())
    chart = drawing.plot(curves, slots=slots, x_title=f"tested day, {days[0]} to {days[-1]}")
    return drawing.figure(f"{metric} by day", f"{metric} on the last day, {days[-1]}: {said}.", chart, list(curves))


def _ranked(result: Mapping[str, Any]) -> list[str]:
    """From best to worst; what is best stands first, so the order of the means follows from it."""
    objectives, metric = result["objectives"], result["metric"]
    means = {label: found["metrics"][metric]["mean"] for label, found in objectives.items()}
    down = means[result["best"]] >= max(means.values())
    return sorted(means, key=lambda label: (label != result["best"], -means[label] if down else means[label]))


def _last_day(result: Mapping[str, Any]) -> str:
    if not result["streaming"]:
        return ""
    last: Sequence[Mapping[str, Any]] = next(iter(result["objectives"].values()))["curve"]
    return f" on the last day, {last[-1]['day']}"
