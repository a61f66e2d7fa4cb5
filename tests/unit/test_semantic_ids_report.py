"""The quality report of semantic ids: figures by hand and by brute force, warnings, and a page that shows them."""

import json
import math
import re
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raycascade.ragged import Ragged
from raycascade.semantic_ids.report import prefix_table, quality, render_page, summary, usage

VECTORS = np.array([[1.1, 0.2], [0.9, -0.3], [-0.2, 0.9]])  # of the quantiser's worked example
CODES = np.array([[0, 0], [0, 1], [1, 1]])


def _report(**more: Any) -> dict[str, Any]:
    return quality(VECTORS, CODES, np.array([5, 0, 15]), codes=2, **more)


def _tokens(*lists: list[int]) -> Ragged:
    return Ragged.from_arrow(pa.array(lists, pa.list_(pa.int32())))


# ---------------------------------------------------------------- numbers
def test_the_worked_example_has_the_figures_worked_out_by_hand():
    report = _report()
    by_hand = (1.1 * 0.9 - 0.2 * 0.3) / (math.hypot(1.1, 0.2) * math.hypot(0.9, 0.3))
    assert by_hand == pytest.approx(0.876812, abs=1e-6)
    of_two = report["prefixes"][1]
    assert (of_two["groups"], of_two["mean"], of_two["by_pairs"]) == (1, pytest.approx(by_hand), pytest.approx(by_hand))
    assert report["prefixes"][2] == {"n": 2, "groups": 0, "mean": None, "by_pairs": None, "sizes": [1.0, 1.0, 1.0]}
    for level in report["usage"]:
        assert level["items"] == {"used": 1.0, "entropy": pytest.approx(0.918296, abs=1e-6),
                                  "perplexity": pytest.approx(1.889882, abs=1e-6), "largest": pytest.approx(2 / 3)}
    assert report["usage"][0]["impressions"]["largest"] == 0.75
    assert report["usage"][1]["impressions"]["largest"] == 0.75
    assert report["collisions"] == {"share": 0.0, "largest": 1, "impressions": 0.0}
    assert (report["items"], report["new_items"], report["impressions"]) == (3, 1, 20)


def test_the_cosines_of_prefixes_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    vectors, codes = rng.normal(size=(90, 7)), rng.integers(0, 3, (90, 4))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for n, row in enumerate(prefix_table(vectors, codes)):
        groups: dict[tuple[int, ...], list[float]] = {}
        for first, second in combinations(range(90), 2):
            if (codes[first, :n] == codes[second, :n]).all():
                groups.setdefault(tuple(codes[first, :n]), []).append(float(unit[first] @ unit[second]))
        assert row["groups"] == len(groups)
        of_groups = list(groups.values())
        assert row["mean"] == pytest.approx(np.mean([np.mean(pairs) for pairs in of_groups]), abs=1e-6)
        assert row["by_pairs"] == pytest.approx(np.mean(np.concatenate(of_groups)), abs=1e-6)


def test_items_with_all_codes_in_common_collide():
    codes = np.array([[1, 1], [1, 1], [1, 1], [0, 1], [2, 2], [2, 2]])
    report = quality(np.eye(6), codes, np.array([10, 0, 20, 60, 10, 0]), codes=4)
    assert report["collisions"] == {"share": pytest.approx(0.5), "largest": 3, "impressions": pytest.approx(0.4)}


def test_use_by_impressions_without_impressions_is_not_defined():
    assert set(usage(np.array([0, 1]), np.zeros(2), 4).values()) == {None}


def test_errors_are_split_by_popularity_and_new_items_stand_apart():
    lost, whole = np.arange(25.0), np.full(25, 10.0)
    impressions = np.concatenate([np.zeros(5, int), np.arange(20, 0, -1)])  # item 5 is the most shown, 24 the least
    found = quality(np.eye(25), np.zeros((25, 1), int), impressions, codes=2, errors=(lost, whole))["error"]
    assert found["new"] == pytest.approx(10 / 50)
    assert found["training"] == pytest.approx(sum(range(5, 25)) / 200)
    assert found["deciles"] == pytest.approx([(49 - 4 * tenth - 2) / 20 for tenth in range(10)])
    assert _report(errors=(np.ones(3), np.ones(3)))["error"]["deciles"] == []


def test_tokens_are_counted_by_item_and_by_impression():
    found = _report(tokens=_tokens([2], [3, 4], [2, 5, 6]), rows=10)["tokens"]
    assert found == {"rows": 10, "unused_rows": 3, "per_item": 2.0, "per_impression": (5 + 45) / 20, "one_token": 0.25}


def test_a_good_report_warns_of_nothing_and_each_fault_has_its_warning():
    rng = np.random.default_rng(1)
    axis = np.eye(4)
    vectors = np.repeat(axis, 4, axis=0) * 3 + np.tile(axis, (4, 1))
    codes = np.array([[coarse, fine] for coarse in range(4) for fine in range(4)])
    shown = np.ones(16, int)
    assert quality(vectors, codes, shown, codes=4)["warnings"] == []
    few = quality(vectors, codes, shown, codes=16)["warnings"]
    assert [line.split(":")[0] for line in few] == [
        text for n in (1, 2) for text in (f"level {n} uses 25% of its 16 codes, less than 50%",
                                          f"level {n} has an entropy of 0.50 ln K, less than 0.6")]
    uneven = np.where(rng.random(400) < 0.97, 0, rng.integers(0, 4, 400))[:, None]
    said = " ".join(quality(rng.normal(size=(400, 8)), uneven, np.ones(400, int), codes=4)["warnings"])
    assert "level 1 has an entropy of" in said
    assert "of the items share all codes with another, more than 20%" in said
    apart = quality(vectors[[0, 5, 10, 15, 1, 6, 11, 12]], np.repeat([[0], [1]], 4, axis=0), np.ones(8, int), codes=2)
    assert any("level 1 adds nothing" in line for line in apart["warnings"])


# ---------------------------------------------------------------- the page
def _whole() -> dict[str, Any]:
    errors = np.array([1.0, 2.0, 3.0]), np.full(3, 10.0)
    return _report(errors=errors, tokens=_tokens([2], [3, 4], [2, 5, 6]), rows=10)


def test_the_report_is_json_and_comes_back_as_it_was():
    report = _whole()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_page_shows_the_figures_and_draws_them():
    report = _whole()
    page = render_page("semantic ids: main", report, curves={"loss": [(1, 2.0), (9, 0.5)]})
    for text in ("0.8768", "91.8%", "1.8899", "66.7%", "0.2000", "2.5000", "2.0000", "Prefixes", "Codes", "Collisions",
                 "Error", "Tokens", "Training"):
        assert text in page, text
    figures = re.findall(r"<svg role='img'.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 4
    assert all(re.search(r"<title>[^<]+</title><desc>[^<]*\d[^<]*</desc>", figure) for figure in figures)
    assert not re.search(r"https?:|url\(|@import|<script", page)
    assert page == render_page("semantic ids: main", report, curves={"loss": [(1, 2.0), (9, 0.5)]})
    for tag in ("section", "table", "div", "figure", "svg", "tr", "ul"):
        assert len(re.findall(rf"<{tag}[\s>]", page)) == page.count(f"</{tag}>"), tag


def test_what_was_not_measured_is_left_out_and_warnings_come_first_and_are_escaped():
    page = render_page("<b>", {**_report(), "warnings": ["<script>alert(1)</script>"]})
    assert "<h2>Tokens</h2>" not in page
    assert "<h2>Error</h2>" not in page
    assert "<script>" not in page
    assert "<title>&lt;b&gt;</title>" in page
    assert page.index("&lt;script&gt;") < page.index("<h2>Prefixes</h2>")


def test_the_summary_has_the_figures_of_the_report():
    seen = summary(_whole())
    assert seen["prefix_cosine"][1] == pytest.approx(0.876812, abs=1e-6)
    assert seen["codes_used"] == [1.0, 1.0]
    assert (seen["error"], seen["error_of_new_items"], seen["tokens_per_impression"]) == (0.2, 0.2, 2.5)
    assert summary(_report())["error"] is None
