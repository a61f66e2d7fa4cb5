"""int_tower against numbers computed by hand, and what a maximum over heads promises."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Targets
from raycascade.errors import ConfigError, DataError
from raycascade.models.int_tower import IntTower, LightExcitation
from raycascade.schema import FeatureSpace
from tests.f3 import assign, close
from tests.model_cases import SPACE, accepted, build, random_batch

OWN_SPACE = accepted("int_tower", {})


def test_the_score_equals_the_hand_computed_sum_of_maxima():
    model = build("int_tower", {"heads": 2, "head_dim": 2})
    users = torch.tensor([[[1.0, 0.0], [0.5, -0.5]], [[0.2, 0.4], [-0.3, 0.1]]]).double()[None, None]
    heads = torch.tensor([[0.6, 0.2], [-0.4, 0.8]]).double()[None, None]
    close(model.interaction(users, heads), [[[1.24]]])
    close((users[0, 0].flatten(0, 1) @ heads[0, 0].T).amax(-1), [0.6, 0.2, 0.24, 0.2])


def test_light_excitation_equals_the_hand_computed_weights():
    module = LightExcitation(3).double()
    assign(module.weight, [[1, 0, 2], [0, 1, -1], [0.5, 0.5, 0]])
    x = torch.tensor([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]]).double()
    close(module.shares(x), [0.396288, 0.279259, 0.324453])
    close(module(x), [(0.139629, 0.279258), (0.383778, -0.511704), (-0.662226, 0.794672)])


def test_a_field_alone_is_doubled_without_a_weight():
    module, x = LightExcitation(1), torch.randn(2, 1, 4)
    close(module(x), 2 * x)
    assert not list(module.parameters())


def test_duplicated_or_permuted_heads_of_the_item_change_nothing():
    model, batch = build("int_tower", {}, num_tasks=2), random_batch()
    state = model.encode_request(batch)
    heads = model.encode_items(batch.item, batch.mask_QC.shape)["heads"]
    before = model.score_encoded(state, {"heads": heads}, batch)
    for other in (torch.cat([heads, heads[:, :, 1:2]], 2), heads[:, :, [2, 0, 3, 1]]):
        close(model.score_encoded(state, {"heads": other}, batch), before, atol=1e-9)


def test_with_one_head_and_one_layer_the_score_is_a_product_of_two_vectors():
    model, batch = build("int_tower", {"heads": 1, "hidden": [8]}), random_batch()
    users_QK = model.encode_request(batch)[:, 0, 0, 0]
    items_QCK = model.encode_items(batch.item, batch.mask_QC.shape)["heads"][:, :, 0]
    expected = model.log_scale.exp() * (items_QCK @ users_QK[:, :, None]) + model.bias
    close(model(batch), expected, atol=1e-12)


def test_the_towers_equal_their_definition_written_out():
    model, batch = build("int_tower", {}), random_batch()
    h = model.user_excitation(model.inputs.of_request(batch)).flatten(1)
    v = model.item_excitation(model.inputs.of_candidates(batch)).flatten(2)
    score = torch.zeros(8, 5).double()
    for layer in model.item_layers.linears:
        v = (v @ layer.weight.T + layer.bias).relu()
    heads = (v @ model.item_heads.weight.T).view(8, 5, 4, 16)
    for layer, project in zip(model.user_layers.linears, model.user_heads, strict=True):
        h = (h @ layer.weight.T + layer.bias).relu()
        for user_head in (h @ project.weight.T).view(8, 4, 16).unbind(1):
            score = score + (heads * user_head[:, None, None]).sum(-1).max(-1).values
    close(model(batch)[:, :, 0], model.log_scale.exp() * score + model.bias, atol=1e-10)


def test_tapping_inputs_reads_the_fields_themselves_and_builds_no_layer_that_nobody_reads():
    taps = {tap: build("int_tower", {"tap": tap, "hidden": [8, 6]}) for tap in ("output", "input")}
    fields = taps["input"].inputs.num_request * taps["input"].inputs.dim
    assert [layer.in_features for layer in taps["output"].user_heads] == [8, 6]
    assert [layer.in_features for layer in taps["input"].user_heads] == [fields, 8]
    assert len(taps["input"].user_layers.linears) == 1
    assert len(taps["input"].item_layers.linears) == 2


def test_the_scale_starts_at_one_over_the_number_of_maxima():
    model = build("int_tower", {"heads": 5, "hidden": [8, 8]}, generic=False, num_tasks=2)
    close(model.log_scale.exp(), [0.1, 0.1])


def test_items_encoded_once_give_the_logits_of_items_encoded_with_the_batch():
    model, batch = build("int_tower", {}, std=0.15), random_batch()
    state = model.encode_request(batch)
    flat = {name: x.flatten(0, 1) for name, x in batch.item.items()}
    heads = model.encode_items(flat, (40,))["heads"]
    close(model.score_encoded(state, {"heads": heads.view(8, 5, 4, 16)}, batch), model(batch), atol=1e-12)
    rounded = model.score_encoded(state, {"heads": heads.half().double().view(8, 5, 4, 16)}, batch)
    assert (rounded - model(batch)).abs().max() < 1e-2


# ---------------------------------------------------------------- contrast
def with_clicks(labels: dict[str, Tensor]) -> Any:
    batch = random_batch()
    batch = replace(batch, mask_QC=torch.ones_like(batch.mask_QC))
    zeros = torch.zeros(8, 5)
    return replace(batch, targets=Targets(relevance_QC=zeros, reached_QC=zeros.long(), mask_QC=batch.mask_QC, keep=(),
                                          k=1, labels=labels))


def test_the_contrast_is_a_softmax_of_cosines_among_the_positives_of_the_batch():
    clicks = torch.zeros(8, 5)
    clicks[0, 1] = clicks[3, 2] = 1
    batch, model = with_clicks({"click": clicks}), build("int_tower", {"contrast": 0.5})
    rows = batch.candidates_QC.clone()
    rows[0, 1], rows[3, 2] = 7, 8
    _, extra = model.train_outputs(replace(batch, candidates_QC=rows))
    state, heads = model.encode_request(batch), model.encode_items(batch.item, (8, 5))["heads"]
    users, items = state[[0, 3], 0, -1].flatten(1), torch.stack([heads[0, 1], heads[3, 2]]).flatten(1)
    cosines = nn.functional.cosine_similarity(users[:, None], items[None], dim=-1)
    close(extra["contrast"], 0.5 * nn.functional.cross_entropy(cosines / 0.07, torch.arange(2)), atol=1e-10)


def test_the_contrast_needs_labels():
    model = build("int_tower", {"contrast": 0.5})
    with pytest.raises(DataError, match="int_tower: contrast needs the label 'click'"):
        model.train_outputs(random_batch())


def test_without_positives_the_contrast_is_nothing():
    batch, model = with_clicks({"click": torch.zeros(8, 5)}), build("int_tower", {"contrast": 0.5})
    assert model.train_outputs(batch)[1]["contrast"].item() == 0.0


@pytest.mark.parametrize(("options", "space", "words"), [
    ({}, SPACE, "'user_id x type' depends on the user and the item together"),
    ({}, FeatureSpace(fields=OWN_SPACE.of("item")), "no feature of the user"),
    ({"contrast": 1.0, "contrast_label": "clik"}, OWN_SPACE, "'clik' is not a label.*'click'"),
    ({"contrast": 1.0}, OWN_SPACE.model_copy(update={"labels": ()}), "the log has none"),
])
def test_it_refuses_what_it_cannot_use(options: dict[str, Any], space: FeatureSpace, words: str):
    _, config = plugins.options("models", {"name": "int_tower", **options}, "model")
    with pytest.raises(ConfigError, match=words):
        IntTower(config, space)  # type: ignore[arg-type]
