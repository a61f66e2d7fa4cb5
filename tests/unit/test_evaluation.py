"""Evaluation against brute force over a catalogue of 120 items, and the expectations of a config."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade.batch import collate
from raycascade.bundle import Bundle, load_bundle, save_bundle
from raycascade.cascade import Cascade
from raycascade.errors import BundleError, ExpectationError
from raycascade.evaluation import CatalogueRecall, Evaluator, Popularity, count_hits, excluded_mask
from raycascade.flows.evaluate import check_expectations, check_same_features, limited
from raycascade.reporting import describe, stage_losses
from raycascade.shards import Shards
from tests.tiny_shards import train_config, write_shards

KEEPS = (40, 15, 5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


@pytest.fixture(scope="module")
def bundle(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Untrained: what it recommends is arbitrary, which is all that counting needs."""
    # Seeded here, because a fixture is made before a test's own seed is set. These weights leave no two candidates
    # whose scores tie at one batch size and differ in the last bit at another: NDCG averages over ties and would move.
    torch.manual_seed(1)
    opened = Shards.open(shards)
    config = train_config(shards, changes={"evaluate": {"popularity_hours": 1000}})
    uri = save_bundle(str(tmp_path_factory.mktemp("bundles") / "b"), config=config,
                      cascade=Cascade(config, opened.state.space), items=opened.items,
                      encoded_items=opened.table("items"), users=opened.table("users"),
                      metrics={"train": {"rows": 1}, "curves": {"loss": [[0, 1.0]], "valid_loss": [[9, 0.5]]}})
    return load_bundle(uri)


@pytest.fixture(scope="module")
def requests(shards: str) -> pa.Table:
    """150 logged requests; every fifth excludes two of its own candidates."""
    table = Shards.open(shards).table("requests/train")
    rows = enumerate(zip(table["exclude"].to_pylist(), table["candidates"].to_pylist(), strict=True))
    exclude = [before + candidates[1:3] if q % 5 == 0 else before for q, (before, candidates) in rows]
    return table.set_column(table.column_names.index("exclude"), "exclude", pa.array(exclude, pa.list_(pa.int32())))


@pytest.fixture(scope="module")
def evaluator(bundle: Bundle, requests: pa.Table) -> Evaluator:
    evaluator = Evaluator(bundle)
    evaluator.update(requests)
    return evaluator


@pytest.fixture(scope="module")
def truth(requests: pa.Table) -> list[tuple[int, list[int], list[int]]]:
    """(request, true item rows, excluded rows) by a loop over the stored lists."""
    found = []
    for q, row in enumerate(requests.to_pylist()):
        excluded, logged = row["exclude"], zip(row["candidates"], row["click"], strict=True)
        clicked = {item for item, click in logged if click > 0.5 and item not in excluded}
        if clicked:
            found.append((q, sorted(clicked), excluded))
    assert len(found) > 100
    assert any(excluded for _, _, excluded in found)
    return found


Truth = list[tuple[int, list[int], list[int]]]


def share(kept: list[list[int]], truth: Truth) -> float:
    """Micro recall: hits of all requests over positives of all requests."""
    hits = sum(len(set(rows) & set(true)) for rows, (_, true, _) in zip(kept, truth, strict=True))
    return hits / sum(len(true) for _, true, _ in truth)


def test_catalogue_recall_is_what_a_loop_over_the_requests_counts(
    bundle: Bundle, evaluator: Evaluator, truth: Truth, requests: pa.Table
):
    metrics = evaluator.measured.metrics()
    ranking = bundle.recommend(requests.take([q for q, _, _ in truth]))
    for stage, keep in zip(ranking.stages, KEEPS, strict=True):
        for width in (width for width in KEEPS if width <= keep):
            expected = share(stage.rows_QC[:, :width].tolist(), truth)
            assert metrics[f"recall@{width}/{stage.name}"] == pytest.approx(expected, abs=1e-12)
        assert metrics[f"recall@{keep}"] == metrics[f"recall@{keep}/{stage.name}"]
    assert 0.2 < metrics["recall@40"] < 0.5  # a third of the catalogue at random
    assert evaluator.measured.catalogue.requests == len(truth)
    names = {name for name in metrics if name.startswith("recall@") and "@" not in name[7:]}
    assert names == {"recall@40", "recall@15", "recall@5", "recall@40/retriever", "recall@15/retriever",
                     "recall@5/retriever", "recall@15/pre_ranker", "recall@5/pre_ranker", "recall@5/ranker"}


def test_the_popularity_baseline_is_the_most_clicked_items_that_are_not_excluded(
    bundle: Bundle, evaluator: Evaluator, truth: Truth
):
    state = bundle.state
    clicks_N = state.counters.as_of(bundle.items.all_rows, np.int64(state.as_of_ms), "click", 1000 * 3_600_000)
    order = [int(n) + 2 for n in np.argsort(-clicks_N, kind="stable")]
    for width in KEEPS:
        kept = [[row for row in order if row not in excluded][:width] for _, _, excluded in truth]
        assert evaluator.measured.baselines()["popularity"][f"recall@{width}"] == pytest.approx(share(kept, truth))


def test_the_random_baseline_is_what_drawing_at_random_gives_on_average(evaluator: Evaluator, truth: Truth):
    draw, rounds = np.random.default_rng(4), 60
    for width in KEEPS:
        shares = []
        for _ in range(rounds):
            kept = []
            for _, _, excluded in truth:
                free = np.setdiff1d(np.arange(2, 122), excluded)
                kept.append(draw.choice(free, width, replace=False).tolist())
            shares.append(share(kept, truth))
        expected = evaluator.measured.baselines()["random"][f"recall@{width}"]
        assert abs(expected - np.mean(shares)) < 4 * np.std(shares) / np.sqrt(rounds)


def test_popularity_counts_the_last_hours_only(bundle: Bundle):
    state = bundle.state
    recent = Popularity(bundle.items, 48).scores_N[2:]
    expected = state.counters.as_of(bundle.items.all_rows, np.int64(state.as_of_ms), "click", 48 * 3_600_000)
    assert np.array_equal(recent, expected)
    assert recent.sum() < Popularity(bundle.items, 1000).scores_N[2:].sum()


@pytest.mark.parametrize("size", [7, 64])
def test_shares_of_the_requests_merge_to_the_figures_of_one_pass(
    bundle: Bundle, evaluator: Evaluator, requests: pa.Table, size: int
):
    workers, alone = [Evaluator(bundle) for _ in range(3)], Evaluator(bundle)
    for number, start in enumerate(range(0, len(requests), size)):
        workers[number % 3].update(requests.slice(start, size))
        alone.update(requests.slice(start, size))
    total = workers[0].measured
    for worker in workers[1:]:
        total.merge(worker.measured)
    assert total.metrics() == pytest.approx(alone.measured.metrics(), abs=1e-12)  # the same batches: the same figures
    # scores of another batch size differ in the last bit, which only the log loss and the calibration show
    assert total.metrics() == pytest.approx(evaluator.measured.metrics(), abs=1e-6)
    for name, figures in evaluator.measured.baselines().items():
        assert total.baselines()[name] == pytest.approx(figures, abs=1e-9)


def test_logged_lists_and_the_ranker_are_measured_too(evaluator: Evaluator):
    metrics = evaluator.measured.metrics()
    assert {"auc", "gauc", "logloss", "calibration_error", "joint_recall@2@3", "ndcg@2/ranker"} <= set(metrics)
    assert evaluator.measured.lists.num_requests == 150


def test_excluded_candidates_are_no_truth(bundle: Bundle, requests: pa.Table):
    mask_QC = excluded_mask(collate(requests, bundle.items))
    assert mask_QC.sum() >= 60
    for q, row in enumerate(requests.to_pylist()):
        assert mask_QC[q].tolist() == [c in row["exclude"] for c in row["candidates"]]


def test_hits_are_counted_once_and_padding_never():
    rows_QK = np.array([[5, 9, 0], [9, 2, 3]])
    assert count_hits(rows_QK, [np.array([9, 11]), np.array([5])]) == 1
    assert count_hits(rows_QK, [np.array([5, 9]), np.array([2, 3, 9])]) == 5
    assert count_hits(np.zeros((1, 3), np.int64), [np.array([2])]) == 0


def test_recall_without_a_positive_is_left_out():
    assert CatalogueRecall().result() == {}


# ---------------------------------------------------------------- the flow's own checks
def test_a_figure_below_the_expectation_fails_with_status_1(bundle: Bundle):
    expecting = bundle.config.model_copy(update={"expect": {"recall@5": 0.5, "auc": 0.6, "recall@40": 0.1}})
    wanting = Bundle(bundle.uri, bundle.manifest, expecting, bundle.items, bundle.cascade, bundle.index)
    with pytest.raises(ExpectationError, match=r"recall@5 0.4000 < 0.5; auc nan < 0.6; see report.html") as caught:
        check_expectations(wanting, {"recall@5": 0.4, "recall@40": 0.1})
    assert caught.value.exit_status == 1
    assert "recall@40" not in str(caught.value)
    check_expectations(wanting, {"recall@5": 0.5, "auc": 0.61, "recall@40": 0.2})


def test_shards_that_were_prepared_anew_are_refused(bundle: Bundle, shards: str):
    opened = Shards.open(shards)
    check_same_features(bundle, opened)
    files = {name: {**facts} for name, facts in opened.manifest["files"].items()}
    files["features/vocabulary.author.arrow"]["sha256"] = "0" * 64
    with pytest.raises(BundleError, match=r"features/vocabulary.author.arrow is not the one of the shards"):
        check_same_features(bundle, Shards(opened.folder, {**opened.manifest, "files": files}))


def test_max_requests_takes_whole_row_groups_from_the_front():
    groups = [("a", 0, 10), ("a", 1, 10), ("b", 0, 5)]
    assert limited(groups, None) == groups
    assert limited(groups, 10) == groups[:1]
    assert limited(groups, 11) == groups[:2]
    assert limited(groups, 99) == groups


def test_the_report_says_where_the_truth_of_lists_is_lost_and_who_wanted_it(bundle: Bundle, evaluator: Evaluator):
    metrics = evaluator.measured.metrics()
    losses = describe(bundle, evaluator.measured, split="train", moment="2024-01-09").losses
    assert [stage.stage for stage in losses] == ["retriever", "pre_ranker", "ranker"]
    assert [stage.lost for stage in losses] == [metrics[f"lost/{stage.stage}"] for stage in losses]
    joint = next(value for name, value in metrics.items() if name.startswith("joint_recall@"))
    assert losses[-1].entered - losses[-1].lost == pytest.approx(joint, abs=1e-9)
    assert [list(stage.wanted_by) for stage in losses] == [["pre_ranker", "ranker"], ["ranker"], []]
    assert losses[1].wanted == losses[1].wanted_by["ranker"] == metrics["lost_wanted/pre_ranker/ranker"]
    assert (losses[-1].wanted, losses[-1].wasted) == (None, None)
    assert stage_losses(("retriever",), (3,), {}) == []


def test_the_report_holds_each_stage_against_the_one_before_at_the_same_cut(bundle: Bundle, evaluator: Evaluator):
    metrics = evaluator.measured.metrics()
    report = describe(bundle, evaluator.measured, split="train", moment="2024-01-09")
    assert [stage.stage for stage in report.stages] == ["retriever", "pre_ranker", "ranker"]
    assert [stage.previous for stage in report.stages] == [
        None, metrics["recall@15/retriever"], metrics["recall@5/pre_ranker"]]
    lost = [stage.lost for stage in report.stages]
    positives = evaluator.measured.catalogue.positives
    assert sum(n for n in lost if n is not None) + (report.kept_to_the_end or 0) == positives
    assert report.validation == {"valid_loss": [(1, 0.5)]}  # by epoch
    assert Path(bundle.uri).name in report.title
