"""mlp, din and two_tower against numbers computed by hand, and the blocks they are made of."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycascade import plugins
from raycascade.batch import Batch
from raycascade.errors import ConfigError
from raycascade.models import _layers, din as din_module
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.schema import FeatureSpace, Field
from tests.model_cases import SPACE, build, random_batch

PAIRLESS = SPACE.without(("user_id x type", "match.tags"))


def t(shape: tuple[int, ...], s: int) -> Tensor:
    """The fixture's numbers: flat element n is (((5n + 3s) mod 11) - 5) / 10."""
    n = torch.arange(math.prod(shape))
    return ((((5 * n + 3 * s) % 11) - 5).double() / 10).view(shape)


def close(actual: Tensor, expected: Any, *, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def assign(parameter: Any, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


# ---------------------------------------------------------------- one request, two candidates, three id fields
FIELD_U = Field(name="u", side="request", form="id", table="u", num_rows=8)
FIELD_I = Field(name="i", side="item", form="id", table="i", num_rows=8)
FIELD_C = Field(name="c", side="item", form="id", table="c", num_rows=8)
THREE_FIELDS = FeatureSpace(fields=(FIELD_U, FIELD_I, FIELD_C))
WITH_HISTORY = FeatureSpace(fields=(FIELD_U, FIELD_I, FIELD_C), history_len=4, history_fields=("i",))
I_ROWS = [(0.3, -0.4), (0.2, 0.5), (0.1, 0.4), (-0.3, 0.2), (0.5, -0.1), (9.0, 9.0)]  # rows 2 to 7
X_0 = [(0.1, 0.2, 0.3, -0.4, -0.5, 0.6), (0.1, 0.2, 0.2, 0.5, 0.7, -0.3)]


def three_field_model(name: str, space: FeatureSpace, **options: Any) -> Any:
    cls, config = plugins.options("models", {"name": name, "dim": 2, **options}, "model")
    model = cls(config, space).double().eval()
    tables = model.inputs.tables
    assign(tables.of("u")[1], torch.tensor((0.1, 0.2)))
    assign(tables.of("i")[1:], torch.tensor(I_ROWS, dtype=torch.float64))
    assign(tables.of("c")[1:3], torch.tensor([(-0.5, 0.6), (0.7, -0.3)], dtype=torch.float64))
    return model


def three_field_batch(events: tuple[int, ...] = (), mask: tuple[bool, ...] = ()) -> Batch:
    events_QL = torch.tensor([events], dtype=torch.long).view(1, -1)
    rows_QC = torch.tensor([[2, 3]])
    return Batch(user={"u": torch.tensor([2])}, item={"i": rows_QC, "c": rows_QC}, history={"i": events_QL},
                 history_mask_QL=torch.tensor([mask], dtype=torch.bool).view(1, -1), history_rows_QL=events_QL,
                 candidates_QC=rows_QC, mask_QC=torch.ones(1, 2, dtype=torch.bool), time_ms_Q=torch.zeros(1))


HISTORIES = [((4, 5, 6), (True,) * 3), ((7, 4, 5, 6), (False, True, True, True))]  # then with a masked (9, 9) in front


def test_the_fixture_is_the_one_of_the_oracles():
    close(t((2, 3), 1), [[-0.2, 0.3, -0.3], [0.2, -0.4, 0.1]])


def test_mlp_equals_the_hand_computed_logits():
    model = three_field_model("mlp", THREE_FIELDS, hidden=[2])
    assign(model.mlp.first.request.weight, t((2, 6), 6)[:, :2])
    assign(model.mlp.first.candidate.weight, t((2, 6), 6)[:, 2:])
    assign(model.mlp.first.bias, t((2,), 7))
    assign(model.mlp.upper.linears[0].weight, t((1, 2), 8))
    close(model(three_field_batch())[0, :, 0], [-0.279, -0.018])


def identity_towers(**options: Any) -> Any:
    """u = e_u, v = e_i + e_c, scale 10, bias -0.5."""
    model = three_field_model("two_tower", THREE_FIELDS, hidden=[], vector_dim=2, **options)
    assign(model.user_tower.first.weight, torch.eye(2))
    assign(model.item_tower.first.weight, torch.eye(2).repeat(1, 2))
    assign(model.log_scale, torch.tensor(10.0, dtype=torch.float64).log())
    assign(model.bias, torch.tensor(-0.5))
    return model


def test_two_tower_equals_the_hand_computed_cosines_and_logits():
    model, batch = identity_towers(), three_field_batch()
    users_QD, items_ND = model.embed_users(batch), model.embed_items({n: x[0] for n, x in batch.item.items()})
    close(users_QD @ items_ND.T, [[0.316228, 0.630593]])
    close(model(batch)[0, :, 0], [2.662278, 5.805926])


def test_two_tower_with_dot_products_does_not_normalise():
    close(identity_towers(similarity="dot")(three_field_batch())[0, :, 0],
          [10 * (0.1 * -0.2 + 0.2 * 0.2) - 0.5, 10 * (0.1 * 0.9 + 0.2 * 0.2) - 0.5])


def din_with_hand_set_attention(normalise: str) -> Any:
    model = three_field_model("din", WITH_HISTORY, attention_hidden=[2], attention_activation="relu",
                              normalise=normalise)
    assign(model.attention.first.weight, t((2, 8), 7))
    assign(model.attention.first.bias, t((2,), 8))
    assign(model.attention.upper.linears[0].weight, t((1, 2), 9))
    return model


def pooled_history(model: Any, batch: Batch) -> Tensor:
    """What enters the MLP as the interest of each candidate [Q, C, D]."""
    seen: list[Tensor] = []
    model.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][..., :2]))
    model(batch)
    return seen[0]


@pytest.mark.parametrize(("events", "mask"), HISTORIES)
def test_din_equals_the_hand_computed_weights_and_interest(events: tuple[int, ...], mask: tuple[bool, ...]):
    model, batch = din_with_hand_set_attention("none"), three_field_batch(events, mask)
    close(model.explain(batch)["attention"][0, :, -3:], [(0.118, 0.112, 0.131), (0.128, 0.091, 0.0775)])
    close(pooled_history(model, batch)[0], [(0.0437, 0.0565), (0.02425, 0.06165)])


@pytest.mark.parametrize(("events", "mask"), HISTORIES)
def test_din_with_softmax_equals_the_hand_computed_interest(events: tuple[int, ...], mask: tuple[bool, ...]):
    model, batch = din_with_hand_set_attention("softmax"), three_field_batch(events, mask)
    close(pooled_history(model, batch)[0], [(0.102536, 0.165440), (0.098226, 0.170757)])


@pytest.mark.parametrize("normalise", ["none", "softmax"])
def test_din_pools_an_empty_history_to_zero(normalise: str):
    pooled = pooled_history(din_with_hand_set_attention(normalise), three_field_batch((7,), (False,)))
    assert (pooled == 0).all()


# ---------------------------------------------------------------- the split forms equal the naive ones
def repeated(x_QD: Tensor, num: int) -> Tensor:
    return x_QD[:, None].expand(-1, num, -1)


def test_mlp_equals_one_layer_over_the_repeated_and_concatenated_inputs():
    model, batch = build("mlp", {"activation": "tanh"}), random_batch()
    first = model.mlp.first
    x_QCD = torch.cat([repeated(model.inputs.request_matrix(batch, history=True), 5),
                       model.inputs.candidate_matrix(batch)], -1)
    whole = nn.functional.linear(x_QCD, torch.cat([first.request.weight, first.candidate.weight], 1), first.bias)
    close(model(batch), model.mlp.upper(whole), atol=1e-10)


@pytest.mark.parametrize("normalise", ["none", "softmax"])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_din_equals_its_equation_over_every_pair(normalise: str, block: int, monkeypatch: pytest.MonkeyPatch):
    """a_j = MLP([v; e_j; v - e_j; v * e_j; g_j]), whatever the number of requests in a block."""
    monkeypatch.setattr(din_module, "CACHE_FLOATS", block)
    model, batch = build("din", {"normalise": normalise}), random_batch()
    inputs, attention = model.inputs, model.attention
    candidates = inputs.candidate_matrix(batch)
    e = inputs.history_matrix(batch)[:, None].expand(-1, 5, -1, -1)
    g = inputs.event_matrix(batch)[:, None].expand(-1, 5, -1, -1)
    v = inputs.as_event(candidates)[:, :, None].expand_as(e)
    weights = attention.upper(attention.first(torch.cat([v, e, v - e, v * e, g], -1))).squeeze(-1)
    valid = batch.history_mask_QL[:, None].expand_as(weights)
    if normalise == "softmax":
        weights = torch.where(valid, weights.exp(), 0.0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    weights = torch.where(valid, weights, 0.0)
    pooled = (weights[..., None] * e).sum(2)
    x = torch.cat([repeated(inputs.request_matrix(batch, history=False), 5), pooled, candidates], -1)
    first = model.mlp.first
    whole = nn.functional.linear(x, torch.cat([first.request.weight, first.candidate.weight], 1), first.bias)
    close(model(batch), model.mlp.upper(whole, batch.mask_QC), atol=1e-10)
    close(model.explain(batch)["attention"], weights, atol=1e-10)


# ---------------------------------------------------------------- two_tower as a retriever
@pytest.mark.parametrize("options", [
    {}, {"similarity": "dot"}, {"item_bias": True}, {"item_bias": True, "index_task": 1, "user_history": "attention"}])
def test_products_of_the_vectors_are_the_scores_of_all_pairs(options: dict[str, Any]):
    model, batch = build("two_tower", options, num_tasks=2), random_batch()
    task = options.get("index_task", 0)
    items = {name: x.flatten(0, 1) for name, x in batch.item.items()}
    products_QN = model.embed_users(batch) @ model.embed_items(items).T
    scores_QN = model.scale[task] * products_QN + model.bias[task]
    own_QC = torch.stack([scores_QN[q, q * 5 : q * 5 + 5] for q in range(8)])
    close(own_QC, model(batch)[..., task], atol=1e-10)
    close(model.score_items(model.encode_request(batch), items), scores_QN, atol=1e-10)


def test_an_item_bias_moves_its_item_alone_and_starts_from_zero():
    model, batch = build("two_tower", {"item_bias": True}, generic=False), random_batch()
    assert (model.item_bias.weight == 0).all()
    item = {**batch.item, "item_id": torch.arange(2, 42).remainder(38).add(2).view(8, 5)}
    before = model(replace(batch, item=item))
    assign(model.item_bias.weight[9], torch.tensor(0.75))
    moved = model(replace(batch, item=item)) - before
    close(moved[item["item_id"] == 9], torch.full((1, 1), 0.75), atol=1e-10)
    close(moved[item["item_id"] != 9], torch.zeros(39, 1), atol=1e-10)


@pytest.mark.parametrize(("options", "scale"), [
    ({}, 10.0), ({"similarity": "dot"}, 1.0), ({"temperature": 0.05}, 20.0), ({"temperature": 1e-4}, 100.0)])
def test_the_scale_is_the_inverse_temperature_and_at_most_100(options: dict[str, Any], scale: float):
    close(build("two_tower", options, generic=False).scale.detach(), [scale], atol=1e-4)


def test_attention_over_the_history_is_a_softmax_of_products_with_the_query():
    model, batch = build("two_tower", {"user_history": "attention"}), random_batch()
    events = torch.cat([model.inputs.history_matrix(batch), model.inputs.event_matrix(batch)], -1)
    raw = torch.where(batch.history_mask_QL, (events @ model.history_query).exp(), 0.0)
    close(model.explain(batch)["history_attention"], raw / raw.sum(1, keepdim=True).clamp(min=1e-300), atol=1e-10)


# ---------------------------------------------------------------- what cannot be built
@pytest.mark.parametrize(("name", "options", "space", "words"), [
    ("two_tower", {}, SPACE, ("'user_id x type'", "exclude")),
    ("two_tower", {"item_bias": True}, PAIRLESS.without(("item_id",)), ("item_bias", "item_id")),
    ("two_tower", {"user_history": "attention"}, PAIRLESS.without(("history",)), ("needs a history",)),
    ("two_tower", {"index_task": 1}, PAIRLESS, ("index_task is 1",)),
    ("two_tower", {}, FeatureSpace(fields=(FIELD_I,)), ("no feature of the user",)),
    ("din", {}, SPACE.without(("history",)), ("no history",)),
    ("din", {}, SPACE.without(("item_id", "tags")), ("no history",)),
    ("mlp", {}, FeatureSpace(fields=(FIELD_U,)), ("no feature of the candidates",)),
])
def test_a_model_refuses_what_it_cannot_use_in_one_line(
    name: str, options: dict[str, Any], space: FeatureSpace, words: tuple[str, ...]
):
    cls, config = plugins.options("models", {"name": name, **options}, "model")
    with pytest.raises(ConfigError) as error:
        cls(config, space)
    assert all(word in str(error.value) for word in (name, *words))
    assert "\n" not in str(error.value)


def test_mlp_needs_no_feature_of_the_request():
    cls, config = plugins.options("models", {"name": "mlp"}, "model")
    batch = replace(three_field_batch(), user={}, history={})
    assert cls(config, FeatureSpace(fields=(FIELD_I, FIELD_C)))(batch).shape == (1, 2, 1)


# ---------------------------------------------------------------- inputs
def inputs_of(**options: Any) -> FieldInputs:
    return FieldInputs(InputOptions(dim=3, **options), SPACE, model="mlp").double()


def test_fields_of_one_vocabulary_share_a_table_and_no_others_do():
    inputs = inputs_of()
    assert inputs.tables is not None
    assert inputs.tables.sizes == {f.table: f.num_rows for f in SPACE.fields if f.table}
    assert inputs.tables.num_embeddings == 1 + sum(size - 1 for size in inputs.tables.sizes.values())
    tags = random_batch().user["interests"]
    as_item = inputs.matrix({"tags": tags}, [SPACE["tags"]], tags.shape[:1])
    assert torch.equal(as_item, inputs.matrix({"interests": tags}, [SPACE["interests"]], tags.shape[:1]))


def test_ids_are_the_mean_over_the_values_there_are():
    inputs = inputs_of()
    rows = torch.tensor([[3, 5, 0], [0, 0, 0], [7, 7, 4]])
    assert inputs.tables is not None
    weight = inputs.tables.of("tag")  # from row 1 on
    vectors = inputs.matrix({"tags": rows}, [SPACE["tags"]], (3,))
    expected = [(weight[2] + weight[4]) / 2, weight[0] * 0, (2 * weight[6] + weight[3]) / 3]
    close(vectors, torch.stack(expected), atol=1e-12)


@pytest.mark.parametrize("dense", ["raw", "field"])
@pytest.mark.parametrize("mixed", [False, True])
def test_vectors_come_in_the_order_of_the_fields_whatever_their_forms(dense: str, mixed: bool):
    """Fields of one form are looked up together, in turns they stand apart."""
    inputs, batch = inputs_of(dense=dense), random_batch()
    fields = inputs.candidate_fields[::2] + inputs.candidate_fields[1::2] if mixed else inputs.candidate_fields
    assert len({f.form for f in fields}) > 2
    one_by_one = [inputs.matrix(batch.item, [field], (8, 5)) for field in fields]
    assert [x.shape[-1] for x in one_by_one] == [1 if f.form == "dense" and dense == "raw" else 3 for f in fields]
    assert torch.equal(inputs.matrix(batch.item, fields, (8, 5)), torch.cat(one_by_one, -1))


def test_a_dense_field_is_a_line_through_its_offset_or_the_number_itself():
    x = torch.tensor([[0.0], [2.0]])
    close(inputs_of().matrix({"price": x[:, 0]}, [SPACE["price"]], (2,)), x, atol=0)
    inputs = inputs_of(dense="field")
    vectors = inputs.matrix({"price": x[:, 0]}, [SPACE["price"]], (2,))
    assert inputs.dense_vectors is not None
    slope, offset = inputs.dense_vectors[:, [f.name for f in SPACE.fields if f.form == "dense"].index("price")]
    close(vectors, torch.stack([offset, offset + 2 * slope]), atol=1e-12)


def test_tables_start_small_with_a_padding_row_that_is_zero_and_never_trained():
    space = FeatureSpace(fields=(Field(name="i", side="item", form="id", table="i", num_rows=20_000),))
    table = FieldInputs(InputOptions.model_validate({}), space, model="mlp").tables
    assert isinstance(table, nn.Embedding)
    assert abs(table.weight[1:].std().item() - 0.05) < 0.001
    assert (table.weight[0] == 0).all()
    table(torch.tensor([0, 5])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.coalesce().indices().tolist() == [[5]]


def test_the_mean_history_covers_valid_events_of_item_and_event_fields():
    inputs, batch = inputs_of(), random_batch()
    events = torch.cat([inputs.history_matrix(batch), inputs.event_matrix(batch)], -1)
    assert inputs.history_width + inputs.event_width == events.shape[-1] == 3 + 3 + 3 + 1
    expected = [e[m].mean(0) if m.any() else e[0] * 0 for e, m in zip(events, batch.history_mask_QL, strict=True)]
    close(inputs.mean_history(batch), torch.stack(expected), atol=1e-12)


# ---------------------------------------------------------------- layers
def test_dice_equals_the_hand_computed_values_and_moves_population_statistics():
    dice = _layers.Dice(1).double()
    assign(dice.alpha, torch.tensor(0.25))
    s = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    close(dice(s).flatten(), [0.405430, 1.085035, 2.122447, 3.378279])
    close(dice.moments.mean, [0.025])
    close(dice.moments.var, [1.0025])


def test_dice_evaluates_with_the_running_statistics():
    dice = _layers.Dice(1).double().eval()
    close(dice(torch.tensor([[2.0]], dtype=torch.float64)), [[2 / (1 + math.exp(-2))]])  # mean 0, variance 1, alpha 0


@pytest.mark.parametrize("layer", [_layers.Dice, _layers.MaskedBatchNorm])
def test_statistics_are_over_valid_entries_and_need_two_of_them(layer: Any):
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]).bool()
    whole, alone = layer(2).double(), layer(2).double()
    close(whole(x, mask)[mask], alone(x[mask]), atol=1e-12)
    close(whole.moments.var, alone.moments.var, atol=1e-12)
    before = whole.moments.mean.clone()
    single = torch.zeros_like(mask)
    single[0, 0] = True
    close(whole(x, single), whole.eval()(x), atol=1e-12)
    assert torch.equal(whole.moments.mean, before)


def test_batch_norm_normalises_as_torch_does():
    ours, theirs = _layers.MaskedBatchNorm(3), nn.BatchNorm1d(3)
    x = torch.randn(50, 3) * 4 + 1
    close(ours(x), theirs(x), atol=1e-5)
    assert theirs.running_mean is not None
    close(ours.moments.mean, theirs.running_mean, atol=1e-6)


def test_prelu_has_one_slope_a_unit():
    layer, x = _layers.PReLU(3), torch.randn(4, 5, 3)
    assign(layer.alpha, torch.tensor((0.0, 0.25, 2.0)))
    close(layer(x), torch.where(x > 0, x, x * layer.alpha), atol=1e-6)


def test_masked_softmax_is_zero_where_nothing_is_valid_and_sums_to_one_elsewhere():
    logits = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 3.0]])
    weights = _layers.masked_softmax(logits, torch.tensor([[True, True, False], [False, False, False]]))
    close(weights, [[1 / (1 + math.e), math.e / (1 + math.e), 0], [0, 0, 0]])


@pytest.mark.parametrize(("request_width", "candidate_width"), [(3, 4), (0, 4), (3, 0)])
def test_a_split_linear_map_equals_the_one_over_concatenated_inputs(request_width: int, candidate_width: int):
    layer = _layers.SplitLinear(request_width, candidate_width, 2)
    assign(layer.bias, torch.randn(2))
    u, x = torch.randn(6, request_width), torch.randn(6, 5, candidate_width)
    halves = [half.weight for half in (layer.request, layer.candidate) if half is not None]
    whole = nn.functional.linear(torch.cat([repeated(u, 5), x], -1), torch.cat(halves, 1), layer.bias)
    close(layer(layer.of_request(u), x), whole.detach(), atol=1e-6)


def test_linear_maps_start_uniform_within_the_root_of_the_width_of_their_whole_input():
    layer, split = _layers.linear(400, 200), _layers.SplitLinear(300, 100, 200)
    assert split.candidate is not None
    for weight in (layer.weight, split.candidate.weight):
        close(weight.abs().max(), 1 / math.sqrt(400), atol=1e-4)
        close(weight.std(), 1 / math.sqrt(3 * 400), atol=1e-3)
    assert (_layers.linear(4, 2).bias == 0).all()


def test_no_linear_map_in_front_of_a_batch_norm_has_a_bias():
    mlp = _layers.MLP(4, (3, 3), 1, norm="batch")
    assert mlp.first.bias is None
    assert [layer.bias is not None for layer in mlp.upper.linears] == [False, True]


def test_dropout_is_off_in_evaluation_and_absent_after_the_last_map():
    mlp, x = _layers.MLP(4, (64,), 1, dropout=0.5), torch.ones(1, 4)
    assert not torch.equal(mlp(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))
    bare = _layers.MLP(4, (), 1, dropout=0.5)
    assert torch.equal(bare(x), bare(x))
