"""afm and the blocks of pairs against numbers computed by hand and against loops over pairs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade.errors import ConfigError
from raycascade.models._layers import SplitLinear
from raycascade.models._pairs import FieldPairs, rescaled, split_with_rescaled
from raycascade.schema import FeatureSpace
from tests import f3
from tests.model_cases import build, random_batch
from tests.naive_pairs import block_order, pairs_of, whole_stack


def with_oracle_parameters() -> Any:
    model = f3.build("afm", dim=2, attention_dim=2)
    f3.assign(model.attention[0].weight, [(1, -1), (0.5, 2)])
    f3.assign(model.attention[0].bias, [0.1, 0.05])
    f3.assign(model.attention[2].weight, [(1, -2)])
    f3.assign(model.out.weight, [(0.5, -0.2)])
    return model


def test_afm_equals_the_hand_computed_attention_and_logits():
    model, logits, pooled = with_oracle_parameters(), [], []
    model.attention.register_forward_hook(lambda module, inputs, output: logits.append(output))
    model.out.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    f3.close(model(f3.batch())[0, :, 0], [0.442331, 0.610078])
    f3.close(logits[1][0, :, :, 0], [(0.21, -0.53, 0.19), (-0.50, 0.23, 0.39)])
    f3.close(pooled[0][0], [(-0.057333, -0.104990), (0.091861, -0.070737)])
    f3.close(model.explain(f3.batch())["attention"][0],
             [(0.406949, 0.194161, 0.398891), (0.181481, 0.376588, 0.441930)])


def test_afm_with_equal_weights_is_a_factorisation_machine():
    model = f3.build("afm", dim=2)
    f3.assign(model.attention[2].weight, torch.zeros(1, 8))
    f3.assign(model.out.weight, [(3, 3)])
    f3.close(model(f3.batch())[0, :, 0], [0.45 - 0.37, 0.55 + 0.12])


def test_every_pair_of_fields_of_both_sides_is_weighed_in_one_softmax():
    model, batch = build("afm", {}), random_batch()
    x = whole_stack(model.inputs, batch)
    products = torch.stack([x[..., i, :] * x[..., j, :] for i, j in pairs_of(x.shape[-2])], -2)
    weights = torch.softmax(model.attention(products).squeeze(-1), -1)
    f3.close(model.explain(batch)["attention"], weights.detach(), atol=1e-10)
    pooled = (weights[..., None] * products).sum(-2)
    linear = model.linear(model.linear.of_request(batch), batch)
    f3.close(model(batch), (linear + model.out(pooled)).detach(), atol=1e-10)


def test_the_penalty_on_the_attention_is_a_loss_of_its_own():
    model, batch = build("afm", {"l2_attention": 0.5}), random_batch()
    logits, extra = model.train_outputs(batch)
    assert torch.equal(logits, model(batch))
    f3.close(extra["l2_attention"], 0.5 * (model.attention[0].weight ** 2).sum().detach(), atol=1e-12)
    assert build("afm", {}).train_outputs(batch)[1] == {}


def test_a_single_field_has_no_pairs_and_is_refused():
    for name in ("afm", "fibinet", "deepffm", "fat_deepffm"):
        with pytest.raises(ConfigError, match=f"{name}: it multiplies pairs of fields and the stage sees 1 field"):
            f3.build(name, FeatureSpace(fields=f3.FIELDS[1:2]))


def test_a_model_of_field_vectors_refuses_numbers_as_they_are():
    with pytest.raises(ConfigError, match=r"model\.dense"):
        build("afm", {"dense": "raw"})


# ---------------------------------------------------------------- blocks of pairs
@pytest.mark.parametrize(("num_request", "num_candidate"), [(3, 2), (1, 4), (4, 1), (0, 3)])
def test_three_blocks_hold_every_pair_once_and_in_order(num_request: int, num_candidate: int):
    pairs = FieldPairs(num_request, num_candidate)
    left, right = torch.randn(2, 5, num_request + num_candidate, 2)
    (left_u, left_c), (right_u, right_c) = (x.split([num_request, num_candidate], -2) for x in (left, right))
    blocks = torch.cat([pairs.uu(left_u, right_u), pairs.uc(left_u, right_c), pairs.cc(left_c, right_c)], -2)
    in_order = pairs_of(num_request + num_candidate)
    by_loop = torch.stack([left[:, i] * right[:, j] for i, j in in_order], 1)
    assert torch.equal(blocks, by_loop[:, block_order(num_request, num_candidate)])
    assert torch.equal(pairs.in_order(blocks.mT), by_loop.mT)
    assert pairs.num_pairs == len(in_order)


@pytest.mark.parametrize(("num_candidates", "num_pairs"), [(1, 4), (20, 4), (20, 0)])
def test_rescaled_products_are_mapped_alike_in_either_order(num_candidates: int, num_pairs: int):
    """With 1 candidate the products are scaled and then mapped, with 20 they are mapped and then scaled."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    products_QPK, scale_QCP = drawn(2, num_pairs, 3), drawn(2, num_candidates, num_pairs)
    weight_HD = drawn(5, 3 * num_pairs)
    expected = torch.zeros(2, num_candidates, 5, dtype=torch.float64)
    for p in range(num_pairs):
        scaled = scale_QCP[:, :, p, None] * products_QPK[:, None, p]
        expected += scaled @ weight_HD[:, 3 * p:3 * p + 3].T
    f3.close(rescaled(products_QPK, scale_QCP, weight_HD), expected, atol=1e-12)


def test_a_split_map_with_rescaled_products_is_the_one_over_all_inputs():
    layer = SplitLinear(2, 2 * 3 + 4, 5).double()
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    shapes = ((6, 2), (6, 2, 3), (6, 7, 2), (6, 7, 2, 2))
    u, products, scale, x = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    whole = torch.cat([(scale[..., None] * products[:, None]).flatten(-2), x.flatten(-2)], -1)
    request_QH = layer.of_request(u)
    in_blocks = split_with_rescaled(layer, request_QH, products, scale, [x[:, :, :1], x[:, :, 1:]])
    f3.close(in_blocks, layer(request_QH, whole).detach(), atol=1e-12)
