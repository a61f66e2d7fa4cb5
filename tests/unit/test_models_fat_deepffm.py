"""fat_deepffm against numbers computed by hand and against loops over pairs."""

from typing import Any

import pytest
import torch

from tests import f3
from tests.field_aware import cell_vectors, with_field_aware_vectors
from tests.model_cases import build, random_batch
from tests.naive_pairs import block_order, pairs_of

FILTERS = [(1.0, 0.5)] * 3 + [(0.5, 1.0)] * 3


def with_oracle_parameters() -> Any:
    model = with_field_aware_vectors("fat_deepffm", hidden=[2], reduction=2)
    f3.assign(model.filters, FILTERS)
    f3.assign_split(model.gates.first, f3.T((3, 6), 7).abs())
    f3.assign(model.gates.second.weight, f3.T((6, 3), 3).abs())
    f3.assign_mlp(model.mlp, 7)
    return model


def test_fat_deepffm_equals_the_hand_computed_gates_and_logits():
    model, composed = with_oracle_parameters(), []
    model.gates.first.register_forward_pre_hook(lambda module, inputs: composed.append(inputs[1]))
    f3.close(model(f3.batch())[0, :, 0], [0.513725, 0.642196])
    f3.close(composed[0][0], [(0.25, 0.20, 0.50, 0.65), (0.60, 1.05, 0.20, 0.35)])
    explained = model.explain(f3.batch())
    f3.close(explained["gates"][0], [(0.692, 0.682, 0.485, 0.761, 0.613, 0.554),
                                     (0.8585, 0.8530, 0.6530, 0.9270, 0.7845, 0.7215)])
    assert (explained["shut"] == 0).all()


def test_the_gated_products_are_the_hand_computed_ones():
    """An identity in place of the MLP's first layer shows them."""
    model, seen = with_field_aware_vectors("fat_deepffm", hidden=[6], reduction=2), []
    f3.assign(model.filters, FILTERS)
    f3.assign_split(model.gates.first, f3.T((3, 6), 7).abs())
    f3.assign(model.gates.second.weight, f3.T((6, 3), 3).abs())
    f3.assign(model.mlp.first.candidate.weight, torch.eye(6))
    model.mlp.upper.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(f3.batch())
    f3.close(seen[0][0], [(0.040274, -0.040274, -0.066891, 0.146323, -0.075887, -0.033728),
                          (0.050454, 0.134544, 0.214137, -0.066918, 0.300974, -0.053506)])


@pytest.mark.parametrize("product", ["hadamard", "inner"])
@pytest.mark.parametrize("num_candidates", [2, 40])
def test_vectors_are_gated_before_they_are_multiplied(product: str, num_candidates: int):
    """The MLP reads the pairs in blocks UU, UC, CC; for long lists it maps UU products before it scales them."""
    model = build("fat_deepffm", {"product": product, "dim": 3})
    batch = random_batch(num_candidates=num_candidates)
    vectors, pairs = cell_vectors(model, batch), model.pairs
    num_request, num_candidate = pairs.inputs.num_request, pairs.inputs.num_candidate
    num_fields = num_request + num_candidate
    cell = {(i, j): i * (num_fields - 1) + int(pairs.slots[i, j]) for i, j in vectors}
    composed = torch.stack([torch.relu((vectors[key] * model.filters[cell[key]]).sum(-1))
                            for key in sorted(cell, key=cell.__getitem__)], -1)
    first = torch.cat([model.gates.first.request.weight, model.gates.first.candidate.weight], 1)
    gates = torch.relu(torch.relu(composed @ first.T) @ model.gates.second.weight.T)
    f3.close(model.explain(batch)["gates"], gates.detach(), atol=1e-10)
    gated = {key: gates[..., cell[key], None] * vector for key, vector in vectors.items()}
    h = torch.stack([gated[i, j] * gated[j, i] for i, j in pairs_of(num_fields)], -2)
    h = h if product == "hadamard" else h.sum(-1, keepdim=True)
    layer = model.mlp.first
    hidden = h[:, :, block_order(num_request, num_candidate)].flatten(-2) @ layer.candidate.weight.T + layer.bias
    linear = model.linear(model.linear.of_request(batch), batch)
    f3.close(model(batch), (linear + model.mlp.upper(hidden)).detach(), atol=1e-10)


def test_the_excitation_is_as_narrow_as_asked_for_and_without_biases():
    model = build("fat_deepffm", {"reduction": 3})
    num_fields = model.pairs.inputs.num_fields
    assert model.gates.second.weight.shape == (num_fields * (num_fields - 1), num_fields * (num_fields - 1) // 3)
    assert model.gates.first.bias is None
    assert model.gates.second.bias is None
    assert model.filters.shape == (num_fields * (num_fields - 1), 4)


def test_no_gate_starts_shut_for_good():
    """One hidden unit: a negative weight behind it could never open."""
    for seed in range(3):
        model = build("fat_deepffm", {"reduction": 1000}, generic=False, seed=seed)
        gates = model.explain(random_batch(num_requests=40))["gates"]
        assert (gates.flatten(0, 1).amax(0) > 0).all()
