"""wide_deep against numbers computed by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.schema import FeatureSpace, Field
from tests import f3
from tests.model_cases import SPACE, build, random_batch

CROSS = Field(name="u x c", side="pair", form="id", table="u x c", num_rows=66)
CROSSED = FeatureSpace(fields=(*f3.FIELDS, CROSS))


def crossed_batch() -> Batch:
    batch = f3.batch()
    return replace(batch, item={**batch.item, "u x c": torch.tensor([[2, 3]])})


def crossed_model() -> Any:
    model = f3.build("wide_deep", CROSSED, dim=2, hidden=[2], crosses=["u x c"])
    f3.assign_mlp(model.deep.mlp, 6)
    f3.assign_first_order(model.linear, "u x c", (0.4, -0.3))
    return model


def test_the_logits_are_those_of_lr_with_the_cross_and_of_the_mlp():
    f3.close(crossed_model()(crossed_batch())[0, :, 0], [0.571, 0.232])


def test_several_values_of_a_cross_are_added_up():
    space = FeatureSpace(fields=(*f3.FIELDS, CROSS.model_copy(update={"form": "ids", "width": 3, "pool": "sum"})))
    model = f3.build("wide_deep", space, dim=2, hidden=[2], crosses=["u x c"])
    f3.assign_first_order(model.linear, "u x c", (0.4, -0.3))
    one = model(replace(f3.batch(), item={**f3.batch().item, "u x c": torch.tensor([[[0, 0, 0], [3, 0, 0]]])}))
    more = model(replace(f3.batch(), item={**f3.batch().item, "u x c": torch.tensor([[[2, 3, 2], [3, 3, 0]]])}))
    f3.close((more - one)[0, :, 0], [0.4 - 0.3 + 0.4, -0.3])


def test_only_the_wide_part_sees_a_cross():
    model = crossed_model()
    assert "u x c" not in model.inputs.tables.sizes
    assert "u x c" in model.linear.values.sizes
    both = f3.build("wide_deep", CROSSED, dim=2)
    assert "u x c" in both.inputs.tables.sizes


def test_the_gradient_of_the_deep_part_never_touches_wide_weights_nor_the_other_way_round():
    model, batch = crossed_model(), crossed_batch()
    state = model.deep.of_request(model.inputs.request_matrix(batch, history=True))
    model.deep(state, model.inputs.candidate_matrix(batch), batch.mask_QC).sum().backward()
    assert all(p.grad is None for p in model.linear.parameters())
    model.zero_grad()
    model.linear(model.linear.of_request(batch), batch).sum().backward()
    assert all(p.grad is None for part in (model.deep, model.inputs) for p in part.parameters())


def test_without_crosses_it_is_lr_and_mlp():
    model, batch = build("wide_deep", {}), random_batch()
    mlp, lr = build("mlp", {}), build("lr", {})
    mlp.inputs.load_state_dict(model.inputs.state_dict())
    mlp.mlp.load_state_dict(model.deep.mlp.state_dict(), strict=False)
    f3.assign(mlp.mlp.upper.linears[-1].bias, [0.0])
    lr.linear.load_state_dict(model.linear.state_dict())
    f3.close(model(batch), mlp(batch) + lr(batch), atol=1e-12)


@pytest.mark.parametrize(("crosses", "words"), [
    (["user_id x typ"], ("'user_id x typ'", "did you mean 'user_id x type'", "kind cross")),
    (["match.tags"], ("'match.tags'", "no id field")),
    (["history"], ("'history'",)),
])
def test_a_cross_that_is_no_id_field_of_the_stage_is_refused_in_one_line(crosses: list[str], words: tuple[str, ...]):
    cls, config = plugins.options("models", {"name": "wide_deep", "crosses": crosses}, "model")
    with pytest.raises(ConfigError) as error:
        cls(config, SPACE)
    assert all(word in str(error.value) for word in ("wide_deep", *words))
    assert "\n" not in str(error.value)


def test_a_deep_part_without_hidden_layers_is_refused():
    cls = plugins.find("models", "wide_deep")
    with pytest.raises(ValidationError):
        cls.Config(hidden=())
