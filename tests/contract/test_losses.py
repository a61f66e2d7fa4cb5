"""Every file in losses/ is held to this: what must be true of any objective, with its default options."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raycascade import plugins
from raycascade.batch import collate
from raycascade.errors import ConfigError
from raycascade.losses import LossOutput
from raycascade.shards import Shards
from raycascade.training.loop import Place, Run
from tests.objective_lists import CASE_A, CASE_C, CASE_P2, CASE_P3, ListCase, deep_case, list_case, loss_of
from tests.tiny_shards import train_config, write_shards

NAMES = plugins.names("losses")
SORTING = ("arf", "arf_v2", "lcron")  # with trained weights; their temperatures suit lists of forty
ABSOLUTE = ("bce", "icc", "rankflow")  # read the score itself; to all others only differences inside a list matter
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


def test_a_constant_per_request_and_stage_matters_only_where_the_score_itself_is_read(name: str):
    shifts = dict(zip(CASE_P3.stage_names, torch.tensor([[[4.0], [-7.0]], [[-2.5], [11.0]], [[0.3], [9.0]]]),
                      strict=True))
    moved = CASE_P3.with_scores({stage: s + shifts[stage] for stage, s in CASE_P3.scores.items()})
    before, gradients = _run(name, CASE_P3)
    after, moved_gradients = _run(name, moved)
    unchanged = after.total.item() == pytest.approx(before.total.item(), abs=1e-6)
    assert unchanged == (name not in ABSOLUTE)
    sums = [gradient_QC.sum(dim=1).abs().max().item() for gradient_QC in gradients + moved_gradients]
    assert (max(sums) < 1e-9) == (name not in ABSOLUTE)


def test_a_single_stage_is_trained_or_refused_in_clear_words(name: str):
    one = CASE_A.with_scores({"retriever": CASE_A.scores["retriever"]})
    if plugins.find("losses", name).min_stages == 1:
        assert _run(name, one)[0].total.isfinite()
    else:
        with pytest.raises(ConfigError, match=r"joins at least 2 stages, got \['retriever'\]; use bce or softmax"):
            loss_of(name, one)


def test_everything_trained_is_a_log_variance_in_the_state(name: str):
    loss = loss_of(name, CASE_P3)
    parameters = dict(loss.named_parameters())
    assert set(loss.state_dict()) == set(parameters)
    for parameter, value in parameters.items():
        assert "log_var/" in parameter
        assert (value.ndim, value.dtype, value.item()) == (0, torch.float32, 0.0)
    weighted = {part for part in _run(name, CASE_P3)[0].parts if part.startswith("log_var/")}
    assert {parameter.partition(".")[2] for parameter in parameters} == weighted
    assert bool(parameters) == (name in SORTING)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("deep") / "s"))


FIVE = [
    {"name": stage, "keep": keep, "exclude": ["pair"] if model == "two_tower" else [],
     "model": {"name": model, "dim": 4, "hidden": [8]}}
    for stage, keep, model in (("retriever", 50, "two_tower"), ("filter", 40, "mlp"), ("pre_ranker", 30, "mlp"),
                               ("ranker", 20, "din"), ("re_ranker", 10, "mlp"))
]


def test_a_cascade_of_five_stages_trains(name: str, shards: str):
    lists: dict[str, Any] = {"lists": {"k": 2, "quotas": [5, 4, 4, 3, 3]}}  # lists of six, at most one level deep
    options = {"bce": {"entry_levels": [0] * 5}}.get(name, {"temperature": 1.0} if name in SORTING else {})
    config = train_config(shards, stages=FIVE, loss={"name": name, **options}, changes=lists, train={"lr": 0.02})
    run = Run.build(config, Shards.open(shards), Place())
    batch = collate(run.shards.table("requests/train").slice(0, 48), run.shards.items, keep=run.cascade.quotas, k=2)
    start = {stage: [p.detach().clone() for p in model.parameters()] for stage, model in run.cascade.models.items()}
    totals = []
    for _ in range(20):
        run.optimisers.zero()
        output = run.objective(run.cascade, batch, run.catalogue, np.random.default_rng(0))
        output.total.backward()
        run.optimisers.step()
        totals.append(output.total.item())
    assert totals[-1] < totals[0] - 0.01 * abs(totals[0])
    for stage, model in run.cascade.models.items():
        changed = [not torch.equal(now, then) for now, then in zip(model.parameters(), start[stage], strict=True)]
        assert any(changed), f"{stage} did not learn"
