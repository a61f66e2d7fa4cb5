"""The report is one honest, self-contained page."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from raycascade.report import (
    CalibrationBin,
    FeatureImportance,
    Report,
    StageLosses,
    StageResult,
    SurvivalPoint,
    number,
    percent,
    render_report,
)

FULL = Report(
    title="demo: three stages",
    summary="Evaluated on 1,234 requests.",
    headline=("joint_recall@10@20", "not_measured"),
    survival=(SurvivalPoint("retriever", 500, 0.742, {"popularity": 0.413, "random": 0.066}),
              SurvivalPoint("ranker", 20, 0.284, {"popularity": 0.061})),
    stages=(StageResult("retriever", 50, 0.6123, None, 12_034), StageResult("ranker", 10, 0.4127, 0.3604, 2_310)),
    kept_to_the_end=7_739,
    losses=(StageLosses("retriever", 30, 1.0, 0.0371, 0.0222, {"ranker": 0.0211}, 0.456),
            StageLosses("ranker", 20, 0.9629, 0.1717)),
    calibration={"click": (CalibrationBin(0.0512, 0.0498, 9_001), CalibrationBin(0.6123, 0.5871, 17))},
    importance={"pre_ranker": (FeatureImportance("price", 31.4159, 0.8642),)},
    curves={"retriever": [(step, 1 / (1 + step / 100)) for step in range(1000)], "ranker": [(0, 0.7), (10, math.nan)]},
    validation={"total": [(1, 1.2111), (2, 1.0822), (3, 1.0933)]},
    metrics={"joint_recall@10@20": 0.31274, "auc/click": 0.7431, "requests": 1_234, "tiny": 0.000012345},
    baselines={"popularity": {"joint_recall@10@20": 0.1312}, "random": {"auc/click": 0.5009}},
    facts={"training requests": "9,876,543", "torch": "2.13.0"},
    config_yaml="train: {epochs: 3}\n",
)
EMPTY = Report(title="empty")
ALONE = [replace(EMPTY, **{part: getattr(FULL, part)}) for part in (
    "survival", "stages", "kept_to_the_end", "losses", "calibration", "importance", "curves", "validation", "metrics",
    "baselines", "facts", "config_yaml", "headline")]
HOSTILE = "</pre><script>alert('x')</script>\"'&<img src=http://evil.example/x.png>"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed in order; collects texts, attributes and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("text", [
    "demo: three stages", "Evaluated on 1,234 requests.",
    "74.2%", "41.3%", "6.6%", "28.4%", "6.1%",  # survival and its baselines
    "0.6123", "0.4127", "0.3604", "+0.0523", "12,034", "2,310", "7,739",  # stages
    "3.71%", "2.22%", "2.11%", "45.6%", "96.3%", "17.2%",  # losses on lists
    "0.0512", "0.0498", "9,001", "0.5871", "17",  # calibration
    "price", "0.8642", "31.4159",  # what trees read
    "1.0000", "0.0910", "0.7000", "1.2111", "1.0822", "1.0933",  # curves: first, last and lowest
    "0.3127", "0.7431", "1,234", "1.234e-05", "0.1312", "0.5009",  # metrics and baselines
    "9,876,543", "2.13.0", "train: {epochs: 3}",
])
def test_every_number_given_stands_on_the_page(text: str) -> None:
    texts = [data.strip() for data in Page(render_report(FULL)).texts]
    assert text in texts


@pytest.mark.parametrize("content", [FULL, EMPTY, *ALONE])
def test_tags_are_balanced_with_and_without_each_part(content: Report) -> None:
    page = Page(render_report(content))
    assert page.tags.count("h1") == page.tags.count("main") == 1


def test_a_page_without_optional_parts_has_no_sections() -> None:
    assert "section" not in Page(render_report(EMPTY)).tags
    assert Page(render_report(FULL)).tags.count("section") == 9


def test_the_page_refers_to_nothing_outside_itself() -> None:
    text = render_report(FULL)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "use", "image", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href", "style"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import", text)


@pytest.mark.parametrize("content", [
    Report(title=HOSTILE, summary=HOSTILE, config_yaml=HOSTILE, facts={HOSTILE: HOSTILE}),
    Report(title="x", metrics={HOSTILE: 1.0}, baselines={HOSTILE: {HOSTILE: 2.0}}, headline=(HOSTILE,)),
    Report(title="x", survival=(SurvivalPoint(HOSTILE, 3, 0.5, {HOSTILE: 0.1}),),
           stages=(StageResult(HOSTILE, 3, 0.5, 0.4, 1),)),
    Report(title="x", importance={HOSTILE: (FeatureImportance(HOSTILE, 1.0, 2.0),)}),
    Report(title="x", losses=(StageLosses(HOSTILE, 3, 1.0, 0.4, 0.1, {HOSTILE: 0.1}, 0.2),)),
    Report(title="x", calibration={HOSTILE: (CalibrationBin(0.1, 0.2, 3),)}, curves={HOSTILE: [(1, 2.0)]},
           validation={HOSTILE: [(1, 2.0)]}),
])
def test_hostile_text_is_shown_and_not_run(content: Report) -> None:
    text = render_report(content)
    page = Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert "<script" not in text
    assert any("alert('x')" in data for data in page.texts)


def test_every_figure_has_a_title_and_a_description_with_its_numbers() -> None:
    text = render_report(FULL)
    figures = re.findall(r"<svg role='img'.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 7
    assert all(re.search(r"<title>[^<]+</title><desc>[^<]*\d[^<]*</desc>", figure) for figure in figures)


def test_the_same_content_gives_the_same_bytes() -> None:
    assert render_report(FULL) == render_report(replace(FULL))


def test_survival_points_stand_at_their_height() -> None:
    """The plot is 210 units high and starts 224 units from the top: half of the positives are at 224 - 105."""
    text = render_report(Report(title="x", survival=(SurvivalPoint("only", 5, 0.5),)))
    assert re.findall(r"cy='([\d.]+)'", text) == ["14.0", "119.0"]


@pytest.mark.parametrize("points", [
    [(0, 0.0)], [(5, 3.0), (6, 3.0)], [(0, -2.0), (1, 1e6)], [(0, 1e-9), (1, 3e-9)],
    [(0, math.nan), (1, math.inf), (2, 1.0)],
    [(step, math.sin(step)) for step in range(10_001)],
])
def test_curves_of_any_range_stay_inside_their_figure(points: list[tuple[float, float]]) -> None:
    text = render_report(Report(title="x", curves={"loss": points}))
    drawn = re.search(r"class='line s0' d='(M[^H']*)'", text)
    assert drawn
    places = [float(y) for _, y in re.findall(r"([\d.-]+) ([\d.-]+)", drawn[1])]
    assert places
    assert all(14 <= y <= 224 for y in places)
    assert len(places) <= 120
    assert "nan" not in text


def test_a_curve_without_a_finite_value_is_left_out() -> None:
    assert "Training" not in render_report(Report(title="x", curves={"loss": [(0, math.nan)]}))


@pytest.mark.parametrize(("value", "text"), [
    (None, "—"), (0.0, "0.0000"), (0.12345, "0.1235"), (-1.5, "-1.5000"), (1e-7, "1e-07"), (123456.7, "1.235e+05"),
    (1234567, "1,234,567"), (math.nan, "nan"),
])
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("share", "text"), [
    (1.0, "100%"), (0.9999, "100%"), (0.5, "50%"), (0.00264, "0.264%"), (0.0, "0%"),
])
def test_shares_are_written_in_per_cent(share: float, text: str) -> None:
    assert percent(share) == text
