"""The report of a run: one HTML file with its figures inside (inline SVG); no script, nothing loaded from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from raycascade import drawing
from raycascade.drawing import NONE, STYLE, Points, number, percent
from raycascade.slices import FEWEST_POSITIVES, FEWEST_ROWS, METRICS, MOST_OF_TAIL, TOO_FEW, SliceFigures


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
class StageLosses:
    """What a stage does on logged lists, as shares (0 to 1) of the truth: how much entered it, how much it lost, how
    much of that later stages wanted (any of them, and each), and the share of its places that no later stage wants.
    The last stage has none after it."""

    stage: str
    quota: int
    entered: float
    lost: float
    wanted: float | None = None
    wanted_by: Mapping[str, float] = field(default_factory=dict)
    wasted: float | None = None


@dataclass(frozen=True)
class PredictionResult:
    """How a stage's score ("<stage>") or a task's logit ("<stage>/<task>") predicts a label, by name of the metric."""

    name: str
    num_rows: int  # candidates whose label is observed
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class CalibrationBin:
    """Candidates of similar predicted probability: the means of prediction and label, and how many they are."""

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class VariantResult:
    """A stage as it is served beside itself in float32, uncompiled. None: not defined on the requests of the guard."""

    stage: str
    served: str  # such as "int8" or "bf16, compiled"
    requests: int
    auc_fp32: float | None
    auc_change: float | None
    overlap: float | None  # share of the kept candidates that are the same
    non_finite: int


@dataclass(frozen=True)
class FeatureImportance:
    """What a column does in a stage of trees: mean gain of its splits, mean |SHAP value| in units of the logit."""

    feature: str
    gain: float
    shap: float


@dataclass(frozen=True)
class Report:
    """What the page shows, in this order; an empty part is left out."""

    title: str
    summary: str = ""  # one sentence under the title
    headline: Sequence[str] = ()  # metrics shown large at the top
    survival: Sequence[SurvivalPoint] = ()
    stages: Sequence[StageResult] = ()
    kept_to_the_end: int | None = None  # positives that no stage dropped; beside the stages' `lost`
    losses: Sequence[StageLosses] = ()
    predictions: Sequence[PredictionResult] = ()
    slices: Sequence[SliceFigures] = ()
    calibration: Mapping[str, Sequence[CalibrationBin]] = field(default_factory=dict)  # by task or stage
    importance: Mapping[str, Sequence[FeatureImportance]] = field(default_factory=dict)  # by stage or task, best first
    variants: Sequence[VariantResult] = ()
    curves: Mapping[str, Points] = field(default_factory=dict)  # part of the loss -> (step, value)
    validation: Mapping[str, Points] = field(default_factory=dict)  # name -> (epoch, value)
    metrics: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # baseline -> metric -> value
    facts: Mapping[str, str] = field(default_factory=dict)  # rows, seconds, versions ...
    config_yaml: str = ""


def render_report(content: Report) -> str:
    """The whole page; the same content gives the same bytes, and every text in it is escaped."""
    sections = (_survival, _stages, _losses, _predictions, _slices, _calibration, _importance, _variants, _training,
                _metrics, _facts, _config)
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
    frame = drawing.Frame(*drawing.slot_range(len(slots)), 0, 1)
    labels = "".join(f"<text class='mid strong' x='{frame.x(i) + 12:.1f}' y='{frame.y(p.share) - 9:.1f}'>"
                     f"{percent(p.share)}</text>" for i, p in enumerate(points, 1))
    chart = drawing.plot(series, slots=slots, y_range=(0, 1), y_percent=True, extra=labels)
    said = ", ".join(f"{point.stage} {percent(point.share)}" for point in points)
    figure = drawing.figure("Positives alive after each stage", f"Share of held-out positives: {said}.", chart,
                            list(series))
    rows = [[p.stage, number(p.keep), percent(p.share)]
            + [percent(p.baselines[name]) if name in p.baselines else NONE for name in names] for p in points]
    table = drawing.table("Survival from the catalogue", ["Stage", "Keeps", "This cascade", *names], rows)
    text = ("Share of the held-out positives that are still in the list after each stage, starting from the whole "
            "catalogue." + " The baselines keep as many items." * bool(names))
    return drawing.section("Survival through the funnel", text, drawing.beside(figure, table))


def _stages(content: Report) -> str:
    if not content.stages:
        return ""
    rows = []
    for s in content.stages:
        gain = NONE if s.recall is None or s.previous is None else f"{s.recall - s.previous:+.4f}"
        rows.append([s.stage, number(s.keep), number(s.recall), number(s.previous), gain, number(s.lost)])
    columns = ["Stage", "Keeps", "Recall", "Previous stage, same width", "Gain", "Positives lost"]
    figures = drawing.beside(_recall_figure(content.stages), _lost_figure(content))
    text = "A stage earns its place if it beats the order of the stage before it, cut to the same width."
    return drawing.section("Stage by stage", text, figures + drawing.table("Stage by stage", columns, rows))


def _recall_figure(stages: Sequence[StageResult]) -> str:
    groups = [(s.stage, [(i, v, number(v)) for i, v in enumerate((s.recall, s.previous)) if v is not None])
              for s in stages if s.recall is not None]
    if not groups:
        return ""
    said = ", ".join(f"{stage} {bars[0][2]}" for stage, bars in groups)
    keys = ["this stage", "previous stage, same width"] if any(len(bars) > 1 for _, bars in groups) else []
    return drawing.figure("Recall of each stage", f"Recall on logged lists: {said}.", drawing.bars(groups), keys)


def _lost_figure(content: Report) -> str:
    lost = [(f"lost at {s.stage}", 1, s.lost) for s in content.stages]
    counts = [*lost, ("kept to the end", 0, content.kept_to_the_end)]
    groups = [(name, [(style, count, number(count))]) for name, style, count in counts if count is not None]
    said = ", ".join(f"{name} {bars[0][2]}" for name, bars in groups)
    return drawing.figure("Where positives are lost", f"Positives {said}.", drawing.bars(groups), []) if groups else ""


def _losses(content: Report) -> str:
    if not content.losses:
        return ""
    later = list(dict.fromkeys(name for losses in content.losses for name in losses.wanted_by))
    keys = ["lost", *(f"of it wanted by {name}" for name in later)]
    groups, rows = [], []
    for s in content.losses:
        beside = [(i, s.wanted_by[name]) for i, name in enumerate(later, 1) if name in s.wanted_by]
        groups.append((f"lost at {s.stage}", [(i, share, percent(share)) for i, share in [(0, s.lost), *beside]]))
        shares = [s.entered, s.lost, s.wanted, *(s.wanted_by.get(name) for name in later), s.wasted]
        rows.append([s.stage, number(s.quota), *(NONE if share is None else percent(share) for share in shares)])
    said = "; ".join(f"{name} {', '.join(text for _, _, text in shares)}" for name, shares in groups)
    figure = drawing.figure("Truth lost at each stage", f"Share of the truth: {said}.", drawing.bars(groups), keys)
    columns = ["Stage", "Keeps", "Entered", "Lost", "Wanted later", *(f"by {name}" for name in later), "Wasted places"]
    table = drawing.table("Losses on logged lists", columns, rows)
    text = ("Logged lists, as shares of their truth (the best candidates). A later stage wants a lost candidate if it "
            "would have kept it, choosing among all that entered the stage which lost it. A kept candidate that no "
            "later stage wants wastes its place.")
    return drawing.section("Where good items are lost, and who wanted them", text, drawing.beside(figure) + table)


def _predictions(content: Report) -> str:
    names = list(dict.fromkeys(metric for result in content.predictions for metric in result.metrics))
    rows = [[result.name, number(result.num_rows), *(number(result.metrics.get(name)) for name in names)]
            for result in content.predictions]
    columns = ["Stage or task", "Candidates", *(name.replace("_", " ") for name in names)]
    text = ("A stage's score is held against the positive label, a task against its own. GAUC is the AUC within a "
            "user, weighted by the user's rows. Predicted over observed is 1 where predictions sum to the positives.")
    return drawing.section("Predictions of labels", text, drawing.table("Predictions", columns, rows)) if rows else ""


def _slices(content: Report) -> str:
    """Figures on new items and rare ones, beside those on all."""
    stages = [one for one in content.slices if one.stage]
    rows = [[one.stage, one.slice, number(one.rows), number(one.positives), *_measures(one, METRICS)] for one in
            sorted(stages, key=lambda one: [s.stage for s in stages].index(one.stage))]
    searches = [one for one in content.slices if not one.stage]
    recalls = list(dict.fromkeys(name for one in searches for name in one.metrics or ["recall"] if "/" not in name))
    recalls = [name for name in recalls if name != "recall"] or recalls
    found = [[one.slice, number(one.rows), number(one.positives), *_measures(one, recalls)] for one in searches]
    tables = drawing.table("Candidates", ["Stage", "Items", "Candidates", "Positives", *METRICS], rows) if rows else ""
    if found:
        tables += drawing.table("Retrieval", ["Items", "Requests", "Positives", *recalls], found)
    text = (f"Cold items have no impression in the training split, those of the tail have 1 to {MOST_OF_TAIL}. Below "
            f"{FEWEST_ROWS:,} candidates or {FEWEST_POSITIVES} positives there are {TOO_FEW} to say something. Recalls "
            "of cold items are searched in the whole catalogue.")
    return drawing.section("New items and rare ones", text, tables) if tables else ""


def _measures(one: SliceFigures, names: Sequence[str]) -> list[str]:
    """Values of the metrics with their intervals."""
    if one.metrics is None:
        return [TOO_FEW for _ in names]
    texts = []
    for name in names:
        low_high = one.intervals.get(name)
        beside = f" ({number(low_high[0])} to {number(low_high[1])})" if low_high else ""
        texts.append(number(one.metrics.get(name)) + beside)
    return texts


def _calibration(content: Report) -> str:
    figures, tables = "", ""
    for name, bins in ((name, bins) for name, bins in content.calibration.items() if bins):
        top = max(max(b.predicted, b.observed) for b in bins) or 1.0
        most = max(b.count for b in bins) or 1
        frame = drawing.Frame(0, top, 0, top)
        ink = "".join(f"<path class='count' d='M{frame.x(b.predicted):.1f} {frame.y(0)}"
                      f"V{frame.y(top * b.count / most / 4):.1f}'/>" for b in bins)
        ink += f"<path class='ideal' d='M{frame.x(0)} {frame.y(0)}L{frame.x(top)} {frame.y(top)}'/>"
        chart = drawing.plot({name: [(b.predicted, b.observed) for b in bins]}, x_range=(0, top), y_range=(0, top),
                      x_title="predicted", y_title="observed", extra=ink)
        said = "; ".join(f"{number(b.predicted)} predicted, {number(b.observed)} observed" for b in bins)
        figures += drawing.figure(f"Reliability: {name}", f"Mean label by predicted probability: {said}.", chart, [])
        rows = [[number(b.predicted), number(b.observed), number(b.count)] for b in bins]
        table = drawing.table(f"Bins of {name}", ["Predicted", "Observed", "Candidates"], rows)
        tables += f"<details><summary>Bins of {escape(name)}</summary>{table}</details>"
    text = ("Predicted probability against what happened: the closer to the diagonal, the better. The bars show how "
            "many candidates a bin holds.")
    return drawing.section("Calibration", text, drawing.beside(figures) + tables) if figures else ""


def _importance(content: Report) -> str:
    tables = ""
    for name, columns in ((name, columns) for name, columns in content.importance.items() if columns):
        rows = [[column.feature, number(column.shap), number(column.gain)] for column in columns]
        table = drawing.table(f"Features of {name}", ["Feature", "Mean |SHAP|", "Gain of a split"], rows)
        most = f"{escape(name)}: {escape(columns[0].feature)} moves the score most"
        tables += f"<details><summary>{most}</summary>{table}</details>"
    text = ("Stages of trees. Mean |SHAP| is how far a feature moves a candidate's score on average, gain how much a "
            "split by it improves the objective.")
    return drawing.section("Feature importance", text, tables) if tables else ""


def _variants(content: Report) -> str:
    rows = [[one.stage, one.served, number(one.requests), number(one.auc_fp32), _signed(one.auc_change),
             number(one.overlap), number(one.non_finite)] for one in content.variants]
    columns = ["Stage", "Served as", "Requests", "AUC in fp32", "Change of AUC", "Same candidates kept", "Not finite"]
    text = ("Stages that are served in fewer bits or compiled, each beside itself in float32 on the same requests and "
            "candidates, measured when the training ended.")
    return drawing.section("As served", text, drawing.table("As served", columns, rows)) if rows else ""


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.6f}"


def _training(content: Report) -> str:
    figures, tables = "", ""
    parts = ("Training loss", "step", content.curves), ("Validation", "epoch", content.validation)
    for title, unit, given in parts:
        finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in given.items()}
        curves = {name: points for name, points in finite.items() if points}
        if not curves:
            continue
        said = ", ".join(f"{name} from {number(p[0][1])} to {number(p[-1][1])}" for name, p in curves.items())
        chart = drawing.plot({name: drawing.thin(points) for name, points in curves.items()}, x_title=unit)
        figures += drawing.figure(f"{title} by {unit}", f"{title}: {said}.", chart, list(curves))
        rows = [[name, *(number(y) for y in (p[0][1], p[-1][1], min(y for _, y in p)))] for name, p in curves.items()]
        tables += drawing.table(f"{title} by {unit}", [title, "First", "Last", "Lowest"], rows)
    return drawing.section("Training", "", drawing.beside(figures) + drawing.beside(tables)) if figures else ""


def _metrics(content: Report) -> str:
    rows = [[name, number(value), *(number(base.get(name)) for base in content.baselines.values())]
            for name, value in content.metrics.items()]
    table = drawing.table("All metrics with their baselines", ["Metric", "This run", *content.baselines], rows)
    return drawing.section("All metrics", "", table) if rows else ""


def _facts(content: Report) -> str:
    rows = [[name, value] for name, value in content.facts.items()]
    table = drawing.table("Facts of the run", ["Fact", "Value"], rows)
    return drawing.section("The run", "", f"<div class='narrow'>{table}</div>") if rows else ""


def _config(content: Report) -> str:
    text = escape(content.config_yaml.strip())
    return drawing.section("Config", "Resolved: with every default.", f"<pre tabindex='0'>{text}</pre>") if text else ""
