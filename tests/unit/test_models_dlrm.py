"""dlrm against numbers computed by hand and against loops over its rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models._layers import masked_mean
from raycascade.schema import FeatureSpace, Field
from tests import f3
from tests.model_cases import SPACE, build, random_batch

NUMBERS = (Field(name="x", side="request", form="dense"), Field(name="y", side="request", form="dense"))


def with_numbers(batch: Batch) -> Batch:
    return replace(batch, user={**batch.user, "x": torch.tensor([0.5]), "y": torch.tensor([-1.0])})


def with_oracle_parameters() -> Any:
    model = f3.build("dlrm", FeatureSpace(fields=(*NUMBERS, *f3.FIELDS)), dim=2, bottom_hidden=[], hidden=[2])
    f3.assign_split(model.bottom.first, torch.tensor([[1, -0.5], [0.2, 0.4]]))
    f3.assign(model.bottom.first.bias, [0.1, 0.7])
    f3.assign_mlp(model.top, 3, width=8)
    return model


def test_dlrm_equals_the_hand_computed_products_and_logits():
    model, batch = with_oracle_parameters(), with_numbers(f3.batch())
    state, dots = model.encode_request(batch), []
    model.dots.register_forward_hook(lambda module, inputs, output: dots.append(output))
    f3.close(model(batch)[0, :, 0], [0.0386, 0.246])
    f3.close(state.rows_QMK[0], [(1.1, 0.4), f3.U_ROW])
    f3.close(model.dots.of_request(state.rows_QMK)[0], [0.19])
    f3.close(dots[0][0], [(0.17, -0.05, -0.31, 0.07, -0.39), (0.42, 0.12, 0.65, 0.01, -0.01)])


def test_without_numbers_there_is_no_row_for_them():
    model = f3.build("dlrm", dim=2, hidden=[2])
    assert model.bottom is None
    assert model.top.first.candidate.in_features == 3
    dots: list[Tensor] = []
    model.dots.register_forward_hook(lambda module, inputs, output: dots.append(output))
    model(f3.batch())
    f3.close(dots[0][0], [(-0.05, 0.07, -0.39), (0.12, 0.01, -0.01)])


def bottom_vector(model: Any, batch: Batch) -> Tensor:
    """b [Q, C, k] from all numbers side by side."""
    def side_by_side(group: Mapping[str, Tensor], side: str) -> Tensor:
        numbers = [group[f.name] for f in model.inputs.numbers[side]]
        return torch.stack(numbers, -1) if numbers else torch.zeros(*batch.mask_QC.shape, 0, dtype=torch.float64)

    means_QD = masked_mean(side_by_side(batch.history, "event"), batch.history_mask_QL)
    request_QD = torch.cat([side_by_side(batch.user, "request"), means_QD], -1)
    x = torch.cat([request_QD[:, None].expand(-1, 5, -1), side_by_side(batch.item, "candidate")], -1)
    first = model.bottom.first
    weight = torch.cat([half.weight for half in (first.request, first.candidate) if half is not None], 1)
    return torch.relu(model.bottom.upper.linears[0](torch.relu(x @ weight.T + first.bias))).detach()


BOTTOM_SIDES = [((), "candidate"), (("price", "match.tags"), "request")]  # features left out, and where b then stands


@pytest.mark.parametrize(("excluded", "side"), BOTTOM_SIDES)
def test_numbers_of_every_side_become_the_first_row_of_the_side_that_has_them_all(
    excluded: tuple[str, ...], side: str
):
    model, batch = build("dlrm", {"dim": 3}, space=SPACE.without(excluded)), random_batch()
    rows: list[Tensor] = []
    model.dots.register_forward_pre_hook(lambda module, inputs: rows.extend(inputs))
    model(batch)
    expected = bottom_vector(model, batch)
    if side == "candidate":
        f3.close(rows[1][:, :, 0], expected, atol=1e-10)
    else:
        f3.close(rows[0][:, 0], expected[:, 0], atol=1e-10)
    assert [x.shape[-2] for x in rows] == {"candidate": [7, 6], "request": [8, 5]}[side]


@pytest.mark.parametrize(("excluded", "side"), BOTTOM_SIDES)
def test_all_products_below_the_diagonal_reach_the_top_once(excluded: tuple[str, ...], side: str):
    model, batch = build("dlrm", {"dim": 3}, space=SPACE.without(excluded)), random_batch()
    rows: list[Tensor] = []
    tops: dict[str, Tensor] = {}
    model.dots.register_forward_pre_hook(lambda module, inputs: rows.extend(inputs))
    model.top.first.request.register_forward_pre_hook(lambda module, x: tops.update(request=x[0][:, None]))
    model.top.first.candidate.register_forward_pre_hook(lambda module, x: tops.update(candidate=x[0]))
    model(batch)
    z = torch.cat([rows[0][:, None].expand(-1, 5, -1, -1), rows[1]], -2)
    num_request = rows[0].shape[1]
    for name, below in (("request", range(num_request)), ("candidate", range(num_request, z.shape[-2]))):
        dots = torch.stack([(z[..., i, :] * z[..., j, :]).sum(-1) for i in below for j in range(i)], -1)
        with_b = torch.cat([bottom_vector(model, batch), dots], -1) if name == side else dots
        f3.close(tops[name].expand_as(with_b), with_b.detach(), atol=1e-10)


def test_a_single_row_has_no_products_and_is_refused():
    with pytest.raises(ConfigError, match="dlrm: it multiplies pairs"):
        build("dlrm", {}, space=FeatureSpace(fields=f3.FIELDS[1:2]))


def test_dlrm_has_no_first_order_weights():
    assert build("dlrm", {}).first_order() == ()
