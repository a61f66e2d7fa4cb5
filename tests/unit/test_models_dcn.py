"""dcn against numbers computed by hand, and its compact form against the rows of its equation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import f3
from tests.model_cases import build, random_batch

X_1 = [(0.513, 0.026, 0.639, -0.752, -0.365, 0.278), (0.477, -0.046, 0.454, 0.085, 0.739, -0.631)]
X_2 = [(0.094, 0.088, 0.082, -0.676, 0.230, 0.064), (0.055690, 0.011380, -0.088620, -0.021550, 1.089830, -0.667070)]


def oracle_model(num_layers: int, out: Tensor) -> Any:
    """The oracle's first layers, read out with `out`."""
    model = f3.build("dcn", dim=2, hidden=[], num_layers=num_layers)
    f3.assign_split(model.products, torch.stack([*(f3.T((6,), n + 1) for n in range(num_layers)), out]))
    f3.assign(model.offsets, torch.stack([f3.T((6,), n + 3) for n in range(num_layers)]))
    return model


def test_the_logits_equal_the_hand_computed_ones():
    f3.close(oracle_model(2, f3.T((6,), 5))(f3.batch())[0, :, 0], [-0.249600, -0.450121])


@pytest.mark.parametrize(("num_layers", "expected"), [(1, X_1), (2, X_2)])
def test_every_entry_of_a_cross_layer_equals_the_hand_computed_one(num_layers: int, expected: Any):
    read = [oracle_model(num_layers, unit)(f3.batch())[0, :, 0] for unit in torch.eye(6, dtype=torch.float64)]
    f3.close(torch.stack(read, -1), expected)


def test_the_scale_of_x_0_equals_the_hand_computed_one():
    """a_n is what is left of x_0: the change of x_n . w with B_n taken off."""
    for num_layers, expected in ((1, [1.13, 0.77]), (2, [0.94, 0.5569])):
        shift = torch.stack([f3.T((6,), n + 3) for n in range(num_layers)]).sum(0)
        x_n = torch.tensor((X_1, X_2)[num_layers - 1], dtype=torch.float64)
        x_0 = torch.tensor(f3.X_0, dtype=torch.float64)
        f3.close((x_n - shift) / x_0, torch.tensor(expected).double()[:, None].expand(2, 6), atol=1e-5)
        out = f3.T((6,), 5)
        logits = oracle_model(num_layers, out)(f3.batch())[0, :, 0]
        f3.close((logits - shift @ out) / (x_0 @ out), expected)


def test_without_weights_x_n_is_x_0_and_the_offsets():
    for at, unit in enumerate(torch.eye(6, dtype=torch.float64)):
        model = oracle_model(2, unit)
        f3.assign_split(model.products, torch.stack([torch.zeros(6), torch.zeros(6), unit]))
        shift = f3.T((6,), 3)[at] + f3.T((6,), 4)[at]
        f3.close(model(f3.batch())[0, :, 0], [x[at] + float(shift) for x in f3.X_0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 4, "dense": "field"}, {"num_layers": 1, "hidden": []}])
def test_the_compact_form_equals_the_equation_over_whole_rows(options: dict[str, Any]):
    model, batch = build("dcn", options, num_tasks=2), random_batch()
    request_QD = model.inputs.request_matrix(batch, history=True)
    x_0 = torch.cat([request_QD[:, None].expand(-1, 5, -1), model.inputs.candidate_matrix(batch)], -1)
    weights = torch.cat([model.products.request.weight, model.products.candidate.weight], 1)
    x = x_0
    for layer in range(model.num_layers):
        x = x_0 * (x @ weights[layer])[..., None] + model.offsets[layer] + x
    whole = x @ weights[model.num_layers:].T + model.bias
    if model.deep.mlp is not None:
        first = model.deep.mlp.first
        joined = torch.cat([first.request.weight, first.candidate.weight], 1)
        whole = whole + model.deep.mlp.upper(x_0 @ joined.T + first.bias)
    f3.close(model(batch), whole, atol=1e-10)


def test_the_deep_part_reads_x_0_beside_the_crosses():
    model = f3.build("dcn", dim=2, hidden=[2])
    f3.assign_mlp(model.deep.mlp, 6)
    with_crosses = oracle_model(2, f3.T((6,), 5))
    model.products.load_state_dict(with_crosses.products.state_dict())
    f3.assign(model.offsets, with_crosses.offsets)
    f3.close(model(f3.batch())[0, :, 0], [-0.2496 - 0.279, -0.450121 - 0.018])
