"""fs_plackett_luce: values by hand, the definition in plain Python, and what its options do."""

import itertools
import math
from typing import Any

import pytest
import torch

from raycascade.errors import ConfigError
from tests.objective_lists import CASES, ListCase, gradients_of, list_case, loss_of, output_of, parts_of

PLAIN = {"temperature": 1.0, "rest_weight": 1.0}


def _case(scores: list[float], relevance: list[int], *, k: int, mask: tuple[int, ...] = ()) -> ListCase:
    """Two stages with the same scores."""
    levels = [0] * len(scores)
    return list_case([scores, scores], relevance, levels,
                     keep=(len(scores) - 1, k), k=k, mask=mask)


def _by_definition(case: ListCase, stage: str, temperature: float, rest_weight: float) -> float:
    means = []
    targets = case.targets
    for scores, relevance, mask in zip(case.scores[stage].tolist(), targets.relevance_QC.tolist(),
                                       targets.mask_QC.tolist(), strict=True):
        real = [(s / temperature, y) for s, y, m in zip(scores, relevance, mask, strict=True) if m]
        total = weights = 0.0
        for z, y in real:
            lower = [z_l for z_l, y_l in real if y_l < y]
            above, tied = (sum(y_l > y for _, y_l in real), sum(y_l == y for _, y_l in real))
            if lower:
                t = min(1.0, max(0.0, (targets.k - above) / tied))
                weight = t + rest_weight * (1 - t)
                total -= weight * math.log(math.exp(z) / (math.exp(z) + sum(math.exp(z_l) for z_l in lower)))
                weights += weight
        if weights:
            means.append(total / weights)
    return sum(means) / len(means)


def test_three_ranked_candidates_have_the_value_computed_by_hand():
    """Scores ln 3, ln 1, ln 2 in this order of relevance: 3 / (3 + 1 + 2), then 1 / (1 + 2); the last has no choice."""
    case = _case([math.log(3), 0.0, math.log(2)], [3, 2, 1], k=1)
    both = output_of("fs_plackett_luce", case, PLAIN)
    assert parts_of(both, "plackett_luce") == pytest.approx([(math.log(2) + math.log(3)) / 2] * 2)
    assert both.total.item() == pytest.approx(math.log(2) + math.log(3))
    quarter = output_of("fs_plackett_luce", case, {**PLAIN, "rest_weight": 0.25})
    assert quarter.total.item() == pytest.approx(2 * (math.log(2) + math.log(3) / 4) / 1.25)
    best_only = output_of("fs_plackett_luce", case, {**PLAIN, "rest_weight": 0.0})
    assert best_only.total.item() == pytest.approx(2 * math.log(2))


def test_tied_candidates_are_chosen_among_themselves_and_the_lower_ones_only():
    """Each of the two tied at the top against the one below, of weight 2: 3 / (3 + 2) and 1 / (1 + 2)."""
    case = _case([math.log(3), 0.0, math.log(2)], [5, 5, 1], k=2)
    expected = (math.log(5 / 3) + math.log(3)) / 2
    assert output_of("fs_plackett_luce", case, PLAIN).total.item() == pytest.approx(2 * expected)


def test_a_tie_across_the_border_of_the_best_k_shares_its_weight():
    """Relevance 5, 5, 1 and K = 1: each tied candidate has half a membership, so both weigh 0.5 + 0.5 * rest."""
    case = _case([math.log(3), 0.0, math.log(2), 0.0], [5, 5, 3, 1], k=1)
    half = 0.5 + 0.5 * 0.2
    terms = (math.log(6 / 3), math.log(4), math.log(3 / 2))  # the last stands outside with weight 0.2
    expected = (half * terms[0] + half * terms[1] + 0.2 * terms[2]) / (2 * half + 0.2)
    got = output_of("fs_plackett_luce", case, {"temperature": 1.0, "rest_weight": 0.2})
    assert got.total.item() == pytest.approx(2 * expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("temperature", "rest_weight"), [(1.0, 1.0), (0.5, 0.25), (2.0, 0.0)])
def test_every_list_equals_the_definition_in_plain_python(name: str, temperature: float, rest_weight: float):
    case, options = CASES[name], {"temperature": temperature, "rest_weight": rest_weight}
    expected = [_by_definition(case, stage, temperature, rest_weight) for stage in case.stage_names]
    assert parts_of(output_of("fs_plackett_luce", case, options), "plackett_luce") == pytest.approx(expected)


def test_the_likelihoods_of_all_orders_sum_to_one():
    """Without ties and with equal weights, N - 1 times the mean is minus the log of a probability of the order."""
    scores, total = [0.3, -1.1, 0.8, 0.1], 0.0
    for order in itertools.permutations(range(4)):
        part = output_of("fs_plackett_luce", _case(scores, list(order), k=1), PLAIN).total.item() / 2
        total += math.exp(-3 * part)
    assert total == pytest.approx(1.0)


def test_equal_scores_cost_the_log_of_the_number_of_choices():
    case = _case([0.7] * 5, [5, 4, 3, 2, 1], k=2)
    expected = (math.log(5) + math.log(4) + math.log(3) + math.log(2)) / 4
    assert output_of("fs_plackett_luce", case, PLAIN).total.item() == pytest.approx(2 * expected)


def test_only_score_over_temperature_matters():
    case = CASES["P3"]
    doubled = case.with_scores({stage: 2 * s for stage, s in case.scores.items()})
    one, two = (output_of("fs_plackett_luce", c, {"temperature": t}) for c, t in ((case, 0.5), (doubled, 1.0)))
    assert one.total.item() == pytest.approx(two.total.item())


def test_the_gradient_pulls_up_the_best_and_agrees_with_the_numerical_one():
    case = CASES["A"]
    assert all(gradient_QC[0, 0] < 0 < gradient_QC[0, -1] for gradient_QC in gradients_of("fs_plackett_luce", case, {}))
    loss = loss_of("fs_plackett_luce", case)

    def total(*scores: torch.Tensor) -> torch.Tensor:
        return loss(dict(zip(case.stage_names, scores, strict=True)), case.targets).total

    assert torch.autograd.gradcheck(total, tuple(case.leaves().values()))


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0.0}, "temperature"), ({"rest_weight": -0.1}, "rest_weight"),
    ({"rest_weight": 1.1}, "rest_weight"),
])
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        loss_of("fs_plackett_luce", CASES["A"], **options)
