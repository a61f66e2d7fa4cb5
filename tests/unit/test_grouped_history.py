"""Histories pooled by value and recency against a loop over events, in the models that use them; short histories."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycascade import plugins
from raycascade.errors import ConfigError
from raycascade.models._history import GroupedHistory
from raycascade.models._inputs import FieldInputs, InputOptions
from raycascade.schema import FIRST_ROW, FeatureSpace, Field
from tests.model_cases import (
    HISTORY_LEN,
    SPACE,
    build,
    case_id,
    one_candidate_a_request,
    padded_candidates,
    padded_history,
    random_batch,
    with_candidates,
    with_other_values,
)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("two_tower", {"user_history": "recency", "history_by": "action", "item_hidden": []}),
    ("two_tower", {"user_history": "recency", "similarity": "dot", "item_hidden": [5, 4], "item_bias": True}),
    ("mlp", {"interest": True, "history_by": "action"}),
    ("mlp", {"interest": True, "dense": "field", "norm": "batch"}),
]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=case_id)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def pools_of(field: str | None) -> GroupedHistory:
    inputs = FieldInputs(InputOptions(dim=3), SPACE, model="mlp")
    pools = GroupedHistory(inputs, SPACE, field)
    with torch.no_grad():
        pools.recency.normal_(generator=torch.Generator().manual_seed(2))
    inputs.double()
    return pools.double()


@pytest.mark.parametrize("field", [None, "action"])
def test_pools_equal_a_loop_over_the_events(field: str | None):
    pools, batch = pools_of(field), random_batch()
    events_QLD = pools.inputs[0].history_matrix(batch)
    values = [None] if field is None else list(range(FIRST_ROW, SPACE["action"].num_rows))
    assert pools.groups == len(values) == (1 if field is None else 3)
    assert pools.width == len(values) * 6
    expected = torch.zeros(8, len(values), 6, dtype=torch.float64)
    for q in range(8):
        real = [j for j in range(HISTORY_LEN) if batch.history_mask_QL[q, j]]
        for g, value in enumerate(values):
            total, weight = torch.zeros(6, dtype=torch.float64), 1.0
            for age, j in enumerate(reversed(real)):
                if value is None or batch.history["action"][q, j] == value:
                    factor = float(pools.recency[g, age].detach().exp())
                    total, weight = total + factor * events_QLD[q, j], weight + factor
            expected[q, g] = total / weight
    close(pools(batch), expected)
    assert (pools(batch)[0] == 0).all()  # request 0 has no history
    assert pools(batch)[1].abs().max() > 0.01


def test_new_pools_are_sums_over_one_more_than_the_number_of_events():
    inputs = FieldInputs(InputOptions(dim=3), SPACE, model="mlp").double()
    batch = random_batch()
    events_QLD, mask_QL1 = inputs.history_matrix(batch), batch.history_mask_QL[:, :, None]
    expected = torch.where(mask_QL1, events_QLD, 0).sum(1) / (1 + mask_QL1.sum(1))
    close(GroupedHistory(inputs, SPACE, None).double()(batch)[:, 0], expected)


def test_events_of_an_unknown_value_belong_to_no_group():
    pools, batch = pools_of("action"), random_batch()
    unknown = replace(batch, history={**batch.history, "action": torch.ones_like(batch.history["action"])})
    assert not pools(unknown).any()


# ---------------------------------------------------------------- the models' promises
@every_variant
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_masked_events_and_candidates_change_nothing(name: str, options: dict[str, Any], front: bool, training: bool):
    batch = random_batch()
    model, twin, third = (build(name, options).train(training) for _ in range(3))
    logits = model(batch)[batch.mask_QC]
    close(twin(padded_history(batch, front=front))[batch.mask_QC], logits)
    close(third(padded_candidates(batch))[:, :5][batch.mask_QC], logits)


@every_variant
def test_permuting_candidates_permutes_logits_and_each_is_scored_alone(name: str, options: dict[str, Any]):
    batch, model, order = random_batch(), build(name, options, num_tasks=2), torch.tensor([3, 0, 4, 1, 2])
    close(model(with_candidates(batch, lambda x: x[:, order])), model(batch)[:, order])
    close(model(one_candidate_a_request(batch)).view(8, 5, 2), model(batch))


@every_variant
def test_the_order_of_the_history_matters_through_recency_alone(name: str, options: dict[str, Any]):
    batch, model = replace(random_batch(), history_mask_QL=torch.ones(8, HISTORY_LEN, dtype=torch.bool)), None
    flipped = replace(batch, history={n: x.flip(1) for n, x in batch.history.items()})
    model = build(name, options)
    assert (model(flipped) - model(batch)).abs().max() > 1e-6
    with torch.no_grad():
        model.pools.recency.fill_(0.4)
    close(model(flipped), model(batch))


@every_variant
def test_every_parameter_learns_but_the_tables_of_what_only_events_have(name: str, options: dict[str, Any]):
    """Events are grouped by such a field, not embedded."""
    alive: set[str] = set()
    for seed in range(3):
        model = build(name, options, num_tasks=2, seed=seed).eval()
        logits = model(random_batch(seed=seed))
        (logits * torch.randn(logits.shape, dtype=torch.float64)).sum().backward()
        alive |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.to_dense().abs().max() > 0}
    idle = {n for n, _ in model.named_parameters()} - alive
    assert idle <= {"inputs.dense_vectors"}
    tables = model.inputs.tables
    gradient_N = tables.weight.grad.to_dense().abs().sum(1)
    for field, first in tables.first_rows.items():
        used = gradient_N[first + 1:first + tables.sizes[field]].any()
        assert bool(used) == (field != "action"), field
    assert "pools.recency" in alive


@every_variant
def test_no_feature_that_the_pools_can_read_is_ignored(name: str, options: dict[str, Any]):
    batch, model = random_batch(), build(name, options)
    logits = model(batch)
    pairs = SPACE.of("pair") if name == "mlp" else ()
    for field in (*SPACE.of("request", "item"), *pairs):
        assert (model(with_other_values(batch, field, seed=5)) - logits).abs().max() > 1e-6, field.name
    for field in ("item_id", "tags", *(["action"] if "history_by" in options else [])):
        other = replace(batch, history={**batch.history, field: random_batch(seed=3).history[field]})
        assert (model(other) - logits).abs().max() > 1e-6, field


@every_variant
def test_candidates_are_scored_from_the_state_alone_and_histories_may_have_no_length(
    name: str, options: dict[str, Any]
):
    batch, model = random_batch(), build(name, options)
    empty = {"history_mask_QL": torch.zeros(8, 0, dtype=torch.bool), "history_rows_QL": torch.zeros(8, 0).long()}
    close(model.score_candidates(model.encode_request(batch), replace(batch, user={}, history={}, **empty)),
          model(batch))
    none = replace(batch, history={n: x[:, :0] for n, x in batch.history.items()}, **empty)
    masked = replace(batch, history_mask_QL=torch.zeros(8, HISTORY_LEN, dtype=torch.bool))
    close(model(none), model(masked))


def test_the_hidden_layers_of_the_item_tower_are_its_own():
    widths = {}
    for hidden in (None, [], [5, 4]):
        model = build("two_tower", {"hidden": [8], "item_hidden": hidden, "vector_dim": 6})
        layers = [m.out_features for m in model.item_tower.modules() if isinstance(m, torch.nn.Linear)]
        widths[str(hidden)] = layers
        assert [m.out_features for m in model.user_tower.modules() if isinstance(m, torch.nn.Linear)] == [8, 6]
    assert widths == {"None": [8, 6], "[]": [6], "[5, 4]": [5, 4, 6]}


# ---------------------------------------------------------------- what cannot be grouped
MANY = FeatureSpace(fields=(*SPACE.fields, Field(name="city", side="event", form="id", table="city", num_rows=11)),
                    history_len=HISTORY_LEN, history_fields=SPACE.history_fields)


@pytest.mark.parametrize(("name", "options"), [
    ("two_tower", {"user_history": "recency"}), ("mlp", {"interest": True})], ids=case_id)
@pytest.mark.parametrize(("by", "space", "words"), [
    ("actoin", SPACE, "'actoin' is not an id feature of the events; did you mean 'action'"),
    ("gap", SPACE, "'gap' is not an id feature"),
    ("city", MANY, "'city' has 9 values; a field of 1 to 8"),
    (None, SPACE.without(("history",)), "needs a history of items"),
])
def test_a_history_that_cannot_be_grouped_is_refused(
    name: str, options: dict[str, Any], by: str | None, space: FeatureSpace, words: str
):
    cls, config = plugins.options("models", {"name": name, **options, "history_by": by}, "model")
    with pytest.raises(ConfigError, match=words) as caught:
        cls(config, space.without(("pair",)))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- short histories
@pytest.mark.parametrize("options", [{}, {"normalise": "softmax"}, {"products": True, "attention_activation": "dice"}],
                         ids=case_id)
@pytest.mark.parametrize("training", [False, True])
def test_reading_the_newest_events_equals_din_over_histories_of_those(options: dict[str, Any], training: bool):
    batch = random_batch()
    short, whole = build("din", {**options, "max_events": 2}).train(training), build("din", options).train(training)
    close(short(batch)[batch.mask_QC], whole(batch.newest_events(2))[batch.mask_QC])
    assert (short(batch) - whole(batch))[batch.mask_QC].abs().max() > 1e-6
    close(build("din", {**options, "max_events": 6})(batch), build("din", options)(batch))


def test_an_event_too_old_to_be_read_does_not_matter_and_the_others_do():
    batch, model = random_batch(), build("din", {"max_events": 2})
    length_Q1 = batch.history_mask_QL.sum(1, keepdim=True)
    old_QL = torch.arange(HISTORY_LEN) < length_Q1 - 2
    other = random_batch(seed=4).history
    for changed_QL, matters in ((old_QL, False), (batch.history_mask_QL & ~old_QL, True)):
        history = {n: torch.where(changed_QL.view(8, 6, *[1] * (x.ndim - 2)), other[n], x)
                   for n, x in batch.history.items()}
        moved = (model(replace(batch, history=history)) - model(batch)).abs().amax((1, 2))
        assert bool((moved[1:] > 1e-8).any()) == matters
