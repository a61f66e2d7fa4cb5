"""edcn against numbers computed by hand, and its split first level against its equations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import f3
from tests.model_cases import build, random_batch

C_0 = [(0.410218, -0.179564, 0.383327, -0.411103, -0.177511, 0.053013),
       (0.407267, -0.185466, 0.339507, -0.201232, 0.575872, -0.561088)]
B_0 = [(0, -0.053230, 0, -0.014676, 0, 0.003972), (0, -0.035312, 0, -0.031297, 0, 0)]


def oracle_model(**options: Any) -> Any:
    model = f3.build("edcn", dim=2, **{"gate_scale": "none", **options})
    levels = model.num_layers
    f3.assign(model.theta, torch.tensor([[(1, 2, 3), (1, 1, 1)], [(3, 1, 2), (2, 1, 1)]]).double()[:, :levels])
    f3.assign_split(model.cross_first, f3.T((6,), 1).view(1, 6))
    f3.assign_split(model.deep_first, f3.T((6, 6), 6))
    f3.assign(model.deep_first.bias, f3.T((6,), 8))
    f3.assign(model.beta, torch.stack([f3.T((6,), 3), f3.T((6,), 4)])[:levels])
    for cross, deep in zip(model.cross, model.deep, strict=True):
        f3.assign(cross.weight, f3.T((6,), 2).view(1, 6))
        f3.assign(deep.weight, f3.T((6, 6), 7))
        f3.assign(deep.bias, f3.T((6,), 9))
    f3.assign(model.out.weight, f3.T((18,), 10).view(1, 18))
    return model


def test_the_gates_equal_the_hand_computed_ones():
    model = oracle_model()
    f3.close(model.gates()[0, 0], [0.090031, 0.244728, 0.665241])
    f3.close(model.gates().sum(-1), torch.ones(2, 2))
    f3.close(oracle_model(gate_scale="fields").gates()[0, 1], [1.0, 1.0, 1.0])


def test_the_first_level_equals_the_hand_computed_streams():
    model, batch = oracle_model(num_layers=1), f3.batch()
    c_QCD, _, b_QCD = model.streams(model.encode_request(batch), batch)
    f3.close(c_QCD[0], C_0)
    f3.close(b_QCD[0], B_0)


def test_the_logits_of_two_levels_equal_the_hand_computed_ones():
    f3.close(oracle_model()(f3.batch())[0, :, 0], [0.374113, 0.373762])


def bridged(model: Any, level: int, c: Tensor, d: Tensor) -> Tensor:
    bridge = model.bridges[level]
    if bridge.name == "attention":
        def weights(net: Any, x: Tensor) -> Tensor:
            return torch.softmax(torch.relu(x @ net[0].weight.T + net[0].bias) @ net[2].weight.T, -1)
        return weights(bridge.attention[0], c) * c + weights(bridge.attention[1], d) * d
    if bridge.name == "concat":
        return torch.relu(torch.cat([c, d], -1) @ bridge.joint.weight.T + bridge.joint.bias)
    return c * d if bridge.name == "hadamard" else c + d


@pytest.mark.parametrize("options", [
    {"bridge": "hadamard", "temperature": 0.5, "gate_scale": "none"}, {"bridge": "add"}, {"bridge": "concat"},
    {"bridge": "attention", "num_layers": 1}, {"bridge": "attention", "num_layers": 3}])
def test_the_split_form_equals_the_equations_over_whole_rows(options: dict[str, Any]):
    model, batch = build("edcn", {"dim": 4, **options}), random_batch()
    request_QD = model.inputs.request_matrix(batch, history=True)
    b = torch.cat([request_QD[:, None].expand(-1, 5, -1), model.inputs.candidate_matrix(batch)], -1)
    num_fields = b.shape[-1] // 4
    scale = num_fields if options.get("gate_scale", "fields") == "fields" else 1
    theta = model.theta / options.get("temperature", 1.0)
    weights = [torch.cat([m.request.weight, m.candidate.weight], 1) for m in (model.cross_first, model.deep_first)]
    base = b
    for level in range(model.num_layers):
        gates = [(g.exp() / g.exp().sum() * scale)[:, None].expand(-1, 4).flatten() for g in theta[:, level]]
        x_c, x_d = gates[0] * b, gates[1] * b
        base = x_c if level == 0 else base
        w, big_w = (weights[0], weights[1]) if level == 0 else (model.cross[level - 1].weight,
                                                                model.deep[level - 1].weight)
        bias = model.deep_first.bias if level == 0 else model.deep[level - 1].bias
        c = base * (x_c @ w.T) + model.beta[level] + x_c
        d = torch.relu(x_d @ big_w.T + bias)
        b = bridged(model, level, c, d)
    f3.close(model(batch), model.out(torch.cat([c, d, b], -1)), atol=1e-10)


def test_gates_start_equal_and_are_learnt():
    model = build("edcn", {}, generic=False)
    assert (model.theta == 1).all()
    f3.close(model.gates(), torch.ones_like(model.theta), atol=1e-12)
    generic = build("edcn", {})
    generic(random_batch()).sum().backward()
    assert generic.theta.grad.abs().flatten(0, 1).max(-1).values.min() > 1e-9


def test_the_attention_bridge_has_two_nets():
    nets = build("edcn", {"bridge": "attention"}).bridges[0].attention
    assert len(nets) == 2
    assert isinstance(nets[0], nn.Sequential)
    assert {p.data_ptr() for p in nets[0].parameters()}.isdisjoint(p.data_ptr() for p in nets[1].parameters())
