import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from raycascade.errors import ConfigError
from raycascade.losses._uncertainty import UncertaintyWeights
from tests.objective_lists import (
    CASE_A,
    CASE_B,
    CASE_C,
    CASE_P2,
    CASE_P3,
    CASES,
    deep_case,
    gradients_of,
    loss_of,
    output_of,
    parts_of,
)

FLAG = {"official_three_stage_negatives": True}
KEEP = {"joint_k": "keep"}
DFTOPK = {"operator": "dftopk"}
SOFTSORT = {"operator": "softsort"}


def _about(*expected: float) -> Any:
    return pytest.approx(list(expected), abs=2e-6, rel=0)


# ---------------------------------------------------------------- lcron: known values
LCRON = [
    ("A", {"temperature": 1}, 1.906085), ("B", {"temperature": 1}, 3.693713), ("C", {"temperature": 1}, 1.469419),
    ("A", {}, 1.406543), ("B", {}, 2.057380), ("C", {}, 1.490515),
    ("B", {"temperature": 1, **FLAG}, 4.281680), ("B", FLAG, 2.264546),
    ("A", {"temperature": 1, **KEEP}, 1.256176), ("A", KEEP, 1.233649),
    ("B", {"temperature": 1, **KEEP}, 2.388013), ("B", KEEP, 1.578785),
    ("A", SOFTSORT, 1.283098), ("C", SOFTSORT, 1.329066),
    ("A", DFTOPK, 1.177715), ("B", DFTOPK, 1.896218), ("C", DFTOPK, 1.287729),
    ("A", {"temperature": 1, "log_form": "exact"}, 1.906142),
    ("P2", {}, 1.347129), ("P3", {}, 1.827231), ("P3", FLAG, 4.270255),
    ("P2", {"temperature": 1}, 5.274865), ("P3", {"temperature": 1}, 5.299960),
    ("P3", {"temperature": 1, **FLAG}, 9.708885),
    ("P2", KEEP, 1.182120), ("P3", KEEP, 1.291639),
    ("P2", {"temperature": 50, **SOFTSORT}, 1.301740), ("P3", {"temperature": 50, **SOFTSORT}, 1.720801),
    ("P2", DFTOPK, 1.311842), ("P3", DFTOPK, 1.604062), ("P2", {"temperature": 500, **DFTOPK}, 1.254859),
]


@pytest.mark.parametrize(("case", "options", "expected"), LCRON)
def test_lcron_has_the_published_value(case: str, options: dict[str, Any], expected: float):
    assert output_of("lcron", CASES[case], options).total.item() == pytest.approx(expected, abs=2e-6, rel=0)
    single = loss_of("lcron", CASES[case], **options)(CASES[case].leaves(torch.float32), CASES[case].targets).total
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("case", "options", "e2e", "single"), [
    ("A", {"temperature": 1}, 1.095939, (1.228180, 0.392113)),
    ("B", {"temperature": 1}, 2.005570, (1.101866, 1.485472, 0.788949)),
    ("C", {"temperature": 1}, 0.791245, (0.685574, 0.670775)),
    ("A", {}, 0.786298, (0.629740, 0.610750)),
    ("B", {}, 1.111287, (0.635102, 0.633761, 0.623324)),
    ("B", {"temperature": 1, **FLAG}, 2.005570, (1.606569, 1.654812, 1.290840)),
    ("A", SOFTSORT, 0.704454, (0.697619, 0.459669)),
    ("A", DFTOPK, 0.606552, (0.653637, 0.488689)),
    ("B", DFTOPK, 0.909572, (0.687645, 0.686535, 0.599112)),
    ("A", {"temperature": 1, "log_form": "exact"}, 1.095977, (1.228217, 0.392114)),
    ("A", {"temperature": 1, **KEEP}, 0.446029, (1.228180, 0.392113)),
    ("A", KEEP, 0.613404, (0.629740, 0.610750)),
    ("B", {"temperature": 1, **KEEP}, 0.699870, (1.101866, 1.485472, 0.788949)),
    ("B", KEEP, 0.632692, (0.635102, 0.633761, 0.623324)),
    ("P2", {}, 0.767214, (0.590858, 0.568972)),
    ("P3", {}, 1.039210, (0.536342, 0.526458, 0.513243)),
    ("P3", FLAG, 1.039210, (2.197209, 2.173596, 2.091284)),
    ("P2", {"temperature": 1}, 2.955587, (2.376518, 2.262038)),
    ("P3", {"temperature": 1}, 2.527410, (2.040837, 1.911136, 1.593127)),
    ("P2", KEEP, 0.602205, (0.590858, 0.568972)),
    ("P3", KEEP, 0.503618, (0.536342, 0.526458, 0.513243)),
])
def test_the_terms_of_lcron_have_the_published_values(case, options, e2e, single):
    output = output_of("lcron", CASES[case], options)
    assert output.parts["e2e"].item() == pytest.approx(e2e, abs=2e-6, rel=0)
    assert parts_of(output, "single/") == _about(*single)
    assert parts_of(output, "log_var/") == [0.0] * len(single)


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [(-0.112879, -1.303694, 0.311828, 0.529884, 0.525299, 0.049561),
          (-0.401968, -0.041383, 0.058494, 0.320494, -0.013280, 0.077643)]),
    ({"negative_form": "direct"}, [(-0.106202, -1.245686, 0.311945, 0.514332, 0.501636, 0.023976),
                                   (-0.401722, -0.038777, 0.066178, 0.329856, -0.003040, 0.047505)]),
])
def test_the_gradient_of_lcron_is_the_published_one(options, expected):
    for gradient_QC, values in zip(gradients_of("lcron", CASE_A, {"temperature": 1, **options}), expected, strict=True):
        assert gradient_QC[0].tolist() == _about(*values)


def test_the_gradient_of_the_last_of_three_stages_is_the_published_one():
    last_QC = gradients_of("lcron", CASE_B, {"temperature": 1})[-1]
    assert last_QC[0].tolist() == _about(-0.434330, 0.013834, 0.250583, 0.041464, 0.129240, -0.000791)


def test_the_gradient_norms_of_lcron_on_lists_of_forty_are_the_published_ones():
    norms = [gradient_QC.norm().item() for gradient_QC in gradients_of("lcron", CASE_P2, {})]
    assert norms == _about(0.054867, 0.049624)


def test_the_direct_negative_form_agrees_in_value_and_differs_in_gradient():
    forms = [{"temperature": 1, "negative_form": form} for form in ("complement", "direct")]
    complement, direct = (output_of("lcron", CASE_A, form).total.item() for form in forms)
    assert direct == pytest.approx(complement, abs=2e-5)
    ours, theirs = (torch.cat(gradients_of("lcron", CASE_A, form), dim=1)[0] for form in forms)
    assert 0.95 < torch.cosine_similarity(ours, theirs, dim=0).item() < 0.9999


def test_lcron_is_the_mean_over_the_requests_that_have_more_than_k_candidates():
    turned = CASE_A.with_scores({"retriever": -CASE_A.scores["retriever"], "pre_ranker": CASE_A.scores["pre_ranker"]})
    assert output_of("lcron", turned, {"temperature": 1}).total.item() == pytest.approx(3.032221, abs=2e-6)
    both = output_of("lcron", CASE_A.stacked(turned), {"temperature": 1}).total.item()
    assert both == pytest.approx(2.469153, abs=2e-6)
    with_short = output_of("lcron", CASE_A.stacked(CASE_A.only(2)), {"temperature": 1}).total.item()
    assert with_short == pytest.approx(1.906085, abs=2e-6)


def _set_log_vars(loss: Any, *values: float) -> None:
    with torch.no_grad():
        for parameter, value in zip(loss.parameters(), values, strict=True):
            parameter.fill_(value)


def test_lcron_weighs_its_single_terms_by_the_log_variances():
    loss = loss_of("lcron", CASE_A, temperature=1)
    _set_log_vars(loss, 0.4, -0.3)
    output = loss(CASE_A.scores, CASE_A.targets)
    assert output.total.item() == pytest.approx(1.822224, abs=2e-6)
    assert parts_of(output, "log_var/") == _about(0.4, -0.3)


def test_the_end_to_end_term_can_be_weighted_too():
    loss = loss_of("lcron", CASE_A, temperature=1, weight_e2e=True)
    _set_log_vars(loss, 0.0, 0.0, 0.5)
    expected = math.exp(-0.5) * 1.095939 / 2 + 0.25 + (1.228180 + 0.392113) / 2
    output = loss(CASE_A.scores, CASE_A.targets)
    assert output.total.item() == pytest.approx(expected, abs=3e-6)
    assert output.parts["log_var/e2e"].item() == 0.5


def test_fixed_weights_replace_the_trained_ones():
    options = {"temperature": 1, "uncertainty": False, "single_weight": 0.1}
    loss = loss_of("lcron", CASE_A, **options)
    assert list(loss.parameters()) == []
    output = loss(CASE_A.scores, CASE_A.targets)
    assert output.total.item() == pytest.approx(1.095939 + 0.1 * (1.228180 + 0.392113), abs=3e-6)
    assert not parts_of(output, "log_var/")


@pytest.mark.parametrize(("num_stages", "width", "options", "expected"), [
    (2, 40, {}, 1.303881), (3, 50, {}, 1.722665), (3, 50, FLAG, 4.132613), (2, 40, DFTOPK, 1.255482),
    (3, 50, DFTOPK, 1.562434),
])
def test_lcron_at_equal_scores_has_its_closed_form(num_stages, width, options, expected):
    case = {40: CASE_P2, 50: CASE_P3}[width]
    flat = case.with_scores({name: torch.zeros_like(s) for name, s in case.scores.items()})
    assert len(flat.scores) == num_stages
    assert output_of("lcron", flat, options).total.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("sign", "expected", "tolerance"), [(1, 0.0, 1e-5), (-1, 13.8155, 1e-3)])
def test_a_perfect_and_a_reversed_order_reach_the_ends_of_the_eps_form(sign, expected, tolerance):
    case = CASE_P2.with_scores({name: sign * CASE_P2.targets.relevance_QC for name in CASE_P2.scores})
    assert output_of("lcron", case, {"temperature": 1e-3}).total.item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("temperature", [None, 1e-3])
@pytest.mark.parametrize("log_form", ["eps", "exact"])
@pytest.mark.parametrize("operator", ["neuralsort", "softsort", "dftopk"])
@pytest.mark.parametrize("form", ["complement", "direct"])
def test_lcron_stays_finite_at_a_thousandfold_scale_in_float32(operator, log_form, temperature, form):
    for case in (CASE_P2, CASE_P3, CASE_C):
        leaves = case.leaves(torch.float32, scale=1e3)
        loss = loss_of("lcron", case, operator=operator, log_form=log_form, temperature=temperature, negative_form=form)
        total = loss(leaves, case.targets).total
        total.backward()
        assert total.isfinite()
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())


def test_the_exact_form_keeps_its_gradient_alive_where_the_eps_form_has_lost_it():
    alive = {}
    for form in ("eps", "exact"):
        leaves = CASE_P2.leaves(torch.float32, scale=1e3)
        total = loss_of("lcron", CASE_P2, log_form=form, temperature=1e-3)(leaves, CASE_P2.targets).total
        total.backward()
        gradients = torch.cat([leaf.grad for leaf in leaves.values() if leaf.grad is not None])
        alive[form] = (gradients.abs() > 1e-12).double().mean().item()
    assert 1e6 < total.item() < 1e8  # of the exact form, the last
    assert alive["exact"] >= 0.9
    assert alive["eps"] < 0.1


@pytest.mark.parametrize("options", [
    {"temperature": 1}, {"temperature": 1, "log_form": "exact"}, {"temperature": 1, "negative_form": "direct"},
    SOFTSORT, DFTOPK,
])
def test_lcron_ignores_a_constant_per_request_and_stage(options):
    shift = {"retriever": torch.tensor([[4.0], [-7.0]]), "pre_ranker": torch.tensor([[-2.5], [11.0]])}
    moved = CASE_P2.with_scores({name: s + shift[name] for name, s in CASE_P2.scores.items()})
    before, after = (output_of("lcron", case, options).total.item() for case in (CASE_P2, moved))
    assert after == pytest.approx(before, abs=1e-6)
    for gradient_QC in gradients_of("lcron", CASE_P2, options):
        assert gradient_QC.sum(dim=1).abs().max().item() < 1e-6


def test_the_numerical_gradient_of_lcron_with_dftopk_agrees():
    loss = loss_of("lcron", CASE_A, operator="dftopk", uncertainty=False)
    names = CASE_A.stage_names
    assert torch.autograd.gradcheck(lambda *s: loss(dict(zip(names, s, strict=True)), CASE_A.targets).total,
                                    tuple(CASE_A.leaves().values()))


@pytest.mark.parametrize("options", [
    {}, {"temperature": 1}, KEEP, FLAG, SOFTSORT, DFTOPK, {"log_form": "exact"}, {"negative_form": "direct"},
    {"weight_e2e": True}, {"uncertainty": False},
])
@pytest.mark.parametrize("case", ["P2", "P3"])
def test_every_stage_learns_from_lcron_under_every_option(case, options):
    for gradient_QC in gradients_of("lcron", CASES[case], options):
        assert gradient_QC.abs().max().item() > 0


def test_lcron_refuses_one_stage_and_options_that_do_nothing():
    one = CASE_A.with_scores({"retriever": CASE_A.scores["retriever"]})
    with pytest.raises(ConfigError, match="at least 2 stages"):
        loss_of("lcron", one)
    with pytest.raises(ConfigError, match="uncertainty: false"):
        loss_of("lcron", CASE_A, single_weight=2.0)
    with pytest.raises(ConfigError, match="weight_e2e"):
        loss_of("lcron", CASE_A, uncertainty=False, weight_e2e=True)
    with pytest.raises(ConfigError, match="joint_k: expected one value for each"):
        loss_of("lcron", CASE_A, joint_k=(3, 2, 1))
    with pytest.raises(ConfigError, match="joint_k: widths must be at least 1"):
        loss_of("lcron", CASE_A, joint_k=(3, 0))


def test_quotas_that_bind_nothing_are_reported_once(caplog: pytest.LogCaptureFixture):
    serving = replace(CASE_A, targets=replace(CASE_A.targets, keep=(500, 100)))
    loss = loss_of("lcron", serving, joint_k="keep")
    with caplog.at_level(logging.WARNING):
        totals = [loss(serving.scores, serving.targets).total.item() for _ in range(3)]
    assert len([record for record in caplog.records if "no quota is below" in record.message]) == 1
    # without a binding quota only the single terms are left
    assert totals == _about(*[(0.629740 + 0.610750) / 2] * 3)


def test_explicit_joint_widths_equal_to_keep_are_keep():
    explicit = output_of("lcron", CASE_B, {"joint_k": (5, 4, 3), "temperature": 1}).total.item()
    assert explicit == pytest.approx(2.388013, abs=2e-6)


# ---------------------------------------------------------------- trained weights
def test_the_log_variance_converges_to_the_log_of_a_constant_loss_and_stays_bounded_at_zero():
    weights = UncertaintyWeights(("a", "b"), bound=5.0)
    yes = torch.tensor(True)
    for _ in range(1000):
        weights.zero_grad()
        weights({"a": torch.tensor(3.0), "b": torch.tensor(0.0)}, defined=yes).backward()
        with torch.no_grad():
            for parameter in weights.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
    weights({"a": torch.tensor(3.0), "b": torch.tensor(0.0)}, defined=yes)
    assert weights.log_var("a").item() == pytest.approx(math.log(3.0), abs=1e-3)
    assert weights.log_var("b").item() == -5.0
    assert weights.log_var("b").grad is not None  # projected, not frozen


def test_the_state_of_lcron_holds_its_log_variances_and_other_losses_have_none():
    loss = loss_of("lcron", CASE_B)
    assert sorted(loss.state_dict()) == [f"weights.log_var/{name}" for name in sorted(CASE_B.stage_names)]
    assert all(p.ndim == 0 and p.dtype == torch.float32 and p.requires_grad for p in loss.parameters())
    assert not list(loss_of("bce", CASE_B).parameters())
    assert not list(loss_of("softmax", CASE_B).parameters())


def test_a_batch_without_a_defined_request_does_not_move_the_log_variances():
    case = CASE_A.only(2)
    loss = loss_of("lcron", case)
    _set_log_vars(loss, 0.4, -0.3)
    loss(case.leaves(), case.targets).total.backward()
    assert all(p.grad is not None and p.grad.item() == 0 for p in loss.parameters())


def test_identical_stages_of_lcron_follow_the_closed_form_for_any_depth():
    for num_stages in (2, 3, 4, 5):
        case = deep_case(num_stages)
        flat = case.with_scores({name: torch.zeros_like(s) for name, s in case.scores.items()})
        rho = 0.25
        single = -rho * math.log(rho) - (1 - rho) * math.log(1 - rho)
        e2e = -rho * num_stages * math.log(rho) - (1 - rho) * math.log(1 - rho**num_stages)
        output = output_of("lcron", flat, {"log_form": "exact"})
        assert output.total.item() == pytest.approx(e2e + num_stages * single / 2)
