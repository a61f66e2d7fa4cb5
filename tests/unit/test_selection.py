"""Where true items are lost on a list, and which later stage wanted them."""

import random

import numpy as np
import pytest
import torch

from raycascade.batch import Targets
from raycascade.metrics import ListMetrics, tie_keys
from raycascade.selection import coordination, first, funnel, ranks
from tests.objective_lists import CASES, ListCase, list_case

STAGES, QUOTAS, K = ("retriever", "pre_ranker", "ranker"), (7, 5, 3), 4


def measured(case: ListCase) -> dict[str, float]:
    metrics = ListMetrics(case.stage_names, case.targets.keep, case.targets.k)
    num_requests, width = case.targets.mask_QC.shape
    metrics.update(case.scores, case.targets, range(num_requests), np.arange(num_requests * width).reshape(-1, width))
    return metrics.result()


def random_case(num_requests: int = 80, num_candidates: int = 12) -> ListCase:
    """Few distinct scores and relevances, so that ties cross every border, and lists of any length, none included."""
    generator = torch.Generator().manual_seed(4)

    def draw(high: int) -> torch.Tensor:
        return torch.randint(0, high, (num_requests, num_candidates), generator=generator)

    mask_QC = torch.rand(num_requests, num_candidates, generator=generator) < 0.8
    mask_QC[0] = False
    mask_QC[1, 2:] = False
    scores = {name: draw(4).double() for name in STAGES}
    return ListCase(scores, Targets(draw(6).double(), draw(3), mask_QC, QUOTAS, K, {}), ())


def in_plain_python(case: ListCase, q: int, keys: np.ndarray) -> dict[str, float]:
    """The definition, request by request, with lists and sets."""
    real = [j for j in range(case.targets.mask_QC.shape[1]) if case.targets.mask_QC[q, j]]
    y = {j: case.targets.relevance_QC[q, j].item() for j in real}
    better = {j: sum(other > y[j] for other in y.values()) for j in real}
    t = {j: min(1.0, max(0.0, (case.targets.k - better[j]) / list(y.values()).count(y[j]))) for j in real}

    def best(stage: str, among: set[int]) -> set[int]:
        by_score = sorted(among, key=lambda j: (-case.scores[stage][q, j].item(), int(keys[j])))
        return set(by_score[: case.targets.keep[STAGES.index(stage)]])

    entered, found = set(real), {}
    for i, stage in enumerate(STAGES):
        kept, later = best(stage, entered), STAGES[i + 1:]
        lost = entered - kept
        share = sum(t.values())
        found[f"lost/{stage}"] = sum(t[j] for j in lost) / share
        wanted = {name: best(name, entered) for name in later}
        for name in later:
            found[f"lost_wanted/{stage}/{name}"] = sum(t[j] for j in lost & wanted[name]) / share
        if later:
            anybody = set().union(*wanted.values())
            found[f"lost_wanted/{stage}"] = sum(t[j] for j in lost & anybody) / share
            found[f"wasted/{stage}"] = len(kept - anybody) / len(kept)
        entered = kept
    return found


def test_losses_of_a_list_by_hand():
    # Truth: items 0 and 1. The first stage drops 1, which the last one ranks first; 3 is kept and wanted by nobody.
    case = list_case([[4, 0, 2, 3, 1], [5, 4, 3, 2, 1], [1, 9, 5, 0, 4]], (9, 8, 1, 1, 1), (1, 1, 0, 0, 0),
                     keep=(3, 2, 1), k=2)
    result = measured(case)
    assert result["joint_recall@2@1"] == 0
    # Entered: 0-4, kept 0, 3, 2. pre_ranker would keep 0, 1; ranker would keep 1.
    assert (result["lost/retriever"], result["lost_wanted/retriever"]) == (0.5, 0.5)
    assert result["lost_wanted/retriever/pre_ranker"] == result["lost_wanted/retriever/ranker"] == 0.5
    assert result["wasted/retriever"] == pytest.approx(2 / 3)
    # Entered: 0, 2, 3, kept 0, 2. The ranker would keep 2.
    assert (result["lost/pre_ranker"], result["lost_wanted/pre_ranker"], result["wasted/pre_ranker"]) == (0, 0, 0.5)
    # Entered: 0, 2, kept 2.
    assert result["lost/ranker"] == 0.5
    assert "lost_wanted/ranker" not in result
    assert "wasted/ranker" not in result


def test_losses_equal_their_definition_in_plain_python():
    case = random_case()
    rows = [q for q in range(80) if case.targets.mask_QC[q].any()]
    assert len(rows) == 79
    keys_QC = tie_keys(1024, range(80), np.arange(80 * 12).reshape(80, 12))
    by_hand = [in_plain_python(case, q, keys_QC[q]) for q in rows]
    result = measured(case)
    names = [name for name in result if name.startswith(("lost", "wasted"))]
    assert set(names) == set(by_hand[0])
    assert len(names) == 10
    for name in names:
        expected = np.mean([request[name] for request in by_hand])
        assert result[name] == pytest.approx(expected, abs=1e-11)
        assert 0.01 < expected < 0.9, "a figure that is always 0 or 1 tests nothing"


@pytest.mark.parametrize("case", [*CASES.values(), random_case()])
def test_what_is_lost_and_the_joint_recall_make_up_the_truth(case: ListCase):
    result = measured(case)
    lost = sum(result[f"lost/{stage}"] for stage in case.stage_names)
    assert lost + result[f"joint_recall@{case.targets.k}@{case.targets.keep[-1]}"] == pytest.approx(1.0, abs=1e-10)
    for stage in case.stage_names[:-1]:
        by_whom = [value for name, value in result.items() if name.startswith(f"lost_wanted/{stage}/")]
        assert max(by_whom) - 1e-10 <= result[f"lost_wanted/{stage}"] <= min(result[f"lost/{stage}"], sum(by_whom))


def test_order_batches_and_workers_leave_the_losses_unchanged():
    case = random_case()
    items_QC, order, columns = np.arange(80 * 12).reshape(80, 12), list(range(80)), torch.randperm(12)
    random.Random(3).shuffle(order)
    workers = [ListMetrics(STAGES, QUOTAS, K) for _ in range(3)]
    for start in range(0, 80, 9):
        rows = order[start : start + 9]
        part = case.requests(rows).take(columns)
        workers[start % 3].update(part.scores, part.targets, rows, items_QC[rows][:, columns])
    for worker in workers[1:]:
        workers[0].merge(worker)
    assert workers[0].result() == measured(case)


def test_stages_of_one_mind_lose_nothing_that_another_wants_if_their_widths_fall():
    """Equal scores: what stage i drops is outside every narrower list, ties included."""
    case = random_case()
    same = case.with_scores(dict.fromkeys(STAGES, case.scores["ranker"]))
    result = measured(same)
    assert {value for name, value in result.items() if name.startswith("lost_wanted")} == {0.0}
    assert result["lost/retriever"] > 0


def test_a_first_stage_that_knows_nothing_loses_what_the_perfect_later_ones_want():
    relevance_QC = torch.arange(12.0).expand(200, 12).double()
    draw_QC = torch.rand(200, 12, generator=torch.Generator().manual_seed(1)).double()
    targets = Targets(relevance_QC, relevance_QC.long(), torch.ones(200, 12, dtype=torch.bool), QUOTAS, 3, {})
    scores = {"retriever": draw_QC, "pre_ranker": relevance_QC, "ranker": relevance_QC}
    result = measured(ListCase(scores, targets, ()))
    assert result["lost/retriever"] == pytest.approx(5 / 12, abs=0.05)
    assert result["lost_wanted/retriever"] == result["lost_wanted/retriever/ranker"] == result["lost/retriever"]
    assert result["lost/pre_ranker"] == result["lost/ranker"] == 0


def test_those_not_alive_are_never_among_the_first_whatever_their_score_is():
    scores_QC, keys_QC = np.array([[5.0, np.nan, 1.0, 1.0]]), np.array([[1, 2, 4, 3]], np.uint64)
    alive_QC = np.array([[False, False, True, True]])
    assert first(scores_QC, 1, keys_QC, alive_QC).tolist() == [[False, False, False, True]]
    assert first(scores_QC, 9, keys_QC, alive_QC).tolist() == alive_QC.tolist()
    assert ranks(scores_QC, keys_QC, alive_QC)[0, 2:].tolist() == [1, 0]


def test_a_request_without_candidates_costs_nothing():
    flat_QC, none_QC = np.zeros((1, 3)), np.zeros((1, 3), bool)
    keys_QC, scores = np.zeros((1, 3), np.uint64), {"a": flat_QC, "b": flat_QC}
    survivors = funnel(scores, (2, 1), keys_QC, none_QC)
    found = coordination(scores, (2, 1), keys_QC, none_QC, flat_QC, survivors)
    assert all(values_Q.tolist() == [0.0] for values_Q in found.values())
