import numpy as np
import pytest
import torch
from torch import Tensor

from raycascade.losses._neural_sort import neural_row_sums, spread
from raycascade.losses._sorting import (
    Operator,
    SoftRanking,
    log_permutation,
    row_sums,
    soft_permutation,
    topk_probability,
)
from raycascade.truth import label_matrix, tie_spans, top_k_membership
from tests.objective_lists import CASE_A, CASE_B, CASE_C, CASE_P2

MATRIX_OPERATORS = ("neuralsort", "softsort")
OPERATORS = (*MATRIX_OPERATORS, "dftopk")


def _row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def _everyone(scores_QC: Tensor) -> Tensor:
    return torch.ones_like(scores_QC, dtype=torch.bool)


def _close(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual.reshape(-1), torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=2e-6)


THREE = _row(2.0, 1.0, 0.0)


def test_neural_sort_of_three_scores_has_the_rows_and_columns_computed_by_hand():
    matrix_QCC = soft_permutation(THREE, _everyone(THREE), "neuralsort", 1.0)
    _close(matrix_QCC[0, 0], 0.721399, 0.265388, 0.013213)
    _close(matrix_QCC[0, 1], 0.211942, 0.576117, 0.211942)
    _close(matrix_QCC.sum(dim=1), 0.946554, 1.106893, 0.946554)
    by_hand = torch.softmax(torch.tensor([[1.0, 0, -3], [-3, -2, -3], [-7, -4, -3]], dtype=torch.float64), dim=1)
    torch.testing.assert_close(matrix_QCC[0], by_hand)


def test_the_best_of_three_by_every_operator_is_the_value_computed_by_hand():
    p_QC, rest_QC = topk_probability(THREE, _everyone(THREE), 1, "neuralsort", 1.0)
    _close(p_QC, 0.762132, 0.239759, 0.013959)
    _close(rest_QC, 0.237867, 0.760240, 0.986040)
    _close(soft_permutation(THREE, _everyone(THREE), "softsort", 1.0)[0, 0], 0.665241, 0.244728, 0.090031)
    _close(topk_probability(THREE, _everyone(THREE), 1, "softsort", 1.0)[0], 0.687791, 0.229668, 0.093082)
    _close(topk_probability(THREE, _everyone(THREE), 1, "dftopk", 1.0)[0], 0.622459, 0.377541, 0.182426)


@pytest.mark.parametrize(("operator", "q", "temperature", "expected"), [
    ("neuralsort", 2, 1.0, (0.930991, 0.004598, 0.783659, 0.038814, 0.290202, 0.002458)),
    ("neuralsort", 4, 1.0, (0.999916, 0.284669, 0.998770, 0.623893, 0.948278, 0.218060)),
    ("softsort", 2, 1.0, (0.733961, 0.111928, 0.642651, 0.163932, 0.307228, 0.105407)),
    ("dftopk", 2, 1.0, (0.679179, 0.205870, 0.586618, 0.278885, 0.413382, 0.190002)),
    ("neuralsort", 2, 50.0, (0.367166, 0.310982, 0.356248, 0.321442, 0.337364, 0.308388)),
])
def test_the_best_q_of_six_are_the_published_operators_values(operator, q, temperature, expected):
    scores_QC = CASE_A.scores["retriever"]
    _close(topk_probability(scores_QC, _everyone(scores_QC), q, operator, temperature)[0], *expected)


@pytest.mark.parametrize(("operator", "expected"), [
    ("neuralsort", (0.917249, 0.128159, 0, 0.633623, 0.020172, 0.348850)),
    ("softsort", (0.644935, 0.279258, 0, 0.510615, 0.217928, 0.364119)),
    ("dftopk", (0.657010, 0.389361, 0, 0.537430, 0.299433, 0.462570)),
])
def test_a_padded_column_in_the_middle_has_no_part_in_the_operator(operator, expected):
    scores_QC, mask_QC = CASE_C.scores["retriever"], CASE_C.targets.mask_QC
    p_QC, rest_QC = topk_probability(scores_QC, mask_QC, 2, operator, 1.0)
    _close(p_QC, *expected)
    real = mask_QC[0]
    alone_QC, alone_rest_QC = topk_probability(scores_QC[:, real], mask_QC[:, real], 2, operator, 1.0)
    torch.testing.assert_close(p_QC[:, real], alone_QC)
    torch.testing.assert_close(rest_QC[:, real], alone_rest_QC)
    assert rest_QC[0, ~real].item() == 0


def test_at_equal_scores_everybody_has_the_same_chance_and_the_closed_form_gradient():
    scores_QC = torch.zeros(1, 40, dtype=torch.float64, requires_grad=True)
    p_QC, _ = topk_probability(scores_QC, _everyone(scores_QC), 10, "neuralsort", 50.0)
    torch.testing.assert_close(p_QC.detach(), torch.full_like(p_QC, 0.24999975), rtol=0, atol=1e-9)
    (slope_QC,) = torch.autograd.grad(p_QC[0, 7], scores_QC)
    expected_QC = torch.full_like(slope_QC, -0.003750)
    expected_QC[0, 7] = 0.146250
    torch.testing.assert_close(slope_QC, expected_QC, rtol=0, atol=1e-6)


@pytest.mark.parametrize("operator", MATRIX_OPERATORS)
def test_rows_sum_to_one_up_to_the_length_of_the_list_and_are_zero_beyond(operator):
    scores_QC, mask_QC = CASE_C.scores["retriever"], CASE_C.targets.mask_QC
    matrix_QCC = soft_permutation(scores_QC, mask_QC, operator, 1.0)
    _close(matrix_QCC.sum(dim=2), 1, 1, 1, 1, 1, 0)
    torch.testing.assert_close(log_permutation(scores_QC, mask_QC, operator, 1.0).exp(), matrix_QCC)


@pytest.mark.parametrize("operator", MATRIX_OPERATORS)
def test_a_tiny_temperature_sorts_hard(operator):
    scores_QC = CASE_P2.scores["pre_ranker"]
    matrix_QCC = soft_permutation(scores_QC, _everyone(scores_QC), operator, 1e-6)
    order_QC = scores_QC.argsort(dim=1, descending=True)
    torch.testing.assert_close(matrix_QCC.argmax(dim=2), order_QC)
    torch.testing.assert_close(matrix_QCC.amax(dim=2), torch.ones_like(scores_QC))


@pytest.mark.parametrize("operator", OPERATORS)
def test_probability_and_rest_add_up_to_one(operator):
    scores_QC = CASE_P2.scores["retriever"]
    p_QC, rest_QC = topk_probability(scores_QC, _everyone(scores_QC), 10, operator, 5.0)
    torch.testing.assert_close(p_QC + rest_QC, torch.ones_like(p_QC), rtol=0, atol=3e-6)


@pytest.mark.parametrize("log_form", ["eps", "exact"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_quota_that_does_not_bind_is_a_constant_one(operator, log_form):
    scores_QC = CASE_C.scores["retriever"].clone().requires_grad_()
    ranking = SoftRanking(scores_QC, CASE_C.targets.mask_QC, operator=operator, temperature=1.0, log_form=log_form)
    for q in (5, 6, 9):
        top = ranking.top(q)
        assert top.p_QC.tolist() == [[1, 1, 0, 1, 1, 1]]
        assert top.rest_QC.abs().max() == 0
        total = top.p_QC.sum() + top.rest_QC.sum()
        (gradient_QC,) = torch.autograd.grad(total, scores_QC, retain_graph=True, allow_unused=True)
        assert gradient_QC is None or gradient_QC.abs().max() == 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_exact_logarithms_agree_with_the_eps_form_where_nothing_is_near_zero(operator):
    scores_QC, mask_QC = CASE_A.scores["retriever"], CASE_A.targets.mask_QC
    plain, exact = (SoftRanking(scores_QC, mask_QC, operator=operator, temperature=3.0, log_form=form).top(2)
                    for form in ("eps", "exact"))
    for name in ("p_QC", "rest_QC", "log_p_QC", "log_rest_QC"):
        torch.testing.assert_close(getattr(exact, name), getattr(plain, name), rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", ["complement", "direct"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_survival_and_loss_are_complements_in_both_forms(operator, form):
    scores_QC, mask_QC = CASE_A.scores["pre_ranker"], CASE_A.targets.mask_QC
    top = SoftRanking(scores_QC, mask_QC, operator=operator, temperature=3.0, log_form="exact").top(2)
    log_survival_QC, log_loss_QC = top.log_survival(form)
    torch.testing.assert_close(log_survival_QC.exp() + log_loss_QC.exp(), torch.ones_like(scores_QC))
    torch.testing.assert_close(log_survival_QC.exp(), top.survival(form))


@pytest.mark.parametrize("log_form", ["eps", "exact"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_shift_of_the_scores_changes_nothing(operator, log_form):
    scores_QC, mask_QC = CASE_B.scores["ranker"], CASE_B.targets.mask_QC
    before, after = (
        SoftRanking(scores_QC + shift, mask_QC, operator=operator, temperature=1.0, log_form=log_form).top(3)
        for shift in (0.0, 17.5)
    )
    torch.testing.assert_close(after.p_QC, before.p_QC)
    torch.testing.assert_close(after.log_rest_QC, before.log_rest_QC)


def test_the_operators_have_their_own_default_temperatures():
    scores_QC, mask_QC = CASE_A.scores["retriever"], CASE_A.targets.mask_QC
    temperatures: dict[Operator, float] = {"neuralsort": 50.0, "softsort": 1.0, "dftopk": 1.0}
    for operator, temperature in temperatures.items():
        default = SoftRanking(scores_QC, mask_QC, operator=operator).top(2).p_QC
        explicit = SoftRanking(scores_QC, mask_QC, operator=operator, temperature=temperature).top(2).p_QC
        torch.testing.assert_close(default, explicit)


# ---------------------------------------------------------------- the gradients written by hand
def _random_lists(*, ties: bool) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(7)
    scores = draw.integers(-2, 3, (12, 9)).astype(np.float64) if ties else draw.normal(size=(12, 9))
    mask = draw.random((12, 9)) < 0.7
    mask[0], mask[1] = True, False
    return torch.from_numpy(scores), torch.from_numpy(mask)


@pytest.mark.parametrize("ties", [False, True])
def test_the_spread_and_its_gradient_are_those_of_the_summed_distances(ties: bool):
    scores_QC, mask_QC = _random_lists(ties=ties)
    slope_QC = torch.from_numpy(np.random.default_rng(8).normal(size=(12, 9)))
    leaves = [scores_QC.clone().requires_grad_() for _ in range(2)]
    apart_QCC = (leaves[0][:, :, None] - leaves[0][:, None, :]).abs()
    pairs_QCC = mask_QC[:, :, None] & mask_QC[:, None, :]
    expected_QC, actual_QC = torch.where(pairs_QCC, apart_QCC, 0.0).sum(dim=2), spread(leaves[1], mask_QC)
    torch.testing.assert_close(actual_QC, expected_QC)
    gradients = [torch.autograd.grad((value_QC * slope_QC).sum(), leaf)[0]
                 for value_QC, leaf in zip((expected_QC, actual_QC), leaves, strict=True)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("widths", [(3,), (1, 4), (2, 5, 9), (4, 12)])
def test_the_sums_of_rows_and_their_gradient_are_those_of_the_matrix(widths: tuple[int, ...], ties: bool):
    scores_QC, mask_QC = _random_lists(ties=ties)
    leaves = [scores_QC.clone().requires_grad_() for _ in range(2)]
    matrix_QCC = soft_permutation(leaves[0], mask_QC, "neuralsort", 2.0)
    parts = [part.sum(dim=1) for q in widths for part in (matrix_QCC[:, :q], matrix_QCC[:, q:])]
    sums = torch.stack(parts, dim=1), neural_row_sums(leaves[1], mask_QC, widths=widths, temperature=2.0)
    torch.testing.assert_close(*sums)
    slope = torch.from_numpy(np.random.default_rng(9).normal(size=tuple(sums[0].shape)))
    gradients = [torch.autograd.grad((value * slope).sum(), leaf)[0] for value, leaf in zip(sums, leaves, strict=True)]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[1][~mask_QC].abs().max().item() == 0


def test_sums_of_rows_are_made_once_for_all_widths():
    scores_QC, mask_QC = _random_lists(ties=False)
    for operator in MATRIX_OPERATORS:
        both = row_sums(scores_QC, mask_QC, widths=(2, 5), operator=operator, temperature=1.0)
        alone = [row_sums(scores_QC, mask_QC, widths=(q,), operator=operator, temperature=1.0) for q in (2, 5)]
        torch.testing.assert_close(both, torch.cat(alone, dim=1))


# ---------------------------------------------------------------- the truth
def test_a_tie_across_the_border_of_the_best_k_is_shared():
    t_QC = top_k_membership(CASE_C.targets.relevance_QC, CASE_C.targets.mask_QC, 2, dtype=torch.float64)
    _close(t_QC, 1, 1 / 3, 0, 1 / 3, 1 / 3, 0)


def test_the_truth_equals_a_count_in_plain_python_for_random_lists_with_ties_and_padding():
    generator = np.random.default_rng(3)
    relevance_QC = torch.from_numpy(generator.integers(0, 5, (20, 9)).astype(np.float32))
    mask_QC = torch.from_numpy(generator.random((20, 9)) < 0.7)
    noisy_QC = torch.where(mask_QC, relevance_QC, torch.tensor([torch.nan, torch.inf, 1e9] * 3))
    above_QC, tied_QC = tie_spans(noisy_QC, mask_QC)
    t_QC = top_k_membership(noisy_QC, mask_QC, 3, dtype=torch.float64)
    for q in range(20):
        y = [(relevance_QC[q, j].item() if mask_QC[q, j] else None) for j in range(9)]
        real = [value for value in y if value is not None]
        for j, value in enumerate(y):
            above = 0 if value is None else sum(other > value for other in real)
            tied = 0 if value is None else sum(other == value for other in real)
            assert (above_QC[q, j].item(), tied_QC[q, j].item()) == (above, tied)
            share = sum(1 / tied for rank in range(1, 4) if above < rank <= above + tied) if tied else 0
            assert t_QC[q, j].item() == pytest.approx(share)
        assert t_QC[q].sum().item() == pytest.approx(min(3, len(real)))


def test_the_label_matrix_gives_every_rank_away_once_and_its_first_rows_are_the_membership():
    relevance_QC, mask_QC = CASE_C.targets.relevance_QC, CASE_C.targets.mask_QC
    matrix_QCC = label_matrix(relevance_QC, mask_QC, dtype=torch.float64)
    _close(matrix_QCC.sum(dim=2), 1, 1, 1, 1, 1, 0)
    _close(matrix_QCC.sum(dim=1), 1, 1, 0, 1, 1, 1)
    t_QC = top_k_membership(relevance_QC, mask_QC, 2, dtype=torch.float64)
    torch.testing.assert_close(matrix_QCC[:, :2].sum(dim=1), t_QC)


def test_integer_relevance_is_compared_exactly():
    relevance_QC = torch.tensor([[1 << 40, (1 << 40) + 1]])
    assert top_k_membership(relevance_QC, torch.ones(1, 2, dtype=torch.bool), 1).tolist() == [[0.0, 1.0]]
