"""The report of a run: one HTML file with its figures inside (inline SVG); no script, nothing loaded from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 270  # of a figure, in SVG units; about one CSS pixel each at two figures per row
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 14, 46  # margins of the plot inside the figure
MAX_POINTS = 120  # longer curves are drawn as means of consecutive points, to keep the page small
NUM_STYLES = 6
BAR, BAR_GAP, GROUP_GAP = 15, 3, 12
NONE = "—"


@dataclass(frozen=True)
class SurvivalPoint:
    """Share of the held-out positives (0 to 1) still alive after a stage of the whole-catalogue funnel."""

    stage: str
    keep: int
    share: float
    baselines: Mapping[str, float] = field(default_factory=dict)  # share of "popularity", "random" at the same width


@dataclass(frozen=True)
class StageResult:
    """One stage of the funnel. None: not measured, or there is no previous stage."""

    stage: str
    keep: int
    recall: float | None = None
    previous: float | None = None  # recall of the previous stage's order cut to the same width
    lost: int | None = None  # positives that reached this stage and were dropped by it


@dataclass(frozen=True)
class CalibrationBin:
    """Candidates of similar predicted probability: the means of prediction and label, and how many they are."""

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class Report:
    """What the page shows, in this order; an empty part is left out."""

    title: str
    summary: str = ""  # one sentence under the title
    headline: Sequence[str] = ()  # metrics shown large at the top
    survival: Sequence[SurvivalPoint] = ()
    stages: Sequence[StageResult] = ()
    kept_to_the_end: int | None = None  # positives that no stage dropped; beside the stages' `lost`
    calibration: Mapping[str, Sequence[CalibrationBin]] = field(default_factory=dict)  # by task or stage
    curves: Mapping[str, Points] = field(default_factory=dict)  # part of the loss -> (step, value)
    validation: Mapping[str, Points] = field(default_factory=dict)  # name -> (epoch, value)
    metrics: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # baseline -> metric -> value
    facts: Mapping[str, str] = field(default_factory=dict)  # rows, seconds, versions ...
    config_yaml: str = ""


def render_report(content: Report) -> str:
    """The whole page; the same content gives the same bytes, and every text in it is escaped."""
    sections = (_survival, _stages, _calibration, _training, _metrics, _facts, _config)
    title = escape(content.title)
    summary = f"<p class='lead'>{escape(content.summary)}</p>" if content.summary else ""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<header><h1>{title}</h1>{summary}{_cards(content)}</header>\n<main>\n"
        + "".join(section(content) for section in sections) + "</main>\n</body></html>\n"
    )


def number(value: float | None) -> str:
    """A figure for a table: four decimals, four digits where that hides it, grouped digits if whole; none: a dash."""
    if value is None:
        return NONE
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share from 0 to 1 in per cent, three digits."""
    return f"{100 * share:.3g}%" if share < 0.9995 else "100%"


def _cards(content: Report) -> str:
    cards = []
    for name in (name for name in content.headline if name in content.metrics):
        beside = "".join(f"<dd class='beside'>{escape(base)} {number(values[name])}</dd>"
                         for base, values in content.baselines.items() if name in values)
        cards.append(f"<div><dt>{escape(name)}</dt><dd>{number(content.metrics[name])}</dd>{beside}</div>")
    return f"<dl class='cards'>{''.join(cards)}</dl>" if cards else ""


def _survival(content: Report) -> str:
    points = content.survival
    if not points:
        return ""
    names = list(dict.fromkeys(name for point in points for name in point.baselines))
    series = {"this cascade": [(0.0, 1.0)] + [(i, p.share) for i, p in enumerate(points, 1)]}
    for name in names:
        series[name] = [(0.0, 1.0)] + [(i, p.baselines[name]) for i, p in enumerate(points, 1) if name in p.baselines]
    slots = [("catalogue", "all items"), *((point.stage, f"keeps {point.keep:,}") for point in points)]
    frame = _Frame(*_slot_range(len(slots)), 0, 1)
    labels = "".join(f"<text class='mid strong' x='{frame.x(i) + 12:.1f}' y='{frame.y(p.share) - 9:.1f}'>"
                     f"{percent(p.share)}</text>" for i, p in enumerate(points, 1))
    chart = _plot(series, slots=slots, y_range=(0, 1), y_percent=True, extra=labels)
    said = ", ".join(f"{point.stage} {percent(point.share)}" for point in points)
    figure = _figure("Positives alive after each stage", f"Share of held-out positives: {said}.", chart, list(series))
    rows = [[p.stage, number(p.keep), percent(p.share)]
            + [percent(p.baselines[name]) if name in p.baselines else NONE for name in names] for p in points]
    table = _table("Survival from the catalogue", ["Stage", "Keeps", "This cascade", *names], rows)
    text = ("Share of the held-out positives that are still in the list after each stage, starting from the whole "
            "catalogue." + " The baselines keep as many items." * bool(names))
    return _section("Survival through the funnel", text, _beside(figure, table))


def _stages(content: Report) -> str:
    if not content.stages:
        return ""
    rows = []
    for s in content.stages:
        gain = NONE if s.recall is None or s.previous is None else f"{s.recall - s.previous:+.4f}"
        rows.append([s.stage, number(s.keep), number(s.recall), number(s.previous), gain, number(s.lost)])
    columns = ["Stage", "Keeps", "Recall", "Previous stage, same width", "Gain", "Positives lost"]
    figures = _beside(_recall_figure(content.stages), _lost_figure(content))
    text = "A stage earns its place if it beats the order of the stage before it, cut to the same width."
    return _section("Stage by stage", text, figures + _table("Stage by stage", columns, rows))


def _recall_figure(stages: Sequence[StageResult]) -> str:
    groups = [(s.stage, [(i, v, number(v)) for i, v in enumerate((s.recall, s.previous)) if v is not None])
              for s in stages if s.recall is not None]
    if not groups:
        return ""
    said = ", ".join(f"{stage} {bars[0][2]}" for stage, bars in groups)
    keys = ["this stage", "previous stage, same width"] if any(len(bars) > 1 for _, bars in groups) else []
    return _figure("Recall of each stage", f"Recall on logged lists: {said}.", _bars(groups), keys)


def _lost_figure(content: Report) -> str:
    lost = [(f"lost at {s.stage}", 1, s.lost) for s in content.stages]
    counts = [*lost, ("kept to the end", 0, content.kept_to_the_end)]
    groups = [(name, [(style, count, number(count))]) for name, style, count in counts if count is not None]
    said = ", ".join(f"{name} {bars[0][2]}" for name, bars in groups)
    return _figure("Where positives are lost", f"Positives {said}.", _bars(groups), []) if groups else ""


def _calibration(content: Report) -> str:
    figures, tables = "", ""
    for name, bins in ((name, bins) for name, bins in content.calibration.items() if bins):
        top = max(max(b.predicted, b.observed) for b in bins) or 1.0
        most = max(b.count for b in bins) or 1
        frame = _Frame(0, top, 0, top)
        ink = "".join(f"<path class='count' d='M{frame.x(b.predicted):.1f} {frame.y(0)}"
                      f"V{frame.y(top * b.count / most / 4):.1f}'/>" for b in bins)
        ink += f"<path class='ideal' d='M{frame.x(0)} {frame.y(0)}L{frame.x(top)} {frame.y(top)}'/>"
        chart = _plot({name: [(b.predicted, b.observed) for b in bins]}, x_range=(0, top), y_range=(0, top),
                      x_title="predicted", y_title="observed", extra=ink)
        said = "; ".join(f"{number(b.predicted)} predicted, {number(b.observed)} observed" for b in bins)
        figures += _figure(f"Reliability: {name}", f"Mean label by predicted probability: {said}.", chart, [])
        rows = [[number(b.predicted), number(b.observed), number(b.count)] for b in bins]
        table = _table(f"Bins of {name}", ["Predicted", "Observed", "Candidates"], rows)
        tables += f"<details><summary>Bins of {escape(name)}</summary>{table}</details>"
    text = ("Predicted probability against what happened: the closer to the diagonal, the better. The bars show how "
            "many candidates a bin holds.")
    return _section("Calibration", text, _beside(figures) + tables) if figures else ""


def _training(content: Report) -> str:
    figures, tables = "", ""
    parts = ("Training loss", "step", content.curves), ("Validation", "epoch", content.validation)
    for title, unit, given in parts:
        finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in given.items()}
        curves = {name: points for name, points in finite.items() if points}
        if not curves:
            continue
        said = ", ".join(f"{name} from {number(p[0][1])} to {number(p[-1][1])}" for name, p in curves.items())
        chart = _plot({name: _thin(points) for name, points in curves.items()}, x_title=unit)
        figures += _figure(f"{title} by {unit}", f"{title}: {said}.", chart, list(curves))
        rows = [[name, *(number(y) for y in (p[0][1], p[-1][1], min(y for _, y in p)))] for name, p in curves.items()]
        tables += _table(f"{title} by {unit}", [title, "First", "Last", "Lowest"], rows)
    return _section("Training", "", _beside(figures) + _beside(tables)) if figures else ""


def _metrics(content: Report) -> str:
    rows = [[name, number(value), *(number(base.get(name)) for base in content.baselines.values())]
            for name, value in content.metrics.items()]
    table = _table("All metrics with their baselines", ["Metric", "This run", *content.baselines], rows)
    return _section("All metrics", "", table) if rows else ""


def _facts(content: Report) -> str:
    rows = [[name, value] for name, value in content.facts.items()]
    table = _table("Facts of the run", ["Fact", "Value"], rows)
    return _section("The run", "", f"<div class='narrow'>{table}</div>") if rows else ""


def _config(content: Report) -> str:
    text = escape(content.config_yaml.strip())
    return _section("Config", "Resolved: with every default.", f"<pre tabindex='0'>{text}</pre>") if text else ""


def _section(title: str, text: str, body: str) -> str:
    lead = f"<p>{text}</p>" if text else ""
    return f"<section><h2>{title}</h2>{lead}{body}</section>\n"


def _beside(*parts: str) -> str:
    """Parts in a row where there is room, else below one another."""
    return f"<div class='row'>{''.join(parts)}</div>"


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in columns)
    body = ""
    for name, *cells in rows:
        body += f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    return (f"<div class='scroll'><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>")


def _figure(title: str, description: str, chart: str, keys: Sequence[str]) -> str:
    legend = "".join(f"<li><svg class='key' viewBox='0 0 26 8' aria-hidden='true'><path class='line s{i % NUM_STYLES}' "
                     f"d='M1 4H25'/></svg>{escape(key)}</li>" for i, key in enumerate(keys))
    legend = f"<ul class='legend'>{legend}</ul>" if legend else ""
    chart = chart.replace("<!--alt-->", f"<title>{escape(title)}</title><desc>{escape(description)}</desc>")
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}{legend}</figure>"


@dataclass(frozen=True)
class _Frame:
    """From data to places in the figure."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / ((self.y_high - self.y_low) or 1) * (HEIGHT - TOP - BOTTOM)


def _plot(series: Mapping[str, Points], *, slots: Sequence[tuple[str, str]] = (), x_title: str = "", y_title: str = "",
          x_range: tuple[float, float] | None = None, y_range: tuple[float, float] | None = None,
          y_percent: bool = False, extra: str = "") -> str:
    """Lines over numbers, or over named `slots` (two lines of text each) at 0, 1, 2 ..."""
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    x_low, x_high = _slot_range(len(slots)) if slots else x_range or (min(xs), max(xs))
    y_ticks = _ticks(*y_range) if y_range else _ticks(min(ys), max(ys), outward=True)
    frame = _Frame(x_low, x_high, *(y_range or (y_ticks[0], y_ticks[-1])))
    ink = ""
    for tick in y_ticks:
        y, text = frame.y(tick), percent(tick) if y_percent else f"{tick:g}"
        ink += (f"<path class='grid' d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}'/>"
                f"<text class='end' x='{LEFT - 6}' y='{y + 4:.1f}'>{text}</text>")
    places = [(i, slot) for i, slot in enumerate(slots)] or [(x, (f"{x:g}", "")) for x in _ticks(x_low, x_high)]
    for place, (text, below) in places:
        x, y = frame.x(place), HEIGHT - BOTTOM + 18
        ink += (f"<text class='mid' x='{x:.1f}' y='{y}'>{escape(_short(text, len(places)))}</text>"
                f"<text class='mid soft' x='{x:.1f}' y='{y + 15}'>{escape(_short(below, len(places)))}</text>")
    ink += f"<path class='axis' d='M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}'/>{extra}"
    ink += "".join(_line(points, i, frame) for i, points in reversed(list(enumerate(series.values()))))  # first on top
    ink += (f"<text class='mid soft' x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 8}'>{escape(x_title)}</text>"
            f"<text class='soft' x='{LEFT + 6}' y='{TOP + 12}'>{escape(y_title)}</text>")
    return _svg(HEIGHT, ink)


def _slot_range(num_slots: int) -> tuple[float, float]:
    return -0.4, num_slots - 0.6


def _line(points: Points, style: int, frame: _Frame) -> str:
    places = [(f"{frame.x(x):.1f}", f"{frame.y(y):.1f}") for x, y in points]
    path = f"<path class='line s{style % NUM_STYLES}' d='M{'L'.join(' '.join(place) for place in places)}'/>"
    dots = "".join(f"<circle class='dot s{style % NUM_STYLES}' cx='{x}' cy='{y}' r='3.5'/>" for x, y in places)
    return path + (dots if len(places) <= 20 else "")


def _bars(groups: Sequence[tuple[str, Sequence[tuple[int, float, str]]]]) -> str:
    """Horizontal bars in named groups; a bar is its style, its length from 0 and the text at its end."""
    top = max((length for _, bars in groups for _, length, _ in bars), default=0.0) or 1.0
    left, y, ink = 150, TOP, []
    for name, bars in groups:
        middle = y + (len(bars) * (BAR + BAR_GAP) - BAR_GAP) / 2
        ink.append(f"<text class='end' x='{left - 8}' y='{middle + 4:.1f}'>{escape(_short(name, 3))}</text>")
        for style, length, text in bars:
            width = max(1.0, (WIDTH - left - 70) * length / top)
            ink.append(f"<rect class='bar s{style}' x='{left}' y='{y}' width='{width:.1f}' height='{BAR}' rx='2'/>"
                       f"<text x='{left + width + 6:.1f}' y='{y + BAR - 3}'>{escape(text)}</text>")
            y += BAR + BAR_GAP
        y += GROUP_GAP
    ink.append(f"<path class='axis' d='M{left} {TOP - 6}V{y - 4}'/>")
    return _svg(y, "".join(ink))


def _svg(height: float, ink: str) -> str:
    return f"<svg role='img' viewBox='0 0 {WIDTH} {height}'><!--alt-->{ink}</svg>"


def _short(text: str, slots: int) -> str:
    """As much of a text as fits into one of so many slots."""
    room = max(4, int((WIDTH - LEFT - RIGHT) / slots / 7))
    return text if len(text) <= room else text[:room - 1] + "…"


def _thin(points: Points) -> Points:
    """At most MAX_POINTS points: the means of consecutive ones."""
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [points[start:start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _ticks(low: float, high: float, *, outward: bool = False) -> list[float]:
    """About five round numbers inside a range; `outward`: with the next ones around it."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if outward:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.12g}") for i in range(first, last + 1)]


STYLE = """
:root{--paper:#fff;--ink:#1b1f24;--soft:#5d6672;--line:#e3e6ea;--panel:#f6f7f9;
--c0:#0060a8;--c1:#c2570c;--c2:#00805f;--c3:#a3478a;--c4:#8a6d00;--c5:#56616e}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e7eaee;--soft:#9aa4b0;--line:#2c323a;--panel:#1c2026;
--c0:#5eb1f2;--c1:#f29a52;--c2:#3fcf9f;--c3:#e08cc8;--c4:#dcc04e;--c5:#a3adb9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1000px;padding:2rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .25rem}
section{margin-top:2.5rem;padding-top:1.5rem;border-top:1px solid var(--line)}
section>p,.lead{margin:.25rem 0 1rem;color:var(--soft);max-width:46rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:.75rem;margin:1.5rem 0 0}
.cards div{background:var(--panel);border-radius:8px;padding:.8rem 1rem}
.cards dt{color:var(--soft);font-size:.875rem;overflow-wrap:anywhere}
.cards dd{margin:0;font-size:1.7rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.cards .beside{font-size:.8125rem;font-weight:400;color:var(--soft)}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 1.5rem;align-items:start}
figure{margin:0 0 1rem;background:var(--panel);border-radius:8px;padding:1rem;min-width:0}
.row>figure:only-child{max-width:660px}.narrow{max-width:36rem}
figcaption{font-weight:600;margin-bottom:.25rem}
figure>svg{display:block;width:100%;height:auto}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:.5rem 0 0;padding:0;font-size:.875rem}
.key{width:26px;height:8px;margin-right:.4rem;vertical-align:middle}
svg text{font-size:12.5px;fill:var(--ink)}svg .soft{fill:var(--soft)}svg .strong{font-weight:600}
.mid{text-anchor:middle}.end{text-anchor:end}
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--soft);fill:none}.count{stroke:var(--soft);stroke-width:10;opacity:.25}
.ideal{fill:none;stroke:var(--soft);stroke-dasharray:4 4}
.line{fill:none;stroke-width:2.25;stroke-linejoin:round}.dot{stroke:var(--panel)}
.line.s0{stroke:var(--c0)}.line.s1{stroke:var(--c1);stroke-dasharray:7 3}.line.s2{stroke:var(--c2);stroke-dasharray:2 3}
.line.s3{stroke:var(--c3);stroke-dasharray:10 3 2 3}.line.s4{stroke:var(--c4);stroke-dasharray:4 2}
.line.s5{stroke:var(--c5);stroke-dasharray:1 2}
.dot.s0,.bar.s0{fill:var(--c0)}.dot.s1,.bar.s1{fill:var(--c1)}.dot.s2,.bar.s2{fill:var(--c2)}
.dot.s3,.bar.s3{fill:var(--c3)}.dot.s4,.bar.s4{fill:var(--c4)}.dot.s5,.bar.s5{fill:var(--c5)}
.scroll{overflow-x:auto;margin:.5rem 0 1rem;min-width:0}
table{border-collapse:collapse;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:.4rem .75rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child{text-align:left;padding-left:0}tbody th{font-weight:400}thead th{font-weight:600;color:var(--soft)}
.narrow td{overflow-wrap:anywhere}
details{margin:.5rem 0}summary{cursor:pointer}
pre{background:var(--panel);border-radius:8px;padding:1rem;overflow-x:auto;
font:.8125rem/1.5 ui-monospace,"Liberation Mono",monospace}
@media print{body{max-width:none}section{break-inside:avoid}}
"""
