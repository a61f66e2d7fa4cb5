"""Models without parameters keep the promises that do not speak of gradients (M1, M5-M7, M9, M10, M14-M16)."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycascade import plugins
from raycascade.schema import UNKNOWN
from tests.model_cases import (
    FITTED_MODELS,
    SPACE,
    one_candidate_a_request,
    padded_candidates,
    random_batch,
    requests_at,
    with_candidates,
    with_history,
)
from tests.tree_rows import fitted

OPTIONS = [{}, {"max_categories": 8}, {"objective": "rank:ndcg", "depth": 2}]
every_case = pytest.mark.parametrize("options", OPTIONS, ids=str)


def num_tasks_of(options: dict[str, Any]) -> int:
    return 1 if options.get("objective") == "rank:ndcg" else 2


def test_these_are_the_models_without_parameters():
    """A new one needs a way to fit it in tests/tree_rows.py, and cases here."""
    assert FITTED_MODELS == ("gbdt",)


@every_case
def test_one_request_with_one_candidate_and_no_history_is_scored_as_in_a_bigger_batch(options: dict[str, Any]):
    batch, num_tasks = random_batch(), num_tasks_of(options)
    model = fitted(num_tasks=num_tasks, **options)
    single = with_history(with_candidates(requests_at(batch, [0]), lambda x: x[:, :1]), lambda x: x[:, :1])
    logits = model(single)
    assert logits.shape == (1, 1, num_tasks)
    assert logits.isfinite().all()
    assert torch.equal(logits[0, 0], model(batch)[0, 0])


@every_case
def test_no_candidates_and_histories_of_no_length_are_fine(options: dict[str, Any]):
    model = fitted(**options)
    assert model(random_batch(num_candidates=0)).shape == (8, 0, 1)
    masked = replace(random_batch(), history_mask_QL=torch.zeros(8, 6, dtype=torch.bool))
    assert torch.equal(model(with_history(random_batch(), lambda x: x[:, :0])), model(masked))


@every_case
def test_masked_candidates_change_nothing_and_get_finite_logits(options: dict[str, Any]):
    batch, model = random_batch(), fitted(**options)
    more = model(padded_candidates(batch))
    assert more.isfinite().all()
    assert torch.equal(more[:, :5][batch.mask_QC], model(batch)[batch.mask_QC])


@every_case
def test_permuting_candidates_permutes_logits(options: dict[str, Any]):
    batch, model, order = random_batch(), fitted(**options), torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(model(with_candidates(batch, lambda x: x[:, order])), model(batch)[:, order])


@every_case
def test_the_other_candidates_of_a_request_do_not_matter(options: dict[str, Any]):
    model, other = fitted(**options), random_batch(seed=1)
    batch = replace(random_batch(), mask_QC=torch.ones(8, 5, dtype=torch.bool))
    others = replace(batch, item={n: torch.cat([x[:, :1], other.item[n][:, 1:]], 1) for n, x in batch.item.items()})
    assert torch.equal(model(others)[:, 0], model(batch)[:, 0])
    assert (model(others)[:, 1:] - model(batch)[:, 1:]).abs().max() > 1e-6


@every_case
def test_a_list_of_candidates_equals_a_table_with_one_candidate_a_row(options: dict[str, Any]):
    batch, model = random_batch(), fitted(**options)
    assert torch.equal(model(one_candidate_a_request(batch)).view(8, 5, 1), model(batch))


@every_case
def test_a_pass_leaves_config_space_and_batch_as_they_were(options: dict[str, Any]):
    model, batch = fitted(**options), random_batch()
    before, dumps = copy.deepcopy(batch), (model.config.model_dump(), SPACE.model_dump())
    model.train_outputs(batch)
    assert (model.config.model_dump(), SPACE.model_dump()) == dumps
    for key in ("user", "item", "history"):
        assert all(torch.equal(x, getattr(before, key)[n]) for n, x in getattr(batch, key).items())
    assert torch.equal(batch.mask_QC, before.mask_QC)
    assert torch.equal(batch.history_mask_QL, before.history_mask_QL)


@every_case
def test_saved_and_loaded_trees_score_bitwise_equally(options: dict[str, Any]):
    num_tasks = num_tasks_of(options)
    model = fitted(num_tasks=num_tasks, **options)
    cls, _ = plugins.options("models", {"name": "gbdt"}, "model")
    fresh = cls(model.config, SPACE, num_tasks=num_tasks)
    fresh.from_files(model.to_files())
    assert torch.equal(fresh(random_batch()), model(random_batch()))
    assert fresh.importance == model.importance


@every_case
def test_extreme_inputs_give_finite_logits(options: dict[str, Any]):
    extreme = {"id": lambda x: torch.full_like(x, UNKNOWN), "ids": torch.zeros_like, "vector": torch.zeros_like,
               "dense": lambda x: torch.where(x > 0, 5.0, -5.0)}

    def group(old: Any) -> dict[str, Tensor]:
        return {n: extreme[SPACE[n].form](x) for n, x in old.items()}

    batch = random_batch()
    batch = replace(batch, user=group(batch.user), item=group(batch.item), history=group(batch.history),
                    mask_QC=torch.arange(5).expand(8, 5) < 1, history_mask_QL=torch.zeros(8, 6, dtype=torch.bool))
    assert fitted(**options)(batch).isfinite().all()


@every_case
def test_logits_are_float32_numbers_below_0_and_above_1_without_a_gradient(options: dict[str, Any]):
    logits, auxiliary = fitted(**options).train_outputs(random_batch(num_requests=60, seed=90))
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert auxiliary == {}
    assert logits.min() < 0
    assert logits.max() > 1


def test_large_ids_are_told_apart_exactly():
    """A float32 detour would turn 16777217 into 16777216, and match it with an event of that item."""
    big, model = 1 << 24, fitted(max_categories=0)
    batch = replace(random_batch(num_requests=2), history_mask_QL=torch.ones(2, 6, dtype=torch.bool),
                    mask_QC=torch.ones(2, 5, dtype=torch.bool))
    ids = torch.tensor([[big, big + 1, big, big + 1, big]] * 2)
    batch = replace(batch, item={**batch.item, "item_id": ids},
                    history={**batch.history, "item_id": torch.full((2, 6), big)})
    place = [column.name for column in model.columns.columns].index("history.item_id.matches")
    assert model.columns.table(batch)[:, place].tolist() == [6, 0, 6, 0, 6] * 2
