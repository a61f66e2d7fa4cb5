"""The losses icc, rankflow, fs_ranknet, fs_lambdaloss, arf and arf_v2: known values, definitions in plain Python, and
the options of each. What must hold for every loss is in tests/contract/test_losses.py."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from raycascade.errors import ConfigError
from raycascade.losses._objective import ScoredLists
from tests.objective_lists import (
    CASE_A,
    CASE_B,
    CASE_C,
    CASE_P2,
    CASE_P3,
    CASES,
    ListCase,
    deep_case,
    gradients_of,
    loss_of,
    output_of,
    parts_of,
)

OFFICIAL = {"ties": "official"}


def _about(*expected: float) -> Any:
    return pytest.approx(list(expected), abs=2e-6, rel=0)


# ---------------------------------------------------------------- known values
KNOWN = [
    ("arf", "A", {"temperature": 1}, 1.455559), ("arf", "B", {"temperature": 1}, 2.449375),
    ("arf", "C", {"temperature": 1}, 1.544060),
    ("arf", "A", {}, 1.490140), ("arf", "B", {}, 2.236803), ("arf", "C", {}, 1.607918),
    ("arf_v2", "A", {"temperature": 1}, 2.936702), ("arf_v2", "B", {"temperature": 1}, 6.643557),
    ("arf_v2", "C", {"temperature": 1}, 2.359518),
    ("arf_v2", "A", {}, 1.849684), ("arf_v2", "B", {}, 3.258186), ("arf_v2", "C", {}, 2.126052),
    ("fs_ranknet", "A", {}, 3.453898), ("fs_ranknet", "B", {}, 6.099654), ("fs_ranknet", "C", {}, 2.174324),
    ("fs_lambdaloss", "A", {}, 1.467285), ("fs_lambdaloss", "B", {}, 3.083726), ("fs_lambdaloss", "C", {}, 1.073848),
    ("fs_lambdaloss", "A", {"topn": 3}, 2.553869),
    ("icc", "A", {}, 0.251180), ("icc", "B", {}, 0.291124), ("icc", "C", {}, 0.176996),
    ("icc", "A", {"sigma": 0.5}, 0.219432), ("icc", "B", {"sigma": 0.5}, 0.256060),
    ("icc", "C", {"sigma": 0.5}, 0.176022),
    ("icc", "A", {"sigma": 0.5, "last_gate": False}, 0.188209),
    ("icc", "B", {"sigma": 0.5, "last_gate": False}, 0.238319),
    ("icc", "A", {"quotas": (4, 4), **OFFICIAL}, 0.256045), ("icc", "A", {"quotas": (4, 4)}, 0.239430),
    ("icc", "B", {"quotas": (5, 4, 4), "stage_weights": (1, 2, 4), **OFFICIAL}, 0.532444),
    ("icc", "B", {"quotas": (5, 4, 4), "stage_weights": (1, 2, 4)}, 0.442445),
    ("rankflow", "A", {}, 2.402851), ("rankflow", "B", {}, 4.862933), ("rankflow", "C", {}, 1.722509),
    ("rankflow", "A", {"rank": 1}, 2.915866), ("rankflow", "B", {"rank": 1}, 6.163707),
    ("rankflow", "C", {"rank": 1}, 2.291185),
    ("arf", "P2", {}, 1.931363), ("arf", "P3", {}, 2.460227),
    ("arf_v2", "P2", {}, 1.892861), ("arf_v2", "P3", {}, 2.880498),
    ("fs_ranknet", "P2", {}, 4.981363), ("fs_ranknet", "P3", {}, 9.979917),
    ("fs_lambdaloss", "P2", {}, 20.895927), ("fs_lambdaloss", "P3", {}, 40.762201),
    ("icc", "P2", {"quotas": (30, 30), **OFFICIAL}, 0.380711),
    ("icc", "P3", {"quotas": (40, 30, 30), "stage_weights": (1, 2, 4), **OFFICIAL}, 0.571903),
    ("icc", "P2", {}, 0.310088), ("icc", "P3", {}, 0.335735),
    ("icc", "P2", {"sigma": 0.1}, 0.305955), ("icc", "P3", {"sigma": 0.1}, 0.332783),
    ("rankflow", "P2", {}, 3.060856), ("rankflow", "P2", {"distill": 0.5, "rank": 0.5, "positives": (10,)}, 2.604567),
    ("rankflow", "P3", {"rank": 1}, 6.418931), ("rankflow", "P3", {}, 5.002872),
]


@pytest.mark.parametrize(("name", "case", "options", "expected"), KNOWN)
def test_the_total_is_the_published_one(name: str, case: str, options: dict[str, Any], expected: float):
    assert output_of(name, CASES[case], options).total.item() == pytest.approx(expected, abs=2e-6, rel=0)
    narrow = loss_of(name, CASES[case], **options)(CASES[case].leaves(torch.float32), CASES[case].targets).total
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("name", "case", "options", "parts"), [
    ("arf", "A", {"temperature": 1}, {"relax": (0.668309, 0.445550), "global": (0.382833, 0.300566)}),
    ("arf", "B", {"temperature": 1}, {"relax": (0.543380, 0.832945, 0.447219), "global": (0.416917, 0.482452,
                                                                                         0.352294)}),
    ("arf_v2", "A", {"temperature": 1}, {"relax": (2.023880, 0.571122), "global": (0.382833, 0.300566)}),
    ("arf_v2", "B", {"temperature": 1}, {"relax": (3.016387, 1.855952, 1.145386)}),
    ("fs_ranknet", "A", {}, {"ranknet": (1.530727, 1.923170)}),
    ("fs_ranknet", "B", {}, {"ranknet": (1.763785, 2.884655, 1.451214)}),
    ("fs_ranknet", "C", {}, {"ranknet": (1.170780, 1.003543)}),
    ("fs_ranknet", "P2", {}, {"ranknet": (2.421493, 2.559870)}),
    ("fs_ranknet", "P3", {}, {"ranknet": (3.210479, 3.773420, 2.996019)}),
    ("fs_lambdaloss", "A", {}, {"lambdaloss": (0.880857, 0.586428)}),
    ("fs_lambdaloss", "B", {}, {"lambdaloss": (1.186154, 0.947267, 0.950304)}),
    ("fs_lambdaloss", "A", {"topn": 3}, {"lambdaloss": (1.559425, 0.994443)}),
    ("rankflow", "A", {"rank": 1}, {"bce": (0.701212, 0.679139), "distill": (1.022500,), "rank": (0.513015,)}),
    ("rankflow", "B", {"rank": 1}, {"bce": (0.726906, 0.674993, 0.816535), "distill": (1.212000, 1.432500),
                                    "rank": (0.446418, 0.854355)}),
])
def test_the_parts_are_the_published_ones(name: str, case: str, options: dict[str, Any], parts: dict[str, tuple]):
    output = output_of(name, CASES[case], options)
    for term, expected in parts.items():
        assert parts_of(output, f"{term}/") == _about(*expected)


def _flat(case: ListCase) -> ListCase:
    return case.with_scores({name: torch.zeros_like(s) for name, s in case.scores.items()})


@pytest.mark.parametrize(("name", "two_stages", "three_stages"), [
    ("arf", 1.936641, 2.464543), ("arf_v2", 1.897006, 2.876649), ("fs_ranknet", 4.158883, 8.317766),
])
def test_equal_scores_give_the_closed_form(name: str, two_stages: float, three_stages: float):
    totals = [output_of(name, _flat(case)).total.item() for case in (CASE_P2, CASE_P3)]
    assert totals == _about(two_stages, three_stages)


# ---------------------------------------------------------------- definitions in plain Python
def _log_loss(gap: float) -> float:
    return math.log1p(math.exp(-gap))


def _of(case: ListCase, q: int) -> tuple[list[int], list[list[float]], list[float], list[int]]:
    """The real candidates of a request: positions, scores by stage, relevance and level."""
    real = case.targets.mask_QC[q].nonzero()[:, 0].tolist()
    scores = [s[q, real].tolist() for s in case.scores.values()]
    return real, scores, case.targets.relevance_QC[q, real].tolist(), case.targets.reached_QC[q, real].tolist()


MIXED = CASE_P3.stacked(CASE_P3.only(23)).stacked(CASE_P3.only(11))


def test_fs_ranknet_is_a_mean_over_pairs_per_level_and_over_the_requests_that_have_the_level():
    levels = 4
    expected = 0.0
    for stage, level in itertools.product(range(3), range(1, levels + 1)):
        means = []
        for q in range(6):
            _, scores, _, reached = _of(MIXED, q)
            pairs = [_log_loss(scores[stage][j] - scores[stage][m]) for j in range(len(reached))
                     for m in range(len(reached)) if reached[j] == level > reached[m]]
            means += [sum(pairs) / len(pairs)] if pairs else []
        expected += sum(means) / len(means) if means else 0.0
    for options in ({}, {"max_level": 4}, {"max_level": 9}, {"chunk_requests": 2}):
        assert output_of("fs_ranknet", MIXED, options).total.item() == pytest.approx(expected)
    merged = output_of("fs_ranknet", MIXED, {"max_level": 2}).total.item()
    clamped = MIXED._mapped(lambda x: x.clamp(max=2) if x is MIXED.targets.reached_QC else x)
    assert merged == pytest.approx(output_of("fs_ranknet", clamped).total.item())
    assert merged != pytest.approx(expected)


def _lambda_request(scores: list[float], y: list[float], smooth: float, topn: int) -> float:
    rank = {j: r for r, j in enumerate(sorted(range(len(y)), key=lambda j: -scores[j]), 1)}
    ideal = sum(v / math.log(1 + r) for r, v in enumerate(sorted(y, reverse=True), 1))
    total = 0.0
    for j, m in itertools.permutations(range(len(y)), 2):
        if y[j] > y[m]:
            apart = abs(rank[j] - rank[m])
            near = 1 / math.log(1 + apart) - 1 / math.log(2 + apart) if min(rank[j], rank[m]) <= topn else 0.0
            far = abs(sum(sign / math.log(1 + rank[i]) for sign, i in ((1, j), (-1, m)) if rank[i] <= topn))
            weight = abs(y[j] - y[m]) / ideal * ((1 - smooth) * near + smooth * far)
            total += 2 * weight * _log_loss(scores[j] - scores[m])
    return total


@pytest.mark.parametrize(("smooth", "topn"), [(0.8, 30), (0.0, 5), (1.0, 5), (0.25, 12)])
def test_fs_lambdaloss_equals_its_definition_in_plain_python(smooth: float, topn: int):
    expected = 0.0
    for stage in range(3):
        each = [_lambda_request(_of(MIXED, q)[1][stage], _of(MIXED, q)[2], smooth, topn) for q in range(6)]
        expected += sum(each) / len(each)
    for chunk in (None, 4):
        options = {"smooth": smooth, "topn": topn, "chunk_requests": chunk}
        assert output_of("fs_lambdaloss", MIXED, options).total.item() == pytest.approx(expected)


def _cut(order: list[int], scores: list[float], count: int) -> list[int]:
    return sorted(order, key=lambda j: -scores[j])[:count]


@pytest.mark.parametrize("positives", [None, (25, 7)])
def test_rankflow_follows_the_sets_that_pass_from_stage_to_stage(positives: tuple[int, int] | None):
    keep, k = (40, 30, 20), 10
    sums: dict[str, list[float]] = {}
    for q in range(6):
        _, scores, y, _ = _of(MIXED, q)
        spans = [(sum(z > v for z in y), y.count(v)) for v in y]
        t = [min(1.0, max(0.0, (k - above) / tied)) for above, tied in spans]
        entered = list(range(len(y)))
        for i in range(3):
            bce = [_log_loss(scores[i][j]) + (1 - t[j]) * scores[i][j] for j in entered]
            sums.setdefault(f"bce{i}", []).append(sum(bce) / len(bce))
            if i == 2:
                break
            entered = _cut(entered, scores[i], keep[i])
            gaps = [(scores[i][j] - scores[i + 1][j]) ** 2 for j in entered]
            sums.setdefault(f"distill{i}", []).append(0.7 * sum(gaps) / len(gaps))
            better = _cut(entered, scores[i + 1], (positives or keep[1:])[i])
            rest = [j for j in entered if j not in better]
            if rest:
                means = [sum(scores[i][j] for j in chosen) / len(chosen) for chosen in (better, rest)]
                sums.setdefault(f"rank{i}", []).append(0.3 * _log_loss(means[0] - means[1]))
    expected = sum(sum(values) / len(values) for values in sums.values())
    output = output_of("rankflow", MIXED, {"distill": 0.7, "rank": 0.3, "positives": positives})
    assert output.total.item() == pytest.approx(expected)
    assert [name.partition("/")[0] for name in output.parts] == ["bce"] * 3 + ["distill"] * 2 + ["rank"] * 2


def test_the_teacher_gets_no_gradient_from_the_stage_it_teaches():
    last = [gradients_of("rankflow", CASE_A, {"distill": weight, "rank": weight})[1] for weight in (0.0, 5.0)]
    assert torch.equal(last[0], last[1])


def _lists(case: ListCase) -> ScoredLists:
    mask_QC = case.targets.mask_QC
    return ScoredLists(case.scores, case.targets, mask_QC, mask_QC.sum(dim=1), torch.float64)


def test_the_score_of_the_cascade_is_the_published_one():
    loss = loss_of("icc", CASE_A, sigma=0.5)
    assert loss.cascade_score(_lists(CASE_A))[0].tolist() == _about(0.280681, -0.211373, 0.018483, 0.060489, -0.021597,
                                                                   -0.731059)


def test_a_narrow_indicator_scores_a_candidate_by_the_stage_that_drops_it():
    sharp = {"sigma": 1e-9, "last_gate": False}
    score_QC = loss_of("icc", CASE_B, **sharp).cascade_score(_lists(CASE_B))
    first, second, last = (s[0].tolist() for s in CASE_B.scores.values())
    kept = _cut(list(range(6)), first, 5)
    on = [j for j in _cut(list(range(6)), second, 4) if j in kept]
    for j in range(6):
        border = j == kept[-1] or second[j] == sorted(second, reverse=True)[3]
        if not border:  # at a border the indicator is a half
            assert score_QC[0, j].item() == pytest.approx(last[j] if j in on else second[j] if j in kept else first[j])


def test_the_relu_indicator_is_linear_around_the_cut_and_flat_elsewhere():
    scores_QC = torch.tensor([[3.0, 2.0, 2.25, 1.9, 0.0]], dtype=torch.float64)
    mask_QC = torch.ones(1, 5, dtype=torch.bool)
    loss = loss_of("icc", CASE_A, indicator="relu", delta=0.5)
    assert loss.indicator(scores_QC, mask_QC, 3)[0].tolist() == pytest.approx([1.0, 0.5, 0.75, 0.4, 0.0])
    assert loss.indicator(scores_QC, mask_QC, 5)[0].tolist() == [1.0] * 5
    sharp, smooth = (output_of("icc", CASE_P2, {"indicator": "relu", "delta": delta}).total.item()
                     for delta in (1e-12, 0.5))
    assert sharp == pytest.approx(output_of("icc", CASE_P2, {"sigma": 1e-12}).total.item())
    assert abs(smooth - sharp) > 1e-4


def test_official_ties_depend_on_the_order_of_the_list_and_skipped_ones_do_not():
    turned = CASE_P2.take(list(reversed(range(40))))
    for options, same in (({"ties": "official"}, False), ({}, True)):
        before, after = (output_of("icc", case, options).total.item() for case in (CASE_P2, turned))
        assert (before == pytest.approx(after, abs=1e-6)) == same


def test_the_second_version_of_arf_differs_in_the_relaxed_term_only():
    first, second = (output_of(name, CASE_P3) for name in ("arf", "arf_v2"))
    assert parts_of(first, "global/") == pytest.approx(parts_of(second, "global/"))
    assert parts_of(first, "relax/") != pytest.approx(parts_of(second, "relax/"))


def test_lists_no_longer_than_the_quota_have_no_relaxed_term():
    short = CASE_P2.only(20)  # at most 30 and 20
    for name in ("arf", "arf_v2"):
        output = output_of(name, short)
        assert parts_of(output, "relax/") == [0.0, 0.0]
        assert min(parts_of(output, "global/")) > 0
        both = output_of(name, CASE_P2.stacked(short))
        assert parts_of(both, "relax/") == pytest.approx(parts_of(output_of(name, CASE_P2), "relax/"))


@pytest.mark.parametrize("name", ["arf", "arf_v2"])
def test_the_global_term_of_arf_has_trained_or_fixed_weights(name: str):
    plain = output_of(name, CASE_A, {"temperature": 1, "uncertainty": False, "global_weight": 3.0})
    assert not parts_of(plain, "log_var/")
    parts = sum(parts_of(plain, "relax/")) + 3 * sum(parts_of(plain, "global/"))
    assert plain.total.item() == pytest.approx(parts)
    loss = loss_of(name, CASE_A, temperature=1)
    with torch.no_grad():
        for parameter, value in zip(loss.parameters(), (0.4, -0.3), strict=True):
            parameter.fill_(value)
    terms = [math.exp(-u) * g / 2 + u / 2 for u, g in zip((0.4, -0.3), (0.382833, 0.300566), strict=True)]
    weighted = loss(CASE_A.scores, CASE_A.targets)
    assert weighted.total.item() == pytest.approx(sum(parts_of(plain, "relax/")) + sum(terms), abs=2e-6)
    assert parts_of(weighted, "log_var/") == _about(0.4, -0.3)
    assert sorted(loss.state_dict()) == ["weights.log_var/pre_ranker", "weights.log_var/retriever"]


@pytest.mark.parametrize("name", ["arf", "arf_v2"])
@pytest.mark.parametrize("operator", ["neuralsort", "softsort"])
def test_the_exact_form_of_arf_agrees_where_nothing_is_near_zero(name: str, operator: str):
    options = {"operator": operator, "temperature": 20}
    eps, exact = (output_of(name, CASE_P3, {**options, "log_form": form}).total.item() for form in ("eps", "exact"))
    assert exact == pytest.approx(eps, abs=2e-4)
    assert exact != eps


# ---------------------------------------------------------------- for all of them
MATRIX = [("lcron", {}), ("lcron", {"log_form": "exact"}), ("lcron", {"operator": "softsort"}),
          ("lcron", {"joint_k": "keep", "temperature": 1}), ("arf", {}), ("arf_v2", {"log_form": "exact"}), ("icc", {}),
          ("icc", OFFICIAL), ("fs_ranknet", {}), ("fs_lambdaloss", {})]


@pytest.mark.parametrize(("name", "options"), MATRIX)
@pytest.mark.parametrize("chunk", [1, 4])
def test_requests_in_chunks_give_the_same_total_and_gradients(name: str, options: dict[str, Any], chunk: int):
    whole, parts = ({**options, "chunk_requests": requests} for requests in (100, chunk))
    total = output_of(name, MIXED, whole).total.item()
    assert output_of(name, MIXED, parts).total.item() == pytest.approx(total, rel=1e-12)
    pairs = zip(gradients_of(name, MIXED, whole), gradients_of(name, MIXED, parts), strict=True)
    for left_QC, right_QC in pairs:
        torch.testing.assert_close(right_QC, left_QC, rtol=1e-9, atol=1e-12)


OPTIONS = [
    ("icc", {"sigma": 0.5}), ("icc", {"indicator": "relu", "delta": 0.5}), ("icc", {"last_gate": False}),
    ("icc", OFFICIAL), ("rankflow", {"rank": 1}), ("rankflow", {"distill": 0, "rank": 1}),
    ("fs_ranknet", {"max_level": 3}), ("fs_lambdaloss", {"smooth": 0}), ("fs_lambdaloss", {"smooth": 1, "topn": 10}),
    ("arf", {"temperature": 1}), ("arf", {"log_form": "exact"}), ("arf", {"operator": "softsort", "temperature": 1}),
    ("arf", {"uncertainty": False}), ("arf_v2", {"temperature": 1}), ("arf_v2", {"log_form": "exact"}),
    ("arf_v2", {"operator": "softsort", "temperature": 1}), ("arf_v2", {"uncertainty": False}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_stage_learns_under_every_option(name: str, options: dict[str, Any]):
    for case in (CASE_P2, CASE_P3, deep_case(5)):
        for gradient_QC in gradients_of(name, case, options):
            assert gradient_QC.abs().max().item() > 0


@pytest.mark.parametrize("temperature", [200.0, 1e-3])
@pytest.mark.parametrize("log_form", ["eps", "exact"])
@pytest.mark.parametrize("operator", ["neuralsort", "softsort"])
@pytest.mark.parametrize("name", ["arf", "arf_v2"])
def test_arf_stays_finite_at_a_thousandfold_scale_in_float32(name, operator, log_form, temperature):
    for case in (CASE_P2, CASE_P3, CASE_C):
        leaves = case.leaves(torch.float32, scale=1e3)
        total = loss_of(name, case, operator=operator, log_form=log_form, temperature=temperature)(
            leaves, case.targets).total
        total.backward()
        assert total.isfinite()
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())


def _numerical_gradient_agrees(name: str, options: dict[str, Any]) -> bool:
    loss = loss_of(name, CASE_A, **options)

    def total(*scores: Tensor) -> Tensor:
        return loss(dict(zip(CASE_A.stage_names, scores, strict=True)), CASE_A.targets).total

    return torch.autograd.gradcheck(total, tuple(CASE_A.leaves().values()), raise_exception=False)


@pytest.mark.parametrize(("name", "options", "agrees"), [
    ("icc", {"sigma": 0.5}, True), ("icc", {"sigma": 0.5, **OFFICIAL}, True), ("fs_ranknet", {}, True),
    ("arf", {"temperature": 1, "uncertainty": False}, True), ("lcron", {"operator": "dftopk", "temperature": 1}, True),
    ("arf", {"temperature": 1, "operator": "softsort"}, True),
    ("lcron", {"temperature": 1}, False), ("arf_v2", {"temperature": 1}, False), ("rankflow", {}, False),
])
def test_the_numerical_gradient_agrees_unless_something_is_held_constant(name, options, agrees):
    assert _numerical_gradient_agrees(name, options) == agrees


def test_the_weights_of_fs_lambdaloss_are_held_constant():
    """Between two swaps of ranks they are constant anyway, so the numerical gradient agrees away from ties."""
    assert _numerical_gradient_agrees("fs_lambdaloss", {})


@pytest.mark.parametrize(("name", "options", "message"), [
    ("icc", {"quotas": (4,)}, r"loss.quotas: expected one value for each of \['retriever', 'pre_ranker'\]"),
    ("icc", {"quotas": (4, 0)}, "loss.quotas: widths must be at least 1"),
    ("icc", {"stage_weights": (1.0,)}, "loss.stage_weights: expected one value"),
    ("icc", {"sigma": 0.0}, "sigma"), ("icc", {"indicator": "step"}, "indicator"),
    ("rankflow", {"positives": (3, 2)}, r"loss.positives: expected one width of at least 1 for each of \['retriever'"),
    ("rankflow", {"quotas": (3, 2, 1)}, "loss.quotas"), ("rankflow", {"rank": -1.0}, "rank"),
    ("fs_ranknet", {"max_level": 0}, "max_level"), ("fs_lambdaloss", {"smooth": 1.5}, "smooth"),
    ("arf", {"operator": "dftopk"}, "operator"), ("arf_v2", {"quotas": (3,)}, "loss.quotas"),
    ("arf", {"global_weight": 2.0}, "uncertainty: false"), ("lcron", {"chunk_requests": 0}, "chunk_requests"),
])
def test_options_that_do_not_fit_are_refused_by_name(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        loss_of(name, CASE_A, **options)


def test_quotas_of_the_loss_replace_those_of_the_lists():
    for name in ("icc", "rankflow", "arf", "arf_v2"):
        chosen = output_of(name, CASE_B, {"quotas": (5, 4, 3)}).total.item()
        assert chosen == output_of(name, CASE_B).total.item()
        assert chosen != output_of(name, CASE_B, {"quotas": (4, 3, 2)}).total.item()
