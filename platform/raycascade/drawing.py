"""Tables and figures of the HTML pages: inline SVG, no script, nothing loaded from elsewhere. Every text is escaped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 270  # of a figure, in SVG units; about one CSS pixel each at two figures per row
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 14, 46  # margins of the plot inside the figure
MAX_POINTS = 120  # longer curves are drawn as means of consecutive points, to keep the page small
NUM_STYLES = 9
BAR, BAR_GAP, GROUP_GAP = 15, 3, 12
NONE = "—"


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


def section(title: str, text: str, body: str) -> str:
    """A part of the page: title, text and body are HTML."""
    lead = f"<p>{text}</p>" if text else ""
    return f"<section><h2>{title}</h2>{lead}{body}</section>\n"


def beside(*parts: str) -> str:
    """Parts in a row where there is room, else below one another."""
    return f"<div class='row'>{''.join(parts)}</div>"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows; the caption is for screen readers."""
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in columns)
    body = ""
    for name, *cells in rows:
        body += f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    return (f"<div class='scroll'><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>")


def figure(title: str, description: str, chart: str, keys: Sequence[str]) -> str:
    """A chart with its title, its figures in words (for screen readers) and the names of its styles from 0 on."""
    legend = "".join(f"<li><svg class='key' viewBox='0 0 26 8' aria-hidden='true'><path class='line s{i % NUM_STYLES}' "
                     f"d='M1 4H25'/></svg>{escape(key)}</li>" for i, key in enumerate(keys))
    legend = f"<ul class='legend'>{legend}</ul>" if legend else ""
    chart = chart.replace("<!--alt-->", f"<title>{escape(title)}</title><desc>{escape(description)}</desc>")
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}{legend}</figure>"


@dataclass(frozen=True)
class Frame:
    """From data to places in the figure."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """From the left edge."""
        return LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From the upper edge."""
        return HEIGHT - BOTTOM - (value - self.y_low) / ((self.y_high - self.y_low) or 1) * (HEIGHT - TOP - BOTTOM)


def plot(series: Mapping[str, Points], *, slots: Sequence[tuple[str, str]] = (), x_title: str = "", y_title: str = "",
          x_range: tuple[float, float] | None = None, y_range: tuple[float, float] | None = None,
          y_percent: bool = False, extra: str = "") -> str:
    """Lines over numbers, or over named `slots` (two lines of text each) at 0, 1, 2 ..."""
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    x_low, x_high = slot_range(len(slots)) if slots else x_range or (min(xs), max(xs))
    y_ticks = _ticks(*y_range) if y_range else _ticks(min(ys), max(ys), outward=True)
    frame = Frame(x_low, x_high, *(y_range or (y_ticks[0], y_ticks[-1])))
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


def slot_range(num_slots: int) -> tuple[float, float]:
    """The x range of a plot over so many named slots."""
    return -0.4, num_slots - 0.6


def _line(points: Points, style: int, frame: Frame) -> str:
    places = [(f"{frame.x(x):.1f}", f"{frame.y(y):.1f}") for x, y in points]
    path = f"<path class='line s{style % NUM_STYLES}' d='M{'L'.join(' '.join(place) for place in places)}'/>"
    dots = "".join(f"<circle class='dot s{style % NUM_STYLES}' cx='{x}' cy='{y}' r='3.5'/>" for x, y in places)
    return path + (dots if len(places) <= 20 else "")


def bars(groups: Sequence[tuple[str, Sequence[tuple[int, float, str]]]]) -> str:
    """Horizontal bars in named groups; a bar is its style, its length from 0 and the text at its end."""
    top = max((length for _, bars in groups for _, length, _ in bars), default=0.0) or 1.0
    left, y, ink = 150, TOP, []
    for name, bars in groups:
        middle = y + (len(bars) * (BAR + BAR_GAP) - BAR_GAP) / 2
        ink.append(f"<text class='end' x='{left - 8}' y='{middle + 4:.1f}'>{escape(_short(name, 3))}</text>")
        for style, length, text in bars:
            width = max(1.0, (WIDTH - left - 70) * length / top)
            ink.append(f"<rect class='bar s{style % NUM_STYLES}' x='{left}' y='{y}' width='{width:.1f}' "
                       f"height='{BAR}' rx='2'/>"
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


def thin(points: Points) -> Points:
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
--c0:#0060a8;--c1:#c2570c;--c2:#00805f;--c3:#a3478a;--c4:#8a6d00;--c5:#56616e;
--c6:#b3261e;--c7:#4b55c4;--c8:#4d7c0f}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e7eaee;--soft:#9aa4b0;--line:#2c323a;--panel:#1c2026;
--c0:#5eb1f2;--c1:#f29a52;--c2:#3fcf9f;--c3:#e08cc8;--c4:#dcc04e;--c5:#a3adb9;
--c6:#ff8a80;--c7:#a5adff;--c8:#a3d65c}}
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
.line.s5{stroke:var(--c5);stroke-dasharray:1 2}.line.s6{stroke:var(--c6)}
.line.s7{stroke:var(--c7);stroke-dasharray:7 3}.line.s8{stroke:var(--c8);stroke-dasharray:2 3}
.dot.s0,.bar.s0{fill:var(--c0)}.dot.s1,.bar.s1{fill:var(--c1)}.dot.s2,.bar.s2{fill:var(--c2)}
.dot.s3,.bar.s3{fill:var(--c3)}.dot.s4,.bar.s4{fill:var(--c4)}.dot.s5,.bar.s5{fill:var(--c5)}
.dot.s6,.bar.s6{fill:var(--c6)}.dot.s7,.bar.s7{fill:var(--c7)}.dot.s8,.bar.s8{fill:var(--c8)}
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
