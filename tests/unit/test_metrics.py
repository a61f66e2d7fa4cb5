import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from raycascade.batch import Targets
from raycascade.errors import DataError
from raycascade.metrics import BinaryMetrics, ListMetrics, ndcg, tie_keys
from tests.objective_lists import CASE_P2, CASES, ListCase, list_case


def _metrics(case: ListCase, **options: Any) -> ListMetrics:
    return ListMetrics(case.stage_names, case.targets.keep, case.targets.k, **options)


def _updated(case: ListCase, **options: Any) -> ListMetrics:
    metrics = _metrics(case, **options)
    num_requests, width = case.targets.mask_QC.shape
    items_QC = np.arange(num_requests * width).reshape(-1, width)
    metrics.update(case.scores, case.targets, list(range(num_requests)), items_QC)
    return metrics


def _about(*expected: float) -> Any:
    return pytest.approx(list(expected), abs=2e-6, rel=0)


# ---------------------------------------------------------------- known values
@pytest.mark.parametrize(("case", "joint", "stages", "ndcgs"), [
    ("A", 0.5, (0.5, 1), (0.725892, 0.682447)),
    ("B", 0.5, (1, 0.5, 1), (0.563514, 0.729598, 0.549994)),
    ("C", 0.833333, (0.833333, 0.833333), (1, 0.839865)),
])
def test_recall_and_ndcg_of_small_lists_have_the_known_values(case, joint, stages, ndcgs):
    known = CASES[case]
    result = _updated(known).result()
    assert result[f"joint_recall@2@{known.targets.keep[-1]}"] == pytest.approx(joint, abs=2e-6)
    recalls = [result[f"recall@2@{q}/{name}"] for name, q in zip(known.stage_names, known.targets.keep, strict=True)]
    assert recalls == _about(*stages)
    assert [result[f"ndcg@2/{name}"] for name in known.stage_names] == _about(*ndcgs)


@pytest.mark.parametrize(("case", "stages", "ndcgs"), [
    ("P2", ((0.7, 0.8), (0.6, 0.7)), ((0.399872, 0.430337), (0.505830, 0.459533))),
    ("P3", ((0.8, 0.8), (0.8, 0.7), (0.4, 0.7)), ((0.422542, 0.386192), (0.512435, 0.436034), (0.691936, 0.226748))),
])
def test_recall_and_ndcg_of_lists_of_protocol_size_have_the_published_values(case, stages, ndcgs):
    for q, joint in enumerate((0.5, 0.6)):
        known = CASES[case].requests([q])
        result = _updated(known).result()
        assert result["joint_recall@10@20"] == pytest.approx(joint)
        widths = zip(known.stage_names, known.targets.keep, strict=True)
        recalls = [result[f"recall@10@{width}/{name}"] for name, width in widths]
        assert recalls == pytest.approx([values[q] for values in stages])
        assert [result[f"ndcg@10/{name}"] for name in known.stage_names] == _about(*(values[q] for values in ndcgs))
    both = _updated(CASES[case]).result()
    assert both["joint_recall@10@20"] == pytest.approx(0.55)


def test_tied_scores_share_their_gain_in_ndcg():
    scores_QC, gains_QC = np.array([[0.5, 0.5, 0.2, 0.5]]), np.array([[3.0, 0.0, 2.0, 1.0]])
    mask_QC = np.ones((1, 4), bool)
    assert ndcg(scores_QC, gains_QC, mask_QC, 2)[0] == pytest.approx(0.510240, abs=2e-6)
    assert ndcg(scores_QC, gains_QC, mask_QC, 3)[0] == pytest.approx(0.596666, abs=2e-6)


@pytest.mark.parametrize("k", [1, 3, 5, 20])
def test_ndcg_equals_scikit_learn_on_random_lists_with_ties(k: int):
    generator = np.random.default_rng(5)
    scores_QC = generator.integers(0, 5, (40, 9)) / 4.0
    gains_QC = generator.integers(0, 6, (40, 9)).astype(float)
    mask_QC = generator.random((40, 9)) < 0.8
    mask_QC[:, :2] = True
    ours_Q = ndcg(np.where(mask_QC, scores_QC, np.nan), np.where(mask_QC, gains_QC, np.inf), mask_QC, k)
    theirs = [ndcg_score([y[m]], [s[m]], k=k) for s, y, m in zip(scores_QC, gains_QC, mask_QC, strict=True)]
    np.testing.assert_allclose(ours_Q, theirs, atol=1e-12)


def test_ndcg_is_zero_where_nothing_is_relevant():
    assert ndcg(np.array([[1.0, 0.0]]), np.zeros((1, 2)), np.ones((1, 2), bool), 2).tolist() == [0.0]


# ---------------------------------------------------------------- the funnel
def _plain_funnel(case: ListCase, q: int) -> list[set[int]]:
    left = {j for j in range(case.targets.mask_QC.shape[1]) if case.targets.mask_QC[q, j]}
    survivors = []
    for scores_QC, width in zip(case.scores.values(), case.targets.keep, strict=True):
        left = set(sorted(left, key=lambda j: -scores_QC[q, j].item())[:width])
        survivors.append(left)
    return survivors


@pytest.mark.parametrize("case", ["A", "B", "C", "P2", "P3"])
def test_the_survival_curve_equals_a_replay_of_the_funnel_in_plain_python(case: str):
    known = CASES[case]
    curves = []
    for q in range(len(known.targets.mask_QC)):
        y = {j: known.targets.relevance_QC[q, j].item() for j in range(known.targets.mask_QC.shape[1])
             if known.targets.mask_QC[q, j]}
        above = {j: sum(other > v for other in y.values()) for j, v in y.items()}
        t = {j: min(1.0, max(0.0, (known.targets.k - above[j]) / list(y.values()).count(v))) for j, v in y.items()}
        curves.append([sum(t[j] for j in left) / sum(t.values()) for left in _plain_funnel(known, q)])
    expected = np.mean(curves, axis=0)
    metrics = _updated(known)
    assert list(metrics.survival()) == list(known.stage_names)
    assert list(metrics.survival().values()) == pytest.approx(expected)
    assert metrics.result()[f"joint_recall@{known.targets.k}@{known.targets.keep[-1]}"] == pytest.approx(expected[-1])


def test_a_candidate_dropped_by_the_first_stage_cannot_be_saved_by_the_last():
    case = list_case([[0, 1, 1, 1], [9, 0, 0, 0]], (5, 1, 1, 1), (1, 0, 0, 0), keep=(3, 2), k=1)
    result = _updated(case).result()
    assert result["joint_recall@1@2"] == 0
    assert result["recall@1@2/pre_ranker"] == 1


def _random_case(num_requests: int, num_candidates: int, *, distinct_scores: int) -> ListCase:
    generator = torch.Generator().manual_seed(9)

    def draw(high: int) -> torch.Tensor:
        return torch.randint(0, high, (num_requests, num_candidates), generator=generator)

    mask_QC = torch.rand(num_requests, num_candidates, generator=generator) < 0.8
    mask_QC[:2] = False
    scores = {"retriever": draw(distinct_scores).double(), "ranker": draw(distinct_scores).double()}
    targets = Targets(draw(7).double(), draw(3), mask_QC, (6, 3), 4, {})
    return ListCase(scores, targets, ())


def test_shuffling_candidates_other_batches_and_other_shards_give_the_same_floats():
    case = _random_case(60, 12, distinct_scores=3)
    ids, items_QC = [f"request {q}" for q in range(60)], torch.randint(0, 1 << 40, (60, 12))
    whole = _metrics(case)
    whole.update(case.scores, case.targets, ids, items_QC)
    order, columns = list(range(60)), torch.randperm(12)
    random.Random(3).shuffle(order)
    workers = [_metrics(case), _metrics(case), _metrics(case)]
    for start in range(0, 60, 7):
        rows = order[start : start + 7]
        part = case.requests(rows).take(columns)
        worker = workers[start // 7 % 3]
        worker.update(part.scores, part.targets, [ids[q] for q in rows], items_QC[rows][:, columns])
    for worker in workers[1:]:
        workers[0].merge(worker)
    assert workers[0].result() == whole.result()
    assert (workers[0].num_requests, workers[0].num_skipped) == (whole.num_requests, whole.num_skipped) == (58, 2)


def test_equal_scores_give_the_recall_of_a_random_choice_and_not_one():
    num_requests, width = 4000, 40
    flat = {name: torch.zeros(num_requests, width) for name in CASE_P2.scores}
    targets = CASE_P2.requests([0] * num_requests).targets
    metrics = ListMetrics(tuple(flat), (30, 20), 10)
    metrics.update(flat, targets, range(num_requests), np.tile(np.arange(width), (num_requests, 1)))
    result = metrics.result()
    assert result["joint_recall@10@20"] == pytest.approx(20 / 40, abs=0.01)
    assert result["recall@10@30/retriever"] == pytest.approx(30 / 40, abs=0.01)
    drawn = ListMetrics(tuple(flat), (30, 20), 10)
    drawn.update(flat, targets, (), None)
    assert drawn.result()["joint_recall@10@20"] == pytest.approx(20 / 40, abs=0.01)


def test_tie_keys_depend_on_the_seed_the_request_and_the_item_alone():
    items_QC = np.array([[5, 6], [6, 5]])
    keys_QC = tie_keys(1024, ["a", "a"], items_QC)
    assert keys_QC[0, 0] == keys_QC[1, 1]
    assert keys_QC[0, 1] == keys_QC[1, 0]
    assert len({*keys_QC.reshape(-1), *tie_keys(1024, ["b", "c"], items_QC).reshape(-1)}) == 6
    assert (tie_keys(1, ["a", "a"], items_QC) != keys_QC).all()
    assert tie_keys(1024, [7], torch.tensor([[5]])).dtype == np.uint64
    with pytest.raises(DataError, match="1 request ids for 2 requests"):
        tie_keys(1024, ["a"], items_QC)


def test_padding_may_hold_anything():
    for value in (math.nan, math.inf, 1e9):
        padded = CASES["C"].padded(value)
        assert _updated(padded).result() == pytest.approx(_updated(CASES["C"]).result())


def test_a_nan_score_is_refused_by_the_name_of_its_stage():
    case = CASES["A"].with_scores({**CASES["A"].scores, "pre_ranker": torch.full((1, 6), torch.nan)})
    with pytest.raises(DataError, match="'pre_ranker' scored NaN"):
        _updated(case)


def test_requests_without_candidates_are_skipped_and_counted():
    case = CASES["A"].stacked(CASES["A"].only(0))
    metrics = _updated(case)
    assert (metrics.num_requests, metrics.num_skipped) == (1, 1)
    assert metrics.result()["joint_recall@2@3"] == pytest.approx(0.5)
    empty = _updated(CASES["A"].only(0))
    assert empty.result() == {}
    assert empty.num_skipped == 1


def test_batch_means_drop_the_last_short_batch():
    ones, zeros = CASES["A"], CASES["A"].with_scores({n: -CASES["A"].targets.relevance_QC for n in CASES["A"].scores})
    metrics = _metrics(ones, batch_means=2)
    for case in (ones.stacked(ones), ones.stacked(zeros), zeros):
        metrics.update(case.scores, case.targets, (), None)
    assert metrics.result()["joint_recall@2@3"] == pytest.approx((0.5 + 0.25) / 2)


# ---------------------------------------------------------------- one stage, one label
def _rows(num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(4)
    logits = generator.integers(-6, 7, num_rows) / 2.0
    labels = (generator.random(num_rows) < 1 / (1 + np.exp(-0.7 * logits))).astype(np.float64)
    return logits, labels, generator.integers(0, 30, num_rows)


def test_auc_gauc_and_log_loss_equal_scikit_learn():
    logits, labels, groups = _rows(400)
    labels[groups == 3] = 1.0
    metrics = BinaryMetrics()
    metrics.update(logits, labels, groups)
    result = metrics.result()
    assert result["auc"] == pytest.approx(roc_auc_score(labels, logits))
    assert result["logloss"] == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits))))
    per_group = [(roc_auc_score(labels[groups == g], logits[groups == g]), (groups == g).sum())
                 for g in np.unique(groups) if 0 < labels[groups == g].mean() < 1]
    expected = sum(auc * rows for auc, rows in per_group) / sum(rows for _, rows in per_group)
    assert result["gauc"] == pytest.approx(expected)
    assert metrics.num_skipped_groups() == len(np.unique(groups)) - len(per_group) >= 1


def test_auc_counts_a_tie_as_half():
    metrics = BinaryMetrics()
    metrics.update(np.array([1.0, 1.0, 0.0, 2.0]), np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4, np.int64))
    assert metrics.result()["auc"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_binary_metrics_do_not_depend_on_order_batches_or_shards():
    logits, labels, groups = _rows(300)
    whole, first, second = BinaryMetrics(), BinaryMetrics(), BinaryMetrics()
    whole.update(torch.from_numpy(logits), torch.from_numpy(labels), [f"user {g}" for g in groups])
    order = np.random.default_rng(1).permutation(300)
    for metrics, rows in ((second, order[:17]), (first, order[17:200]), (second, order[200:])):
        metrics.update(logits[rows], labels[rows], np.array([f"user {g}" for g in groups[rows]]))
    first.merge(second)
    assert first.result() == whole.result()
    assert first.num_rows == 300


def test_unobserved_labels_and_padding_are_left_out():
    padded, plain = BinaryMetrics(), BinaryMetrics()
    logits_QC, labels_QC = np.array([[0.3, -1.0, np.nan], [2.0, 0.1, 0.0]]), np.array([[1, 0, np.nan], [1, np.nan, 0]])
    padded.update(logits_QC, labels_QC, ["a", "b"])
    plain.update(np.array([0.3, -1.0, 2.0, 0.0]), np.array([1.0, 0, 1, 0]), ["a", "a", "b", "b"])
    assert padded.result() == plain.result()
    assert padded.num_rows == 4


def test_a_calibrated_prediction_has_no_error_and_a_shifted_one_has_its_shift():
    rates = np.repeat((np.arange(20) + 0.5) / 20, 200)
    labels = np.concatenate([np.arange(200) < round(200 * rate) for rate in np.unique(rates)]).astype(float)
    for shift, expected in ((0.0, 0.0), (0.02, 0.02)):
        metrics = BinaryMetrics()
        predicted = rates + shift
        metrics.update(np.log(predicted / (1 - predicted)), labels, np.zeros(4000, np.int64))
        assert metrics.result()["calibration_error"] == pytest.approx(expected, abs=1e-9)
        curve = metrics.calibration_curve()
        np.testing.assert_allclose(curve[0], np.unique(predicted))
        np.testing.assert_allclose(curve[1], np.unique(rates))
        assert curve[2].tolist() == [200] * 20


def test_a_constant_prediction_is_judged_by_the_overall_rate():
    metrics = BinaryMetrics()
    metrics.update(np.zeros(100), (np.arange(100) < 30).astype(float), np.zeros(100, np.int64))
    assert metrics.result()["calibration_error"] == pytest.approx(0.2)
    assert metrics.result()["auc"] == pytest.approx(0.5)


def test_what_is_not_defined_is_nan():
    metrics = BinaryMetrics()
    assert all(math.isnan(value) for value in metrics.result().values())
    metrics.update(np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([1, 2]))
    assert math.isnan(metrics.result()["auc"])
    assert math.isnan(metrics.result()["gauc"])
    assert metrics.result()["logloss"] > 0


def test_rows_that_do_not_fit_together_are_refused():
    with pytest.raises(DataError, match="2 logits, 3 labels and 2 group ids"):
        BinaryMetrics().update(np.zeros(2), np.zeros(3), np.zeros(2, np.int64))
    with pytest.raises(DataError, match="a logit is NaN"):
        BinaryMetrics().update(np.array([np.nan]), np.array([1.0]), np.array([1]))


def test_scores_of_other_stages_are_refused():
    metrics = _metrics(CASES["A"])
    turned = replace(CASES["A"], scores=dict(reversed(CASES["A"].scores.items())))
    with pytest.raises(DataError, match="in this order"):
        metrics.update(turned.scores, turned.targets, [0], np.zeros((1, 6), np.int64))
