"""shared_bottom, mmoe and ple against numbers computed by hand, and the experts they share."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.errors import ConfigError
from raycascade.models._experts import ExpertOptions, Experts
from tests import f3, model_cases
from tests.f3 import T, assign, assign_split, close
from tests.model_cases import random_batch


def hand_set(name: str, *, heads: int, **options: Any) -> Any:
    """Two tasks, hidden layers of 2 units, towers of one map T((2,), heads + t)."""
    model = f3.build(name, num_tasks=2, dim=2, hidden=[2], tower_hidden=[], **options)
    for task, tower in enumerate(model.towers.of_task):
        assign(tower.first.weight, T((1, 2), heads + task))
    return model


def assign_experts(experts: Experts, seeds: tuple[int, ...]) -> None:
    assign_split(experts.first, torch.cat([T((2, 6), s) for s in seeds]))
    assign(experts.first.bias, torch.cat([T((2,), s + 1) for s in seeds]))


def mmoe() -> Any:
    model = hand_set("mmoe", heads=3, experts=2)
    assign_experts(model.experts, (6, 8))
    assign_split(model.gate.map, torch.cat([T((2, 6), 1), T((2, 6), 2)]))
    return model


def ple() -> Any:
    model = hand_set("ple", heads=9, own_experts=1, shared_experts=1)
    (level,) = model.levels
    for bank, seed in zip(level.banks, (6, 8, 4), strict=True):
        assign_experts(bank, (seed,))
    for task, gate in enumerate(level.gates):
        assign_split(gate.map, T((2, 6), 1 + task))
    return model


# ---------------------------------------------------------------- by hand
def test_shared_bottom_equals_the_hand_computed_logits():
    model = hand_set("shared_bottom", heads=3)
    assign_experts(model.bottom, (6,))
    close(model(f3.batch())[0], [(0.376, -0.382), (0.024, -0.024)])


def test_mmoe_equals_the_hand_computed_experts_gates_and_logits():
    model, batch = mmoe(), f3.batch()
    close(model.explain(batch)["gates"][0], [[(0.576885, 0.423115), (0.467546, 0.532454)],
                                             [(0.361237, 0.638763), (0.549834, 0.450166)]])
    found = model.experts(model.encode_request(batch)[0], model.inputs.candidate_matrix(batch), batch.mask_QC)
    close(found[0], [[(0.97, 0.06), (0.10, 0.40)], [(0.06, 0.0), (0.0, 0.81)]])
    close(model(batch)[0], [(0.199984, -0.178602), (-0.094810, 0.023267)])


def test_ple_equals_the_hand_computed_gates_and_logits():
    model, batch = ple(), f3.batch()
    close(model.explain(batch)["task_gates.1"][0], [[(0.576885, 0.423115), (0.467546, 0.532454)],
                                                    [(0.361237, 0.638763), (0.549834, 0.450166)]])
    close(model(batch)[0], [(0.074427, -0.085208), (0.182048, -0.188980)])


# ---------------------------------------------------------------- by another way
def test_experts_side_by_side_equal_one_mlp_after_the_other():
    torch.manual_seed(2)
    options = ExpertOptions(hidden=(6, 5, 4), activation="tanh")
    experts = Experts(options, 3, 7, num=3).double()
    model_cases.with_generic_parameters(experts, seed=2)
    request_QD, x_QCD = torch.randn(2, 3).double(), torch.randn(2, 4, 7).double()
    mask_QC = torch.ones(2, 4, dtype=torch.bool)
    found = experts(experts.of_request(request_QD), x_QCD, mask_QC)
    whole = torch.cat([experts.first.request.weight, experts.first.candidate.weight], 1)
    for e in range(3):
        y = torch.cat([request_QD[:, None].expand(-1, 4, -1), x_QCD], -1)
        y = torch.tanh(nn.functional.linear(y, whole[e * 6:e * 6 + 6], experts.first.bias[e * 6:e * 6 + 6]))
        for weight, bias in zip(experts.weights, experts.biases, strict=True):
            y = torch.tanh(y @ weight[e].T + bias[e])
        close(found[:, :, e], y, atol=1e-10)


def test_gates_of_ple_see_own_and_shared_experts_and_the_shared_gate_sees_all():
    model, batch = model_cases.build("ple", {"levels": 3, "own_experts": 2, "shared_experts": 3}, num_tasks=2), \
        random_batch()
    widths = {name: weights.shape[-1] for name, weights in model.explain(batch).items()}
    assert widths == {"task_gates.1": 5, "shared_gate.1": 7, "task_gates.2": 5, "shared_gate.2": 7, "task_gates.3": 5}


def test_the_experts_of_one_task_reach_another_task_through_the_shared_path_of_a_deeper_level_only():
    def touched(levels: int) -> bool:
        model = model_cases.build("ple", {"levels": levels}, num_tasks=2)
        model(random_batch())[..., 0].sum().backward()
        gradient: Tensor | None = model.levels[0].banks[1].first.bias.grad
        return gradient is not None and bool(gradient.abs().max() > 0)

    assert (touched(1), touched(2)) == (False, True)


@pytest.mark.parametrize(("name", "options", "key"), [
    ("mmoe", {"experts": 1}, "experts"), ("ple", {"own_experts": 0}, "own_experts"),
    ("ple", {"shared_experts": 0}, "shared_experts"), ("shared_bottom", {"hidden": []}, "hidden")])
def test_too_few_experts_are_refused(name: str, options: dict[str, Any], key: str):
    with pytest.raises(ConfigError, match=rf"model\.{key}: "):
        plugins.options("models", {"name": name, **options}, "model")
