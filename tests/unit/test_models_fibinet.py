"""fibinet against numbers computed by hand and against loops over pairs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import f3
from tests.model_cases import build, random_batch
from tests.naive_pairs import block_order, pairs_of, whole_stack


def with_oracle_parameters() -> Any:
    model = f3.build("fibinet", dim=2, hidden=[2])
    f3.assign_split(model.gates.first, torch.tensor([[1, 2, 0.5]]))
    f3.assign(model.gates.second.weight, [(2,), (1,), (-0.5,)])
    f3.assign(model.plain.weight, torch.stack([f3.T((2, 2), 1), f3.T((2, 2), 2)]))
    f3.assign(model.gated.weight, torch.stack([f3.T((2, 2), 5), f3.T((2, 2), 6)]))
    f3.assign_mlp(model.mlp, 6, width=12)
    return model


def test_fibinet_equals_the_hand_computed_gates_products_and_logits():
    model, products = with_oracle_parameters(), {}
    model.plain.register_forward_hook(lambda module, inputs, output: products.update(plain=torch.cat(output, -2)[0]))
    model.gated.register_forward_hook(lambda module, inputs, output: products.update(gated=torch.cat(output, -2)[0]))
    f3.close(model(f3.batch())[0, :, 0], [0.318329, 0.406506])
    gates = model.explain(f3.batch())["gates"][0]
    f3.close(gates, [(0.15, 0.075, 0), (1.9, 0.95, 0)])
    f3.close(products["plain"].flatten(1), [(0.012, -0.004, -0.020, 0.006, -0.115, -0.120),
                                            (0.008, 0.005, 0.028, -0.003, -0.161, -0.075)])
    f3.close(products["gated"][:, 0] * (gates[:, 0] * gates[:, 1])[:, None],
             [(0.000236, -0.000180), (0.025270, 0.036100)])


def test_the_share_of_shut_gates_is_told():
    f3.close(with_oracle_parameters().explain(f3.batch())["shut"][0], [1 / 3, 1 / 3])
    assert set(build("fibinet", {"excitation": "sigmoid"}).explain(random_batch())) == {"gates"}


def by_loop(layer: Any, x: Tensor) -> Tensor:
    """(W e_i) * e_j of every pair in the order of pairs [Q, C, P, k]."""
    pairs = pairs_of(x.shape[-2])
    which = {"all": lambda p: 0, "each": lambda p: pairs[p][0], "interaction": lambda p: p}[layer.kind]
    return torch.stack([(x[..., i, :] @ layer.weight[which(p)].T) * x[..., j, :] for p, (i, j) in enumerate(pairs)], -2)


@pytest.mark.parametrize("bilinear", ["all", "each", "interaction"])
@pytest.mark.parametrize("num_candidates", [2, 40])
def test_every_pair_is_multiplied_plain_and_gated(bilinear: str, num_candidates: int):
    """The MLP reads [p of UU; q of UU; p of UC and CC; q of UC and CC]; long lists map before they scale."""
    model = build("fibinet", {"bilinear": bilinear, "dim": 3, "excitation": "sigmoid"})
    batch = random_batch(num_candidates=num_candidates)
    x, inputs = whole_stack(model.inputs, batch), model.inputs
    z = x.mean(-1)
    first = torch.cat([model.gates.first.request.weight, model.gates.first.candidate.weight], 1)
    gates = torch.sigmoid(torch.relu(z @ first.T) @ model.gates.second.weight.T)
    f3.close(model.explain(batch)["gates"], gates.detach(), atol=1e-10)
    order = block_order(inputs.num_request, inputs.num_candidate)
    plain = by_loop(model.plain, x)[:, :, order]
    gated = by_loop(model.gated, x * gates[..., None])[:, :, order]
    uu = model.pairs.num_uu
    parts = [plain[:, :, :uu], gated[:, :, :uu], plain[:, :, uu:], gated[:, :, uu:]]
    layer = model.mlp.first
    weight = torch.cat([layer.request.weight, layer.candidate.weight], 1)
    hidden = torch.cat([part.flatten(-2) for part in parts], -1) @ weight.T + layer.bias
    linear = model.linear(model.linear.of_request(batch), batch)
    f3.close(model(batch), (linear + model.mlp.upper(hidden)).detach(), atol=1e-10)


def test_both_products_have_matrices_of_their_own_one_a_left_field():
    model = build("fibinet", {"dim": 3})
    num_fields = model.inputs.num_fields
    assert model.plain.weight.shape == model.gated.weight.shape == (num_fields - 1, 3, 3)
    assert model.plain.weight.data_ptr() != model.gated.weight.data_ptr()
    assert model.gates.first.candidate.weight.shape[0] == num_fields // 3
