"""dcn_v2 against numbers computed by hand, and its split and merged maps against its equations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.errors import ConfigError
from tests import f3
from tests.model_cases import SPACE, build, random_batch

X_1 = [(0.153, 0.124, 0.342, -0.356, -0.650, 0.300), (0.117, 0.228, 0.266, 0.375, 0.581, -0.273)]
X_2 = [(0.109030, 0.168560, 0.135030, -0.357800, -0.952700, 0.318900),
       (0.068790, 0.204100, 0.230800, 0.407250, 0.958510, -0.138330)]
MIXED = [(0.069824, 0.239866, 0.180569, -0.441785, -0.250643, 0.602312),
         (0.067382, 0.246102, 0.126273, 0.566110, 0.330114, -0.291734)]
GATES = [(0.522485, 0.477515), (0.603483, 0.396517)]


def full_model(**options: Any) -> Any:
    model = f3.build("dcn_v2", dim=2, **options)
    f3.assign_split(model.crosses[0].map, f3.T((6, 6), 1))
    f3.assign(model.crosses[0].map.bias, f3.T((6,), 3))
    f3.assign(model.crosses[1].map.weight, f3.T((6, 6), 2))
    f3.assign(model.crosses[1].map.bias, f3.T((6,), 4))
    return model


def mixture_model() -> Any:
    model = f3.build("dcn_v2", dim=2, hidden=[], num_layers=1, rank=2, experts=2)
    cross = model.crosses[0]
    f3.assign(cross.up.weight, torch.cat([f3.T((6, 2), 1), f3.T((6, 2), 2)], 1))
    f3.assign_split(cross.down, torch.cat([f3.T((6, 2), 3), f3.T((6, 2), 4)], 1).T)
    f3.assign(cross.core, torch.stack([f3.T((2, 2), 5), f3.T((2, 2), 6)]))
    f3.assign(cross.up.bias, f3.T((6,), 8))
    f3.assign_split(cross.gate, f3.T((2, 6), 9))
    f3.assign(model.out.first.weight, f3.T((6,), 5).view(1, 6))
    return model


def rows_before_the_output(model: Any) -> list[Tensor]:
    """x_1 to x_n of the two candidates."""
    batch = f3.batch()
    request_QD, share, _ = model.encode_request(batch)
    return [x[0] for x in model._layers(request_QD, share, model.inputs.candidate_matrix(batch))]


def test_the_full_matrix_equals_the_hand_computed_rows_and_logits():
    model = full_model(hidden=[])
    f3.assign(model.out.first.weight, f3.T((6,), 5).view(1, 6))
    for actual, expected in zip(rows_before_the_output(model), (X_1, X_2), strict=True):
        f3.close(actual, expected)
    f3.close(model(f3.batch())[0, :, 0], [0.271765, -0.164443])


def test_the_mixture_equals_the_hand_computed_gates_rows_and_logits():
    model = mixture_model()
    f3.close(model.explain(f3.batch())["gates"][0, 0], GATES)
    f3.close(rows_before_the_output(model)[0], MIXED)
    f3.close(model(f3.batch())[0, :, 0], [0.115970, 0.078900])


def test_parallel_reads_x_0_and_stacked_reads_x_n():
    parallel, stacked = full_model(hidden=[2]), full_model(hidden=[2], structure="stacked")
    f3.assign_mlp(parallel.deep.mlp, 6)
    f3.assign(parallel.out.first.weight, f3.T((6,), 5).view(1, 6))
    f3.close(parallel(f3.batch())[0, :, 0], [0.271765 - 0.279, -0.164443 - 0.018])
    f3.assign_mlp(stacked.out, 6)
    hidden = torch.relu(torch.tensor(X_2, dtype=torch.float64) @ f3.T((2, 6), 6).T + f3.T((2,), 7))
    f3.close(stacked(f3.batch())[0, :, 0], hidden @ f3.T((2,), 8), atol=1e-5)


def test_a_mixture_of_two_layers_equals_its_equation_expert_by_expert():
    model, batch = build("dcn_v2", {"rank": 3, "experts": 2, "hidden": []}), random_batch()
    request_QD = model.inputs.request_matrix(batch, history=True)
    x_0 = torch.cat([request_QD[:, None].expand(-1, 5, -1), model.inputs.candidate_matrix(batch)], -1)
    x, gates = x_0, []
    for cross in model.crosses:
        split = hasattr(cross.down, "request")
        down, gate = (torch.cat([m.request.weight, m.candidate.weight], 1) if split else m.weight
                      for m in (cross.down, cross.gate))
        gates.append(torch.softmax(x @ gate.T, -1))
        change = torch.zeros_like(x)
        for e in range(2):
            inner = torch.tanh(torch.tanh(x @ down[3 * e:3 * e + 3].T) @ cross.core[e].T)
            expert = x_0 * (inner @ cross.up.weight[:, 3 * e:3 * e + 3].T + cross.up.bias)
            change = change + gates[-1][..., e, None] * expert
        x = change + x
    f3.close(model.explain(batch)["gates"], torch.stack(gates), atol=1e-10)
    f3.close(model(batch), model.out(x) + model.bias, atol=1e-10)


def test_one_expert_has_no_gate_and_two_layers_have_gates_of_their_own():
    assert not any("gate" in name for name, _ in build("dcn_v2", {"rank": 3}).named_parameters())
    assert build("dcn_v2", {"rank": 3}).explain(random_batch()) == {}
    two = build("dcn_v2", {"rank": 3, "experts": 2})
    gates = two.explain(random_batch())["gates"]
    assert gates.shape == (2, 8, 5, 2)
    assert (gates[0] - gates[1]).abs().max() > 1e-6


def test_a_full_matrix_with_experts_is_refused():
    cls, config = plugins.options("models", {"name": "dcn_v2", "experts": 4}, "model")
    with pytest.raises(ConfigError, match="dcn_v2: experts is 4, but the matrix is full; set a rank"):
        cls(config, SPACE)


def test_the_first_layer_is_the_only_one_that_is_split():
    model = build("dcn_v2", {"num_layers": 3})
    assert [isinstance(cross.map, nn.Linear) for cross in model.crosses] == [False, True, True]
