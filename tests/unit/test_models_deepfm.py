"""deepfm against numbers computed by hand, and its sum trick against the sum over all pairs."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from raycascade import plugins
from raycascade.errors import ConfigError
from raycascade.models.deepfm import FieldSums
from raycascade.schema import FeatureSpace, Field
from tests import f3
from tests.model_cases import build, random_batch


def test_the_pairs_equal_the_hand_computed_products():
    model, batch = f3.build("deepfm", dim=2, hidden=[]), f3.batch()
    pairs_QC = model.pairs(model.encode_request(batch), *model.inputs.of_candidates(batch))
    f3.close(pairs_QC, [[-0.37, 0.12]])
    f3.close(pairs_QC, [[-0.05 + 0.07 - 0.39, 0.12 + 0.01 - 0.01]])
    f3.close(model(batch)[0, :, 0], [0.45 - 0.37, 0.55 + 0.12])


def test_the_logits_are_first_order_pairs_and_mlp():
    model = f3.build("deepfm", dim=2, hidden=[2])
    f3.assign_mlp(model.deep.mlp, 6)
    f3.close(model(f3.batch())[0, :, 0], [-0.199, 0.652])


def test_the_pairs_equal_the_double_sum_over_all_fields_and_history_columns():
    model, batch = build("deepfm", {}), random_batch()
    fields = [*one_by_one(model.of_request, *(x[:, None].expand(-1, 5, -1) for x in model.inputs.of_request(batch))),
              *one_by_one(model.of_candidate, *model.inputs.of_candidates(batch))]
    assert len(fields) == 5 + 4 + 7  # request fields, history columns, item and pair fields
    double = sum(((a * b).sum(-1) for a, b in combinations(fields, 2)), torch.zeros(8, 5))
    f3.close(model.pairs(model.encode_request(batch), *model.inputs.of_candidates(batch)), double, atol=1e-10)


def one_by_one(sums: FieldSums, fields: Tensor, numbers: Tensor) -> list[Tensor]:
    """The vector of every field."""
    lines = [] if sums.lines is None else [
        x[..., None] * v + c for x, v, c in zip(numbers.unbind(-1), *sums.lines, strict=True)]
    return [*fields.split(sums.dim, -1), *lines]


def test_sums_and_squares_have_the_gradients_of_a_plain_sum():
    sums, generator = FieldSums(2, 3, std=0.5).double(), torch.Generator().manual_seed(0)
    fields = torch.randn(4, 5, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    numbers = torch.randn(4, 5, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    vectors = one_by_one(sums, fields, numbers)
    f3.close(sums(fields, numbers)[0], sum(vectors), atol=1e-12)
    f3.close(sums(fields, numbers)[1], sum(v.square().sum(-1) for v in vectors), atol=1e-12)
    assert torch.autograd.gradcheck(sums, (fields, numbers))


def test_a_single_field_has_no_pair():
    space = FeatureSpace(fields=f3.FIELDS[1:2])
    cls, config = plugins.options("models", {"name": "deepfm", "hidden": []}, "model")
    model, batch = cls(config, space).double(), f3.batch()
    f3.close(model(batch), torch.zeros(1, 2, 1), atol=1e-12)


def test_every_task_gets_the_pairs():
    model, batch = build("deepfm", {"hidden": []}, num_tasks=2), random_batch()
    first_QCT = model.linear(model.linear.of_request(batch), batch)
    pairs_QC = model.pairs(model.encode_request(batch), *model.inputs.of_candidates(batch))
    f3.close(model(batch) - first_QCT, torch.stack([pairs_QC, pairs_QC], -1), atol=1e-10)


def test_a_silenced_model_starts_without_pairs_learns_their_scale_and_loads_into_another():
    batch = random_batch()
    model, other = build("deepfm", {}, generic=False), build("deepfm", {}, generic=False, seed=1)
    names = list(model.state_dict())
    model.silence()
    other.silence()
    f3.close(model(batch), torch.zeros(8, 5, 1), atol=1e-12)
    assert sorted(model.state_dict()) == sorted(names)
    assert any(p is model.pair_scale for p in model.param_groups()["dense"])
    model(batch).square().sum().backward()
    weights: Tensor = torch.rand(8, 5, 1, dtype=torch.float64)
    (model(batch) * weights).sum().backward()
    assert model.pair_scale.grad.abs() > 1e-6
    f3.assign(model.pair_scale, [0.7])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))


def test_numbers_as_they_are_are_refused():
    with pytest.raises(ConfigError, match=r"dense.*'field'.*got 'raw'"):
        plugins.options("models", {"name": "deepfm", "dense": "raw"}, "model")


def test_a_number_is_a_field_of_the_pairs():
    space = FeatureSpace(fields=(*f3.FIELDS, Field(name="x", side="item", form="dense")))
    model = f3.build("deepfm", space, dim=2, hidden=[])
    f3.assign(model.of_candidate.lines, [[[0.1, 0.3]], [[0.2, -0.1]]])
    batch = f3.batch()
    batch.item["x"] = torch.tensor([[2.0, 0.0]])  # type: ignore[index]
    x = torch.tensor([[0.4, 0.5], [0.2, -0.1]], dtype=torch.float64)
    sums = torch.tensor(f3.X_0, dtype=torch.float64).view(2, 3, 2).sum(1)
    pairs_QC = model.pairs(model.encode_request(batch), *model.inputs.of_candidates(batch))
    f3.close(pairs_QC[0], torch.tensor([-0.37, 0.12]).double() + (sums * x).sum(-1))
