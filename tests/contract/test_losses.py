"""Every file in losses/ is held to this: what must be true of any objective, with its default options."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raycascade import plugins
from raycascade.losses import LossOutput
from tests.objective_lists import CASE_A, CASE_C, CASE_P2, CASE_P3, ListCase, deep_case, list_case, loss_of

NAMES = plugins.names("losses")
CASES = {"C": CASE_C, "P2": CASE_P2, "P3": CASE_P3}

pytestmark = pytest.mark.parametrize("name", NAMES)


def _run(
    name: str, case: ListCase, dtype: torch.dtype = torch.float64, *, scale: float = 1.0
) -> tuple[LossOutput, list[Tensor]]:
    """The output, and the gradient of the total in each stage's scores."""
    leaves = case.leaves(dtype, scale=scale)
    output = loss_of(name, case)(leaves, case.targets)
    output.total.backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    assert len(gradients) == len(leaves), "a stage is not in the graph"
    return output, gradients


@pytest.mark.parametrize("case", CASES)
def test_the_total_is_a_number_with_a_graph_and_the_parts_are_detached_numbers(name: str, case: str):
    output, _ = _run(name, CASES[case])
    assert output.total.ndim == 0
    assert output.total.requires_grad
    assert output.parts
    for part in output.parts.values():
        assert part.ndim == 0
        assert not part.requires_grad
        assert part.isfinite()


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_the_candidates_does_not_matter(name: str, case: str):
    known = CASES[case]
    permutation = torch.randperm(known.targets.mask_QC.shape[1], generator=torch.Generator().manual_seed(11))
    before, before_gradients = _run(name, known)
    after, after_gradients = _run(name, known.take(permutation))
    assert after.total.item() == pytest.approx(before.total.item(), abs=1e-6)
    for gradient_QC, permuted_QC in zip(before_gradients, after_gradients, strict=True):
        torch.testing.assert_close(permuted_QC, gradient_QC[:, permutation], rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e9])
@pytest.mark.parametrize("case", CASES)
def test_padding_may_hold_anything_and_gets_no_gradient(name: str, case: str, value: float):
    known = CASES[case]
    before, before_gradients = _run(name, known)
    after, after_gradients = _run(name, known.padded(value))
    assert after.total.item() == pytest.approx(before.total.item(), abs=1e-6)
    for gradient_QC, padded_QC in zip(before_gradients, after_gradients, strict=True):
        torch.testing.assert_close(padded_QC[:, 1:-2], gradient_QC, rtol=0, atol=1e-6)
        assert padded_QC[:, :1].abs().max() == 0
        assert padded_QC[:, -2:].abs().max() == 0


def test_a_masked_candidate_in_the_middle_equals_its_absence(name: str):
    noisy = CASE_C.with_scores({n: torch.where(CASE_C.targets.mask_QC, s, torch.nan) for n, s in CASE_C.scores.items()})
    with_hole, gradients = _run(name, noisy)
    without, _ = _run(name, CASE_C.take([0, 1, 3, 4, 5]))
    assert with_hole.total.item() == pytest.approx(without.total.item(), abs=1e-6)
    assert all(gradient_QC[0, 2] == 0 for gradient_QC in gradients)


@pytest.mark.parametrize("case", CASES)
def test_extreme_scores_give_a_finite_total_and_finite_gradients(name: str, case: str):
    for scale in (1e3, 1e6):
        output, gradients = _run(name, CASES[case], torch.float32, scale=scale)
        assert output.total.isfinite()
        assert all(gradient_QC.isfinite().all() for gradient_QC in gradients)


@pytest.mark.parametrize("inside_autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_computed_in_float32(name: str, dtype: torch.dtype, inside_autocast: bool):
    half = CASE_P2.with_scores({n: s.to(dtype) for n, s in CASE_P2.scores.items()})
    full = CASE_P2.with_scores({n: s.float() for n, s in half.scores.items()})
    expected = loss_of(name, full)(full.scores, full.targets).total
    with torch.autocast("cpu", torch.bfloat16, enabled=inside_autocast):
        total = loss_of(name, half)(half.scores, half.targets).total
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)


def test_float64_stays_float64_and_float32_agrees_with_it(name: str):
    for case in CASES.values():
        wide, narrow = _run(name, case)[0].total, _run(name, case, torch.float32)[0].total
        assert wide.dtype == torch.float64
        assert narrow.item() == pytest.approx(wide.item(), rel=2e-5)


@pytest.mark.parametrize("case", ["P2", "P3"])
def test_every_stage_gets_a_gradient(name: str, case: str):
    for gradient_QC in _run(name, CASES[case])[1]:
        assert gradient_QC.abs().max().item() > 0


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5])
def test_any_depth_goes_through_the_same_code(name: str, num_stages: int):
    case = deep_case(num_stages)
    output, gradients = _run(name, case)
    assert output.total.isfinite()
    assert all(gradient_QC.abs().max().item() > 0 for gradient_QC in gradients)
    for term in {part.partition("/")[0] for part in output.parts if "/" in part}:
        stages = [part.partition("/")[2] for part in output.parts if part.startswith(f"{term}/")]
        assert [stage for stage in case.stage_names if stage in stages] == stages, f"{term} is not in cascade order"


def test_a_request_without_candidates_changes_nothing(name: str):
    before, _ = _run(name, CASE_A)
    after, gradients = _run(name, CASE_A.stacked(CASE_A.only(0)))
    assert after.total.item() == pytest.approx(before.total.item(), abs=1e-6)
    assert all(gradient_QC[1].abs().max() == 0 for gradient_QC in gradients)


def test_requests_with_nothing_to_learn_from_give_zero_and_backward_works(name: str):
    output, gradients = _run(name, CASE_P2.only(0))
    assert output.total.item() == 0
    assert all(gradient_QC.abs().max() == 0 for gradient_QC in gradients)


def test_requests_are_averaged_and_not_summed(name: str):
    once, twice = _run(name, CASE_A)[0].total.item(), _run(name, CASE_A.stacked(CASE_A))[0].total.item()
    assert twice == pytest.approx(once, abs=1e-6)


def test_the_inputs_are_left_alone(name: str):
    scores = {stage: s.clone() for stage, s in CASE_C.scores.items()}
    targets = replace(CASE_C.targets, relevance_QC=CASE_C.targets.relevance_QC.clone())
    loss_of(name, CASE_C)(scores, targets)
    assert all(torch.equal(scores[stage], s) for stage, s in CASE_C.scores.items())
    assert torch.equal(targets.relevance_QC, CASE_C.targets.relevance_QC)


def test_the_same_call_gives_the_same_float(name: str):
    assert _run(name, CASE_P3)[0].total.item() == _run(name, CASE_P3)[0].total.item()


def test_a_step_against_the_gradient_lowers_the_total(name: str):
    case = list_case(
        [torch.linspace(-1, 1, 12, dtype=torch.float64)[None] * s for s in (1.0, -0.7)],
        (12, 11, 10, *[5] * 5, *[1] * 4), (2, 2, 2, *[1] * 5, *[0] * 4), keep=(8, 5), k=3,
    )
    before, gradients = _run(name, case)
    step = 1e-3 / max(gradient_QC.norm().item() for gradient_QC in gradients)
    moved = {stage: s - step * g for (stage, s), g in zip(case.scores.items(), gradients, strict=True)}
    assert _run(name, case.with_scores(moved))[0].total.item() < before.total.item()
