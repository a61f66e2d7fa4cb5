import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from raycascade.errors import ConfigError, DataError
from raycascade.losses import LossOutput
from tests.objective_lists import (
    CASE_A,
    CASE_B,
    CASE_C,
    CASE_P2,
    CASE_P3,
    CASES,
    STAGES,
    ListCase,
    list_case,
    loss_of,
    output_of,
    parts_of,
)


def _bce(case: ListCase, dtype: torch.dtype = torch.float64) -> LossOutput:
    return loss_of("bce", case, entry_levels=case.entry_levels)(case.leaves(dtype), case.targets)


def _about(*expected: float) -> Any:
    return pytest.approx(list(expected), abs=2e-6, rel=0)


# ---------------------------------------------------------------- bce
@pytest.mark.parametrize(("case", "expected", "parts"), [
    ("A", 1.329908, (0.701212, 0.628696)), ("B", 2.182337, (0.726906, 0.696985, 0.758447)),
    ("C", 1.341858, (0.633505, 0.708353)), ("P2", 1.438261, (0.762275, 0.675986)),
    ("P3", 2.223006, (0.761177, 0.760913, 0.700916)),
])
def test_bce_has_the_published_values(case, expected, parts):
    output = _bce(CASES[case])
    assert output.total.item() == pytest.approx(expected, abs=2e-6)
    assert parts_of(output, "bce/") == _about(*parts)
    assert _bce(CASES[case], torch.float32).total.item() == pytest.approx(expected, rel=2e-5)


def test_bce_at_equal_scores_is_ln_two_per_stage():
    for case, stages in ((CASE_P2, 2), (CASE_P3, 3)):
        flat = case.with_scores({name: torch.zeros_like(s) for name, s in case.scores.items()})
        assert _bce(flat).total.item() == pytest.approx(stages * math.log(2))


def test_a_stage_learns_by_default_from_what_entered_it():
    explicit = loss_of("bce", CASE_B, entry_levels=(0, 1, 2))(CASE_B.scores, CASE_B.targets).total
    assert output_of("bce", CASE_B).total.item() == explicit.item()
    assert output_of("bce", CASE_B).total.item() != _bce(CASE_B).total.item()


def test_bce_on_a_label_is_the_mean_cross_entropy_of_the_observed_candidates():
    scores, label = CASE_A.scores["retriever"][0].tolist(), CASE_A.targets.labels["click"][0].tolist()
    observed = [(s, y) for s, y in zip(scores, label, strict=True) if not math.isnan(y)]
    chances = [(1 / (1 + math.exp(-s)), y) for s, y in observed]
    expected = sum(-math.log(p if y else 1 - p) for p, y in chances) / len(observed)
    single = replace(CASE_A.with_scores({"retriever": CASE_A.scores["retriever"]}),
                     targets=replace(CASE_A.targets, keep=(), k=0))
    output = loss_of("bce", single, label="click", entry_levels=(0,))(single.scores, single.targets)
    assert len(observed) == 5
    assert output.total.item() == pytest.approx(expected)


def test_a_missing_label_names_the_near_miss():
    for name in ("bce", "softmax"):
        with pytest.raises(ConfigError, match=r"'clik' is not a label.*did you mean 'click'"):
            output_of(name, CASE_A, {"label": "clik"})


def test_the_numerical_gradient_of_bce_agrees():
    loss = loss_of("bce", CASE_A)
    names = CASE_A.stage_names
    assert torch.autograd.gradcheck(lambda *s: loss(dict(zip(names, s, strict=True)), CASE_A.targets).total,
                                    tuple(CASE_A.leaves().values()))


def test_bce_wants_one_entry_level_per_stage():
    with pytest.raises(ConfigError, match="entry_levels"):
        loss_of("bce", CASE_A, entry_levels=(0, 1, 2))


# ---------------------------------------------------------------- softmax
def _plain_softmax(
    scores: list[float], weights: list[float], log_q: list[float], temperature: float, c: float
) -> float | None:
    """One request in plain Python, straight from the definition; None where it is not defined."""
    odds = [math.exp(s / temperature - c * p) for s, p in zip(scores, log_q, strict=True)]
    against = sum(o for o, w in zip(odds, weights, strict=True) if w == 0)
    positives = [(o, w) for o, w in zip(odds, weights, strict=True) if w > 0]
    if not positives or not any(w == 0 for w in weights):
        return None
    return sum(-w * math.log(o / (o + against)) for o, w in positives) / sum(w for _, w in positives)


@pytest.mark.parametrize("options", [
    {"label": "click"}, {"label": "click", "temperature": 0.3}, {"label": "click", "correction": 0.0},
    {"label": "click", "correction": 0.5}, {},
])
@pytest.mark.parametrize("case", ["A", "B", "C", "P2"])
def test_softmax_equals_its_definition_in_plain_python(case: str, options: dict[str, Any]):
    known = CASES[case]
    num_requests, width = known.targets.mask_QC.shape
    log_q_QC = torch.linspace(-4, 0, width, dtype=torch.float64).repeat(num_requests, 1)
    targets = replace(known.targets, log_q_QC=log_q_QC)
    expected = {name: [] for name in known.scores}
    for q in range(num_requests):
        real = known.targets.mask_QC[q].nonzero()[:, 0].tolist()
        y = [known.targets.relevance_QC[q, j].item() for j in real]
        if "label" in options:
            weights = [1.0 if known.targets.labels["click"][q, j].item() > 0.5 else 0.0 for j in real]
        else:
            spans = [(sum(z > v for z in y), y.count(v)) for v in y]
            weights = [min(1.0, max(0.0, (known.targets.k - above) / tied)) for above, tied in spans]
        for name, scores_QC in known.scores.items():
            scores, log_q = ([x_QC[q, j].item() for j in real] for x_QC in (scores_QC, log_q_QC))
            temperature, correction = options.get("temperature", 1.0), options.get("correction", 1.0)
            value = _plain_softmax(scores, weights, log_q, temperature, correction)
            assert value is not None
            expected[name].append(value)
    output = loss_of("softmax", known, **options)(known.scores, targets)
    means = {f"softmax/{name}": sum(values) / len(values) for name, values in expected.items()}
    assert {name: part.item() for name, part in output.parts.items()} == pytest.approx(means)
    assert output.total.item() == pytest.approx(sum(means.values()))


def test_softmax_of_one_positive_against_two_negatives_is_the_value_computed_by_hand():
    case = list_case([[math.log(2.0), 0.0, 0.0]], (9, 1, 1), (1, 0, 0), keep=(1,), k=1)
    assert output_of("softmax", case).total.item() == pytest.approx(math.log(2.0))  # 2 / (2 + 1 + 1)


def test_the_other_positives_of_a_list_are_not_among_the_negatives():
    case = list_case([[0.0, 50.0, 0.0]], (9, 9, 1), (1, 1, 0), keep=(2,), k=2)
    assert output_of("softmax", case).total.item() == pytest.approx(math.log(2.0) / 2)


def test_requests_without_a_positive_or_without_a_negative_do_not_count_for_softmax():
    none = CASE_A._mapped(lambda x: torch.zeros_like(x) if x is CASE_A.targets.labels["click"] else x)
    every = CASE_A._mapped(lambda x: torch.ones_like(x) if x is CASE_A.targets.labels["click"] else x)
    alone = output_of("softmax", CASE_A, {"label": "click"}).total.item()
    together = output_of("softmax", CASE_A.stacked(none).stacked(every), {"label": "click"}).total.item()
    assert together == pytest.approx(alone)
    assert output_of("softmax", none, {"label": "click"}).total.item() == 0


def test_softmax_shows_the_trainer_what_to_put_on_the_list():
    loss = loss_of("softmax", CASE_A, over="sampled", num_sampled=64, sample_from="uniform")
    assert (loss.config.over, loss.config.num_sampled, loss.config.sample_from) == ("sampled", 64, "uniform")
    with pytest.raises(ConfigError, match="over"):
        loss_of("softmax", CASE_A, over="everything")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_is_finite_and_linear_in_the_gap_at_extreme_scores(dtype: torch.dtype):
    case = list_case([[-1e6, 1e6, 0.0]], (9, 1, 1), (1, 0, 0), keep=(1,), k=1)
    leaves = case.leaves(dtype)
    total = loss_of("softmax", case)(leaves, case.targets).total
    total.backward()
    assert total.item() == pytest.approx(2e6)
    gradient_QC = leaves["retriever"].grad
    assert gradient_QC is not None
    assert gradient_QC[0].tolist() == pytest.approx([-1.0, 1.0, 0.0])


# ---------------------------------------------------------------- the door
def test_bce_and_softmax_train_a_single_stage_under_the_quotas_of_the_whole_cascade():
    for name in ("bce", "softmax"):
        case = CASE_A.with_scores({"retriever": CASE_A.scores["retriever"]})
        whole, alone = output_of(name, CASE_A), output_of(name, case)
        assert alone.total.item() == pytest.approx(whole.parts[f"{name}/retriever"].item())


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"mask_QC": torch.ones(1, 6)}, DataError, "mask_QC must be bool"),
    ({"relevance_QC": torch.ones(1, 5)}, DataError, r"relevance_QC has shape \[1, 5\], expected \[1, 6\]"),
    ({"keep": (4,)}, ConfigError, "expected 2 widths"),
    ({"keep": (4, 0)}, ConfigError, "expected 2 widths of at least 1"),
    ({"k": 0}, ConfigError, "lists.k: expected at least 1, got 0"),
])
def test_targets_that_do_not_fit_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        loss_of("lcron", CASE_A)(CASE_A.scores, replace(CASE_A.targets, **change))


def test_scores_that_do_not_fit_are_refused_by_name():
    narrow = {**CASE_A.scores, "pre_ranker": torch.zeros(1, 5)}
    with pytest.raises(DataError, match=r"scores\['pre_ranker'\] has shape \[1, 5\]"):
        loss_of("bce", CASE_A)(narrow, CASE_A.targets)
    turned = dict(reversed(CASE_A.scores.items()))
    with pytest.raises(DataError, match="in this order"):
        loss_of("bce", CASE_A)(turned, CASE_A.targets)


def test_the_order_of_the_scores_is_the_cascade():
    turned = CASE_B.with_scores(dict(reversed(CASE_B.scores.items())))
    forwards, backwards = (output_of("lcron", case, {"joint_k": "keep"}).total.item() for case in (CASE_B, turned))
    assert forwards != pytest.approx(backwards, abs=1e-6)
    assert list(output_of("bce", turned).parts) == [f"bce/{name}" for name in reversed(STAGES[:3])]


@pytest.mark.parametrize(("name", "options"), [
    ("lcron", {"temperature": 1}), ("lcron", {"operator": "dftopk"}), ("bce", {}), ("softmax", {}),
])
def test_case_c_equals_the_same_list_without_its_padding(name: str, options: dict[str, Any]):
    alone = output_of(name, CASE_C.take([0, 1, 3, 4, 5]), options)
    assert output_of(name, CASE_C, options).total.item() == pytest.approx(alone.total.item())
