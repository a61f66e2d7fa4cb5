"""autoint against numbers computed by hand and against loops over its heads."""

from typing import Any

import pytest
import torch
from torch import nn

from tests import f3
from tests.model_cases import build, random_batch
from tests.naive_pairs import whole_stack


def with_oracle_parameters(hidden: list[int]) -> Any:
    model = f3.build("autoint", dim=2, num_layers=1, heads=2, head_dim=2, hidden=hidden)
    maps = [3 * f3.T((2, 2), 1 + h) for h in (0, 1)] + [3 * f3.T((2, 2), 3 + h) for h in (0, 1)]
    maps += [f3.T((2, 2), 5 + h) for h in (0, 1)] + [f3.T((4, 2), 7)]
    f3.assign(model.attention[0].maps.weight, torch.cat(maps))
    f3.assign(model.out.weight, f3.T((1, 12), 9))
    return model


def test_autoint_equals_the_hand_computed_attention_and_logits():
    model = with_oracle_parameters([])
    last = []
    model.attention[0].register_forward_hook(lambda module, inputs, output: last.append(output))
    f3.close(model(f3.batch())[0, :, 0], [0.036811, -0.308691])
    f3.close(last[0][0, :, 0], [(0.068076, 0.028738, 0, 0), (0.038419, 0, 0, 0)])
    weights = model.explain(f3.batch())["attention_0"][0, :, 0]
    f3.close(weights[:, 0], [(0.337204, 0.370290, 0.292506), (0.317283, 0.313311, 0.369406)])
    f3.close(weights[:, 2], [(0.239159, 0.709334, 0.051507), (0.411907, 0.496706, 0.091387)])


def test_hidden_layers_add_an_mlp_over_the_fields_to_the_logit():
    model = with_oracle_parameters([2])
    f3.assign_mlp(model.mlp, 6)
    f3.close(model(f3.batch())[0, :, 0], [0.036811 - 0.279, -0.308691 - 0.018])


@pytest.mark.parametrize("layers", [1, 3])
def test_every_layer_is_the_softmax_of_unscaled_products_head_by_head(layers: int):
    options = {"num_layers": layers, "heads": 3, "head_dim": 5, "dim": 4}
    model, batch = build("autoint", options), random_batch()
    x, all_weights = whole_stack(model.inputs, batch), model.explain(batch)
    for n, layer in enumerate(model.attention):
        query, key, value, residual = layer.maps.weight.split(15)
        heads = []
        for h in range(3):
            rows = slice(5 * h, 5 * h + 5)
            logits = torch.einsum("qcfk,qcgk->qcfg", x @ query[rows].T, x @ key[rows].T)
            weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
            f3.close(all_weights[f"attention_{n}"][:, :, h], weights.detach(), atol=1e-10)
            heads.append(torch.einsum("qcfg,qcgk->qcfk", weights, x @ value[rows].T))
        x = torch.relu(torch.cat(heads, -1) + x @ residual.T)
    f3.close(model(batch), model.out(x.flatten(-2)).detach(), atol=1e-10)


def test_autoint_has_neither_first_order_weights_nor_biases_in_the_attention():
    model = build("autoint", {})
    assert model.first_order() == ()
    assert model.mlp is None
    assert [n for n, _ in model.named_parameters() if n.endswith("bias") and "inputs" not in n] == ["out.bias"]
    assert all(layer.maps.bias is None for layer in model.attention if isinstance(layer.maps, nn.Linear))
