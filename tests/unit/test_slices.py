"""Figures on new items and rare ones against loops over the stored lists, and what the report says of them."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade.batch import collate
from raycascade.bootstrap import WeightedAuc, interval
from raycascade.bundle import Bundle, load_bundle, save_bundle
from raycascade.cascade import Cascade
from raycascade.evaluation import Evaluator
from raycascade.keys import to_keys
from raycascade.report import Report, render_report
from raycascade.reporting import describe
from raycascade.shards import Shards
from raycascade.slices import Slice, SliceFigures, by_name, members, training_impressions
from tests.tiny_shards import train_config, write_shards
from tests.tiny_world import raw_requests

KINDS = ("all", "cold", "tail")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


@pytest.fixture(scope="module")
def bundle(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Untrained, with counters of which every third item's events are taken out: those items are cold."""
    torch.manual_seed(1)
    opened = Shards.open(shards)
    config = train_config(shards, changes={"evaluate": {"bootstrap": 30}})
    counters = opened.items.state.counters
    kept = counters.keys_M // counters.span % 3 != 0
    object.__setattr__(counters, "keys_M", counters.keys_M[kept])
    object.__setattr__(counters, "totals_MT", counters.totals_MT[kept] / 4)
    uri = save_bundle(str(tmp_path_factory.mktemp("bundles") / "b"), config=config,
                      cascade=Cascade(config, opened.state.space), items=opened.items,
                      encoded_items=opened.table("items"), users=opened.table("users"),
                      metrics={"train": {"rows": 1}, "curves": {}})
    return load_bundle(uri)


@pytest.fixture(scope="module")
def requests(shards: str) -> pa.Table:
    return Shards.open(shards).table("requests/train")


@pytest.fixture(scope="module")
def evaluator(bundle: Bundle, requests: pa.Table) -> Evaluator:
    evaluator = Evaluator(bundle)
    evaluator.update(requests)
    return evaluator


def kind_of(impressions: int) -> str:
    return "cold" if impressions == 0 else "tail" if impressions <= 20 else "neither"


def by_loop(bundle: Bundle, requests: pa.Table, kind: str) -> list[tuple[float, bool, int, str]]:
    """(logit of the ranker, label, user, request) of every row of a slice, one by one."""
    found = []
    for row in range(len(requests)):
        one = requests.slice(row, 1)
        table = one.to_pylist()[0]
        scores = bundle.cascade(collate(one, bundle.items, keep=(5, 4, 3), k=2))["ranker"][0].tolist()
        for score, item, label in zip(scores, table["candidates"], table["click"], strict=False):
            seen = bundle.state.counters.as_of(np.array([item]), 1 << 62, "exposure")[0]
            if label is not None and not math.isnan(label) and kind in ("all", kind_of(round(float(seen)))):
                found.append((score, label > 0.5, table["user_key"], table["request_id"]))
    return found


def naive_auc(rows: list[tuple[float, bool, int, str]]) -> float:
    wins = [(a > b) + 0.5 * (a == b) for a, positive, *_ in rows if positive for b, other, *_ in rows if not other]
    return sum(wins) / len(wins)


def test_impressions_of_training_are_counted_by_a_loop_over_the_log(shards: str):
    """Of the untouched state: the counters of the tiny world hold the whole of its log."""
    state = Shards.open(shards).items.state
    seen = dict.fromkeys(state.item_ids.values.to_pylist(), 0)
    raw = raw_requests()
    exposed = raw["exposed"].to_pylist() if "exposed" in raw.column_names else None
    for q, candidates in enumerate(raw["candidates"].to_pylist()):
        for c, item in enumerate(candidates):
            seen[item] += 1 if exposed is None else bool(exposed[q][c])
    assert training_impressions(Shards.open(shards).items).tolist() == [0, 0, *seen.values()]


def test_members_of_the_slices_are_told_apart_by_their_impressions():
    found = members(np.array([0, 1, 20, 21]))
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "all": [True] * 4, "cold": [True, False, False, False], "tail": [False, True, True, False]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_slice_has_the_figures_of_a_loop_over_its_rows(
    bundle: Bundle, evaluator: Evaluator, requests: pa.Table, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr("raycascade.slices.FEWEST_ROWS", 10)
    rows = by_loop(bundle, requests, kind)
    assert len(rows) > 50
    figures = next(one for one in evaluator.measured.slice_figures() if (one.slice, one.stage) == (kind, "ranker"))
    assert (figures.rows, figures.positives) == (len(rows), sum(positive for _, positive, *_ in rows))
    assert figures.metrics is not None
    assert figures.metrics["auc"] == pytest.approx(naive_auc(rows), abs=1e-3)  # scores of one batch and of many
    losses = [math.log1p(math.exp(score)) - positive * score for score, positive, *_ in rows]
    assert figures.metrics["logloss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    users = {user for *_, user, _ in rows}
    parts = [[row for row in rows if row[2] == user] for user in users]
    both = [part for part in parts if len({positive for _, positive, *_ in part}) == 2]
    expected = sum(naive_auc(part) * len(part) for part in both) / sum(map(len, both))
    assert figures.metrics["gauc"] == pytest.approx(expected, abs=2e-3)
    scores, labels = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    keys = to_keys(pa.array([r[3] for r in rows]))
    assert figures.intervals["auc"] == pytest.approx(interval(WeightedAuc(scores, labels), keys, draws=30), abs=2e-3)


def test_recall_of_cold_items_is_what_a_loop_counts_in_the_whole_catalogue(
    bundle: Bundle, evaluator: Evaluator, requests: pa.Table
):
    impressions = training_impressions(bundle.items)
    for kind in KINDS:
        truth = {}
        for q, row in enumerate(requests.to_pylist()):
            clicked = {i for i, c in zip(row["candidates"], row["click"], strict=True) if c and c > 0.5}
            clicked -= set(row["exclude"])
            truth[q] = {i for i in clicked if kind in ("all", kind_of(int(impressions[i])))}
        ranking = bundle.recommend(requests)
        total = sum(map(len, truth.values()))
        figures = next(o for o in evaluator.measured.slice_figures() if (o.slice, o.stage) == (kind, ""))
        assert (figures.positives, figures.rows) == (total, sum(1 for rows in truth.values() if rows))
        assert total >= 50
        assert figures.metrics is not None
        for stage, keep in zip(ranking.stages, bundle.cascade.keeps, strict=True):
            hits = sum(len(truth[q] & set(stage.rows_QC[q, :keep].tolist())) for q in truth)
            assert figures.metrics[f"recall@{keep}"] == pytest.approx(hits / total, abs=1e-12)
    metrics = evaluator.measured.metrics()
    assert metrics["recall@15"] == evaluator.measured.catalogues["all"].result()["recall@15"]


def test_slices_of_two_workers_merge_to_those_of_one(
    bundle: Bundle, requests: pa.Table, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raycascade.slices.FEWEST_ROWS", 10)
    halves, alone = [Evaluator(bundle) for _ in range(2)], Evaluator(bundle)
    for number, start in enumerate(range(0, len(requests), 50)):
        halves[number % 2].update(requests.slice(start, 50))
        alone.update(requests.slice(start, 50))
    halves[0].measured.merge(halves[1].measured)
    for left, right in zip(halves[0].measured.slice_figures(), alone.measured.slice_figures(), strict=True):
        assert (left.slice, left.stage, left.rows, left.positives) == (
            right.slice, right.stage, right.rows, right.positives)
        assert left.metrics == pytest.approx(right.metrics, abs=1e-9)
        assert left.intervals.keys() == right.intervals.keys()
        for name, bounds in left.intervals.items():
            assert bounds == pytest.approx(right.intervals[name], abs=1e-9)


@pytest.mark.parametrize(("rows", "positives", "enough"), [(1000, 50, True), (999, 50, False), (1000, 49, False)])
def test_too_few_rows_or_positives_say_nothing(rows: int, positives: int, enough: bool):
    labels_QC = torch.zeros(1, rows + 7)
    labels_QC[0, :positives] = 1.0
    labels_QC[0, rows:] = torch.nan
    one = Slice()
    one.update(torch.linspace(-1, 1, rows + 7)[None], labels_QC, np.ones((1, rows + 7), bool),
               np.array([3]), np.array([5]))
    figures = one.figures("cold", "ranker")
    assert (figures.rows, figures.positives, figures.metrics is not None) == (rows, positives, enough)
    values = by_name([figures])["cold"]
    assert values["rows/ranker"] == rows
    assert (values["auc/ranker"] == "too few") is not enough
    assert figures.intervals == {}


def test_names_of_the_figures_tell_stages_and_the_catalogue_apart():
    figures = [SliceFigures("cold", "ranker", 2000, 60, {"auc": 0.6}, {"auc": (0.5, 0.7)}),
               SliceFigures("cold", "", 80, 90, {"recall@5": 0.2, "recall@5/ranker": 0.2}),
               SliceFigures("tail", "", 4, 5, None)]
    assert by_name(figures) == {
        "cold": {"rows/ranker": 2000, "positives/ranker": 60, "auc/ranker": 0.6, "auc_low/ranker": 0.5,
                 "auc_high/ranker": 0.7, "requests": 80, "positives": 90, "recall@5": 0.2, "recall@5/ranker": 0.2},
        "tail": {"requests": 4, "positives": 5, "recall": "too few"}}


def test_the_page_shows_new_items_with_their_intervals_and_says_where_there_are_too_few(
    bundle: Bundle, evaluator: Evaluator
):
    figures = [SliceFigures("all", "ranker", 12_345, 678, {"auc": 0.6543}),
               SliceFigures("cold", "ranker", 999, 50, None),
               SliceFigures("tail", "ranker", 2_000, 60, {"auc": 0.6111}, {"auc": (0.5001, 0.7001)}),
               SliceFigures("cold", "", 80, 90, {"recall@5": 0.2468, "recall@5/ranker": 0.1357})]
    page = render_report(Report(title="x", slices=figures))
    for text in ("New items and rare ones", "12,345", "0.6543", ">too few<", "0.6111 (0.5001 to 0.7001)", "recall@5<",
                 "0.2468"):
        assert text in page
    assert "0.1357" not in page
    assert "New items" not in render_report(Report(title="x"))
    whole = render_report(describe(bundle, evaluator.measured, split="train", moment="2024-01-09"))
    assert "New items and rare ones" in whole
