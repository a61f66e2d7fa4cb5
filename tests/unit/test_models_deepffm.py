"""deepffm and field-aware vectors against numbers computed by hand and against loops over pairs."""


import pytest
import torch

from raycascade.models._field_aware import partner_slots
from tests import f3
from tests.field_aware import cell_vectors, with_field_aware_vectors
from tests.model_cases import SPACE, build, random_batch
from tests.naive_pairs import block_order, pairs_of

PRODUCTS = [(0.12, -0.12, -0.16, 0.35, -0.18, -0.08), (0.09, 0.24, 0.32, -0.10, 0.45, -0.08)]


def test_deepffm_equals_the_hand_computed_products_and_logits():
    model, seen = with_field_aware_vectors("deepffm", hidden=[2]), []
    f3.assign_mlp(model.mlp, 7)
    model.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    f3.close(model(f3.batch())[0, :, 0], [0.4705, 0.632])
    f3.close(seen[0][0], PRODUCTS)


def test_inner_products_are_the_hand_computed_ones():
    model, seen = with_field_aware_vectors("deepffm", hidden=[2], product="inner"), []
    model.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(f3.batch())
    f3.close(seen[0][0], [(0.0, 0.19, -0.26), (0.33, 0.22, 0.37)])


def test_with_the_same_vector_for_every_partner_it_is_a_factorisation_machine():
    model = with_field_aware_vectors("deepffm", hidden=[], product="inner", step=0.0)
    f3.assign(model.mlp.first.candidate.weight, torch.ones(1, 3))
    f3.close(model(f3.batch())[0, :, 0], [0.45 - 0.37, 0.55 + 0.12])


@pytest.mark.parametrize("product", ["hadamard", "inner"])
def test_every_pair_multiplies_the_vectors_meant_for_each_other(product: str):
    model, batch = build("deepffm", {"product": product}), random_batch()
    vectors, pairs = cell_vectors(model, batch), model.pairs
    num_request, num_candidate = pairs.inputs.num_request, pairs.inputs.num_candidate
    every = pairs_of(num_request + num_candidate)
    h = torch.stack([vectors[i, j] * vectors[j, i] for i, j in every], -2)
    h = h if product == "hadamard" else h.sum(-1, keepdim=True)
    first = model.mlp.first
    weight = torch.cat([first.request.weight, first.candidate.weight], 1)
    hidden = h[:, :, block_order(num_request, num_candidate)].flatten(-2) @ weight.T + first.bias
    linear = model.linear(model.linear.of_request(batch), batch)
    f3.close(model(batch), (linear + model.mlp.upper(hidden)).detach(), atol=1e-10)


def test_no_vector_is_kept_for_the_field_itself_and_none_is_idle():
    model, batch = build("deepffm", {"dim": 3}), random_batch(num_requests=40)
    num_fields = model.pairs.inputs.num_fields
    assert model.pairs.inputs.tables.embedding_dim == 3 * (num_fields - 1)
    model(batch).sum().backward()
    tables = model.pairs.inputs.tables
    gradient = tables.weight.grad.to_dense().abs()
    for name, first in tables.first_rows.items():
        assert (gradient[first + 1:first + tables.sizes[name]].sum(0) > 0).all(), name


def test_the_caller_declares_plain_vocabularies():
    """Every table keeps the rows of its vocabulary."""
    tables = build("deepffm", {}).pairs.inputs.tables
    assert tables.sizes == {f.table: f.num_rows for f in SPACE.fields if f.table}


# ---------------------------------------------------------------- slots
@pytest.mark.parametrize("vocabularies", ["abc", "abca", "aabab", "aaa", "ab"])
def test_each_partner_has_a_slot_of_its_own_and_siblings_agree_about_strangers(vocabularies: str):
    slots, num_fields = partner_slots(vocabularies), len(vocabularies)
    for i in range(num_fields):
        partners = [j for j in range(num_fields) if j != i]
        assert sorted(slots[i, partners].tolist()) == list(range(num_fields - 1))
        assert slots[i, i] == -1
        for sibling in range(num_fields):
            if vocabularies[sibling] == vocabularies[i]:
                strangers = [j for j in range(num_fields) if vocabularies[j] != vocabularies[i]]
                assert torch.equal(slots[i, strangers], slots[sibling, strangers])


def test_slots_of_fields_that_share_nothing_are_in_the_order_of_fields():
    assert partner_slots("abc").tolist() == [[-1, 0, 1], [0, -1, 1], [0, 1, -1]]
