"""lr and the first-order term of other models against numbers computed by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.errors import ConfigError
from raycascade.models._first_order import FirstOrder
from raycascade.schema import FeatureSpace, Field
from tests import f3
from tests.model_cases import SPACE, build, random_batch


def first_order(space: FeatureSpace, *, num_tasks: int = 1) -> FirstOrder:
    """With weights that are all different, padding aside."""
    module = FirstOrder(space, num_tasks).double()
    for parameter in module.parameters():
        f3.assign(parameter, torch.linspace(0.1, 0.9, parameter.numel()).view(parameter.shape))
    f3.assign(module.values.weight[0], torch.zeros(num_tasks))
    return module


def test_the_logits_are_the_intercept_and_the_weights_of_the_values():
    logits = f3.build("lr")(f3.batch())[0, :, 0]
    f3.close(logits, [0.45, 0.55])
    f3.close(torch.sigmoid(logits), [0.610639, 0.634136])


@pytest.mark.parametrize("side", ["request", "item"])
def test_a_number_counts_with_its_weight(side: Any):
    dense = Field(name="x", side=side, form="dense")
    model = f3.build("lr", FeatureSpace(fields=(*f3.FIELDS, dense)))
    f3.assign(model.linear.numbers["request" if side == "request" else "candidate"].weight, [[0.15]])
    batch = f3.batch()
    group = {"user": {**batch.user, "x": torch.tensor([2.0])}} if side == "request" else {
        "item": {**batch.item, "x": torch.tensor([[2.0, 0.0]])}}
    logit = model(replace(batch, **group))[0, 0, 0]
    f3.close(logit, 0.75)
    f3.close(torch.sigmoid(logit), 0.679179)


def test_the_weight_of_a_value_that_is_absent_changes_nothing():
    model, batch = f3.build("lr"), f3.batch()
    before = model(batch)
    for table in ("u", "i", "c"):
        start = model.linear.values.first_rows[table]
        f3.assign(model.linear.values.weight[start + 4:start + 8], torch.full((4, 1), 9.0))
    assert torch.equal(model(batch), before)


def test_the_gradient_of_a_weight_is_the_error_times_the_values_multiplicity():
    tags = Field(name="t", side="item", form="ids", table="i", num_rows=8, width=4, pool="sum")
    model = f3.build("lr", FeatureSpace(fields=(*f3.FIELDS, tags)))
    batch = f3.batch()
    batch = replace(batch, item={**batch.item, "t": torch.tensor([[[2, 2, 5, 0], [0, 0, 0, 0]]])})
    logits, label = model(batch)[..., 0], torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="sum").backward()
    gradient = model.linear.values.weight.grad.coalesce().to_dense()[:, 0]
    errors = (torch.sigmoid(logits) - label)[0].detach()
    start = model.linear.values.first_rows["i"]
    times = torch.tensor([(3, 0), (0, 1), (0, 0), (1, 0), (0, 0), (0, 0)]).double()  # of rows 2 to 7, a candidate
    f3.close(gradient[start + 2:start + 8], times @ errors)
    f3.close(gradient[model.linear.values.first_rows["u"] + 2], errors.sum())
    assert gradient[0] == 0


def test_an_exclusive_or_is_learnt_with_its_cross_and_not_without():
    u = Field(name="u", side="request", form="id", table="u", num_rows=12)
    i = Field(name="i", side="item", form="id", table="i", num_rows=12)
    cross = Field(name="u x i", side="pair", form="id", table="u x i", num_rows=102)
    users, items = torch.meshgrid(torch.arange(2, 12), torch.arange(2, 12), indexing="ij")
    label = ((users + items) % 2).double()
    batch = replace(f3.batch(), user={"u": torch.arange(2, 12)}, history={},
                    mask_QC=torch.ones(10, 10, dtype=torch.bool),
                    item={"i": items, "u x i": 2 + 10 * (users - 2) + items - 2}, time_ms_Q=torch.zeros(10),
                    history_mask_QL=torch.zeros(10, 0, dtype=torch.bool))

    def reached(*fields: Field) -> float:
        model = build("lr", {}, space=FeatureSpace(fields=fields), generic=False)
        for _ in range(20):
            model.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(batch)[..., 0], label).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 10.0 * parameter.grad
        scores = model(batch)[..., 0].detach()
        gaps = scores[label > 0][:, None] - scores[label == 0][None]
        return float((gaps > 1e-9).double().mean() + 0.5 * (gaps.abs() <= 1e-9).double().mean())

    assert reached(u, i) < 0.6
    assert reached(u, i, cross) > 0.95


# ---------------------------------------------------------------- the term itself
def naive(module: FirstOrder, batch: Any, q: int, c: int) -> Tensor:
    """w_0 + sum over fields, one value at a time, each vocabulary's weights read from its own place."""
    number_rows = {side: iter(linear.get_parameter("weight").T) for side, linear in module.numbers.items()}

    def of(field: Field, value: Tensor, side: str, numbers: Any) -> Tensor:
        if field.form in ("dense", "vector"):
            return sum((x * w for x, w in zip(value.view(-1), numbers[field.name], strict=True)), torch.zeros(2))
        rows = [int(row) for row in value.view(-1) if row > 0]
        weights = [module.values.weight[module.values.first_rows[field.table] + row] for row in rows]
        total = sum(weights, torch.zeros(2, dtype=torch.float64))
        return total if field.form == "id" or field.pool == "sum" or not rows else total / len(rows)

    total = module.bias.clone()
    for side, group in (("request", batch.user), ("candidate", batch.item), ("event", batch.history)):
        fields = module.sides[side]
        numbers = {f.name: [next(number_rows[side]) for _ in range(f.width)] for f in fields
                   if f.form in ("dense", "vector")}
        for field in fields:
            value = group[field.name][q]
            if side == "event":
                valid = [of(field, value[n], side, numbers) for n in range(len(value)) if batch.history_mask_QL[q, n]]
                total = total + (sum(valid) / len(valid) if valid else 0.0)
            else:
                total = total + of(field, value[c] if side == "candidate" else value, side, numbers)
    return total


def test_the_term_equals_the_sum_over_one_value_at_a_time():
    module, batch = first_order(SPACE, num_tasks=2), random_batch()
    whole = module(module.of_request(batch), batch)
    for q in range(4):
        for c in range(5):
            f3.close(whole[q, c], naive(module, batch, q, c).detach(), atol=1e-12)


def test_fields_that_share_a_vocabulary_share_its_weights_and_the_history_does_too():
    module = FirstOrder(SPACE, 1)
    assert module.values.first_rows.keys() == {f.table for f in SPACE.fields if f.table}
    assert len(module.values.weight) == 1 + sum(
        n - 1 for n in {f.table: f.num_rows for f in SPACE.fields if f.table}.values())
    model = f3.build("lr", f3.WITH_HISTORY)
    alone = model(f3.batch())
    f3.close(model(f3.batch((2, 3), (True, True))) - alone, [[[0.075], [0.075]]])  # mean of -0.1 and 0.25


@pytest.mark.parametrize(("events", "mask"), f3.EVENTS)
def test_masked_events_have_no_weight(events: tuple[int, ...], mask: tuple[bool, ...]):
    model = f3.build("lr", f3.WITH_HISTORY)
    f3.assign_first_order(model.linear, "i", (-0.1, 0.25, 0.3, 0.6, 0.9, 100.0))
    f3.close(model(f3.batch(events, mask)), [[[0.45 + 0.6], [0.55 + 0.6]]])


def test_no_weight_is_trained_for_padding():
    module, batch = first_order(SPACE), random_batch()
    module(module.of_request(batch), batch).sum().backward()
    gradient = module.values.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert 0 not in gradient.coalesce().indices()[0].tolist()


def test_weights_start_at_zero():
    module = FirstOrder(SPACE, 3)
    assert all((p == 0).all() for p in module.parameters())


def test_lr_refuses_a_stage_without_a_feature_of_the_candidates():
    cls, config = plugins.options("models", {"name": "lr"}, "model")
    with pytest.raises(ConfigError, match="lr: no feature of the candidates"):
        cls(config, FeatureSpace(fields=f3.FIELDS[:1]))
