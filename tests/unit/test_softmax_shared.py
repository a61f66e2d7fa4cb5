"""Softmax over the list and over shared items: the same as if the items stood on every list."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycascade.batch import Targets
from raycascade.losses import LossOutput, SharedNegatives
from tests.objective_lists import CASE_A, CASE_C, ListCase, loss_of

ONE_STAGE = CASE_C.with_scores({"retriever": CASE_C.scores["retriever"]}).stacked(
    CASE_A.with_scores({"retriever": CASE_A.scores["retriever"]})).requests([0, 1, 1])
NUM_SHARED = 7


def shared_items(*, masked: bool = True, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [Q, S], mask [Q, S] and log q [S]."""
    generator = torch.Generator().manual_seed(seed)
    scores_QS = torch.randn(3, NUM_SHARED, generator=generator, dtype=torch.float64)
    mask_QS = torch.rand(3, NUM_SHARED, generator=generator) < 0.6 if masked else torch.ones(3, NUM_SHARED).bool()
    return scores_QS, mask_QS, -torch.rand(NUM_SHARED, generator=generator, dtype=torch.float64) * 4


def on_the_list(case: ListCase, mask_QS: Tensor, log_q_S: Tensor | None) -> Targets:
    """The targets with the shared items as candidates without any feedback behind the list."""
    t, zeros = case.targets, torch.zeros(mask_QS.shape, dtype=torch.float64)
    log_q_QC = None
    if log_q_S is not None:
        assert t.log_q_QC is not None
        log_q_QC = torch.cat([t.log_q_QC, log_q_S.expand(mask_QS.shape)], 1)
    return replace(
        t, relevance_QC=torch.cat([t.relevance_QC, zeros - 1], 1), mask_QC=torch.cat([t.mask_QC, mask_QS], 1),
        reached_QC=torch.cat([t.reached_QC, zeros.long()], 1), log_q_QC=log_q_QC,
        labels={name: torch.cat([label, zeros + torch.nan], 1) for name, label in t.labels.items()})


def outcome(
    case: ListCase, options: dict[str, Any], shared: tuple[Tensor, Tensor, Tensor | None], *, by_hand: bool
) -> tuple[LossOutput, Tensor, Tensor]:
    """The loss and its gradients by the list's scores and by the shared items' scores."""
    scores_QS, mask_QS, log_q_S = shared
    scores_QC, scores_QS = (x.clone().requires_grad_() for x in (case.scores["retriever"], scores_QS))
    loss = loss_of("softmax", case, **options)
    if by_hand:
        output = loss({"retriever": torch.cat([scores_QC, scores_QS], 1)}, on_the_list(case, mask_QS, log_q_S))
    else:
        output = loss({"retriever": scores_QC}, case.targets, SharedNegatives(scores_QS, mask_QS, log_q_S))
    output.total.backward()
    assert scores_QC.grad is not None
    assert scores_QS.grad is not None
    return output, scores_QC.grad, scores_QS.grad


def with_log_q(case: ListCase) -> ListCase:
    drawn = -torch.rand(case.targets.mask_QC.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return replace(case, targets=replace(case.targets, log_q_QC=3 * drawn))


OPTIONS = [{}, {"label": "click"}, {"temperature": 0.3}, {"label": "click", "negatives": "unobserved"}]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shared_negatives_are_negatives_on_every_list(options: dict[str, Any], corrected: bool):
    case, (scores_QS, mask_QS, log_q_S) = ONE_STAGE, shared_items()
    case = with_log_q(case) if corrected else case
    shared = (scores_QS, mask_QS, log_q_S if corrected else None)
    one, one_QC, one_QS = outcome(case, options, shared, by_hand=False)
    other, other_QC, other_QS = outcome(case, options, shared, by_hand=True)
    assert one.parts.keys() == other.parts.keys() == {"softmax/retriever"}
    for left, right in ((one.total, other.total), (one_QC, other_QC), (one_QS, other_QS)):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
    assert (one_QS[mask_QS] > 0).all()
    assert not one_QS[~mask_QS].any()


def test_masked_shared_items_do_not_matter_whatever_their_score():
    scores_QS, mask_QS, log_q_S = shared_items()
    wild_QS = torch.where(mask_QS, scores_QS, 1e9)
    case = with_log_q(ONE_STAGE)
    one, one_QC, _ = outcome(case, {}, (scores_QS, mask_QS, log_q_S), by_hand=False)
    other, other_QC, wild_grad_QS = outcome(case, {}, (wild_QS, mask_QS, log_q_S), by_hand=False)
    assert torch.equal(one.total, other.total)
    assert torch.equal(one_QC, other_QC)
    assert wild_grad_QS.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_items_that_are_all_masked_are_as_good_as_none(dtype: torch.dtype):
    case = ONE_STAGE.with_scores({"retriever": ONE_STAGE.scores["retriever"].to(dtype)})
    loss = loss_of("softmax", case)
    nothing = SharedNegatives(torch.ones(3, 5, dtype=dtype), torch.zeros(3, 5, dtype=torch.bool))
    assert torch.equal(loss(case.scores, case.targets, nothing).total, loss(case.scores, case.targets).total)
    # a list of nothing but positives then has no negative, and the request does not count
    alone = replace(case, targets=replace(case.targets, k=6))
    assert loss(alone.scores, alone.targets, nothing).total == 0.0


def test_one_positive_alone_on_its_list_is_held_against_the_shared_items_by_hand():
    case = ONE_STAGE.requests([1]).only(1)
    scores_S, log_q_S = torch.tensor([[0.5, -1.0, 2.0]]).double(), torch.tensor([0.5, 0.25, 0.125]).double().log()
    shared = SharedNegatives(scores_S, torch.tensor([[True, False, True]]), log_q_S)
    options = {"temperature": 2.0, "correction": 0.5}
    targets = replace(case.targets, log_q_QC=torch.full(case.targets.mask_QC.shape, 0.0625).double().log())
    total = loss_of("softmax", case, **options)(case.scores, targets, shared).total
    own = torch.exp(torch.tensor(1.2 / 2)) / 0.0625**0.5
    others = torch.exp(torch.tensor(0.25)) / 0.5**0.5 + torch.exp(torch.tensor(1.0)) / 0.125**0.5
    assert float(total) == pytest.approx(float(-torch.log(own / (own + others))), rel=1e-6)
    uncorrected = loss_of("softmax", case, temperature=2.0, correction=0.0)(case.scores, targets, shared).total
    own, others = (torch.exp(torch.tensor(x)) for x in (1.2 / 2, [0.25, 1.0]))
    assert float(uncorrected) == pytest.approx(float(-torch.log(own / (own + others.sum()))), rel=1e-6)


def test_a_correction_that_is_the_same_for_all_items_changes_nothing():
    scores_QS, mask_QS, _ = shared_items()
    bare = outcome(ONE_STAGE, {}, (scores_QS, mask_QS, None), by_hand=False)[0].total
    flat = replace(ONE_STAGE, targets=replace(ONE_STAGE.targets, log_q_QC=torch.full((3, 6), -2.5).double()))
    even = torch.full((NUM_SHARED,), -2.5, dtype=torch.float64)
    torch.testing.assert_close(outcome(flat, {}, (scores_QS, mask_QS, even), by_hand=False)[0].total, bare)


def test_unobserved_negatives_leave_out_what_was_shown_and_not_liked():
    """A list of 1, 0, NaN, 0, 1, 0 is then as a list of its first, third and fifth candidates."""
    case = ONE_STAGE.requests([1])
    options = {"label": "click", "negatives": "unobserved"}
    whole = loss_of("softmax", case, **options)(case.scores, case.targets).total
    chosen = case.take([0, 2, 4])
    for kind in ("all", "unobserved"):
        torch.testing.assert_close(
            loss_of("softmax", chosen, label="click", negatives=kind)(chosen.scores, chosen.targets).total, whole)
    assert loss_of("softmax", case, label="click")(case.scores, case.targets).total > whole + 0.1
    # where nothing is unobserved, only shared items are left to hold against the positives
    shown = case.take([0, 1, 3])
    assert loss_of("softmax", shown, **options)(shown.scores, shown.targets).total == 0.0
    shared = SharedNegatives(torch.zeros(1, 2).double(), torch.ones(1, 2, dtype=torch.bool))
    total = float(loss_of("softmax", shown, **options)(shown.scores, shown.targets, shared).total)
    assert total == pytest.approx(float(torch.log1p(2 / torch.exp(torch.tensor(1.2).double()))))
