"""Stages that add to the score of the stage before: the sums by hand, the funnel over them, and what learns."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raycascade.batch import Batch, collate
from raycascade.bundle import build_index
from raycascade.cascade import Cascade
from raycascade.indexes import ItemIndex
from raycascade.items import ItemTable
from tests import tiny_world
from tests.model_cases import build, random_batch
from tests.tiny_shards import STAGES, train_config

KEEPS, QUOTAS, SCALES = (30, 10, 4), (5, 4, 2), {"pre_ranker": 0.7, "ranker": -1.5}


def cascade_with_priors(items: ItemTable, *, seed: int = 5) -> tuple[Cascade, ItemIndex]:
    stages = [{**stage, "keep": keep, "prior": stage["name"] in SCALES}
              for stage, keep in zip(STAGES, KEEPS, strict=True)]
    config = train_config("nowhere", stages=stages, changes={"lists": {"k": 2, "quotas": list(QUOTAS)}})
    torch.manual_seed(seed)
    cascade = Cascade(config, items.state.space).eval()
    with torch.no_grad():
        for parameter in cascade.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, scale in SCALES.items():
            cascade.prior_scales[name].fill_(scale)
    return cascade, build_index(config, cascade, items)


@pytest.fixture(scope="module")
def items() -> ItemTable:
    state = tiny_world.fitted()
    return ItemTable.from_encoded(state.encode_items(tiny_world.raw_items(), where="items"), state)


@pytest.fixture(scope="module")
def batch(items: ItemTable) -> Batch:
    """Twenty requests at the end of the log, for which the index was made, some with fewer candidates."""
    requests = items.state.encode_requests(tiny_world.raw_requests().slice(15, 20), where="log")
    batch = collate(requests, items, keep=QUOTAS, k=2)
    batch = replace(batch, time_ms_Q=torch.full_like(batch.time_ms_Q, items.state.as_of_ms))
    short_Q1 = torch.arange(20)[:, None] % 5 == 0
    mask_QC = batch.mask_QC & ~(short_Q1 & (torch.arange(6) >= 3))
    return replace(batch.with_candidates(batch.candidates_QC, mask_QC, items))


def by_hand(cascade: Cascade, batch: Batch) -> dict[str, Tensor]:
    """The sums of the models' own logits."""
    with torch.no_grad():
        first, second, third = (cascade.models[name](batch)[:, :, 0] for name in cascade.names)
    second = second + SCALES["pre_ranker"] * first
    return dict(zip(cascade.names, (first, second, third + SCALES["ranker"] * second), strict=True))


def funnel(scores: dict[str, Tensor], widths: tuple[int, ...], q: int, left: list[int]) -> list[list[int]]:
    """The columns that each stage keeps of one request, best first."""
    kept = []
    for scores_QC, width in zip(scores.values(), widths, strict=True):
        left = sorted(left, key=lambda c: -float(scores_QC[q, c]))[:width]
        kept.append(left)
    return kept


def test_a_stage_with_a_prior_adds_its_factor_times_the_score_before(items: ItemTable, batch: Batch):
    cascade, _ = cascade_with_priors(items)
    scores, expected = cascade(batch), by_hand(cascade, batch)
    for name in cascade.names:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-6, atol=1e-6)
        assert (scores[name] - cascade.score(name, batch)).abs().max() > 0.01 or name == "retriever"


def test_the_funnel_on_lists_goes_by_the_sums(items: ItemTable, batch: Batch):
    cascade, _ = cascade_with_priors(items)
    ranking, scores, changed = cascade.rank(batch), by_hand(cascade, batch), 0
    alone = {name: cascade.score(name, batch).detach() for name in cascade.names}
    for q in range(20):
        real = [c for c in range(6) if batch.mask_QC[q, c]]
        kept = funnel(scores, QUOTAS, q, real)
        changed += kept != funnel(alone, QUOTAS, q, real)
        for stage, columns in zip(ranking.stages, kept, strict=True):
            rows_QC, mask_QC = stage.kept()
            assert rows_QC[q][mask_QC[q]].tolist() == batch.candidates_QC[q, columns].tolist()
            np.testing.assert_allclose(stage.scores_QC[q, :len(columns)], scores[stage.name][q, columns], rtol=1e-4,
                                       atol=1e-5)
    assert changed > 5  # without the priors the lists would be others


def test_recommending_goes_by_the_sums_over_the_whole_catalogue(items: ItemTable, batch: Batch):
    cascade, index = cascade_with_priors(items)
    rows_N = torch.from_numpy(items.all_rows)
    everything = batch.with_candidates(rows_N.expand(20, -1), torch.ones(20, 120, dtype=torch.bool), items)
    scores, ranking = by_hand(cascade, everything), cascade.recommend(batch, index, items)
    assert sum(len(one) > 0 for one in batch.exclude) > 5
    for q in range(20):
        kept = funnel(scores, KEEPS, q, [n for n in range(120) if n + 2 not in batch.exclude[q]])
        for stage, columns in zip(ranking.stages, kept, strict=True):
            assert stage.kept()[0][q].tolist() == [n + 2 for n in columns]
            np.testing.assert_allclose(stage.scores_QC[q, :len(columns)], scores[stage.name][q, columns], rtol=1e-4,
                                       atol=1e-4)


def test_where_too_few_items_are_left_masked_places_stay_last_whatever_the_factor(items: ItemTable, batch: Batch):
    cascade, index = cascade_with_priors(items)
    for scale in (-1.5, 0.0, 2.0):
        with torch.no_grad():
            cascade.prior_scales["ranker"].fill_(scale)
        final = cascade.recommend(replace(batch, exclude=(items.all_rows[:-2],) * 20), index, items).final
        assert final.mask_QC[:, :2].all()
        assert not final.mask_QC[:, 2:].any()
        assert np.isneginf(final.scores_QC[:, 2:]).all()
        assert np.isfinite(final.scores_QC[:, :2]).all()


def test_the_prior_teaches_its_factor_and_nothing_of_the_stage_before(items: ItemTable, batch: Batch):
    cascade, _ = cascade_with_priors(items)
    scores = cascade(batch)
    scores["ranker"].sum().backward()
    assert all(p.grad is None for name in ("retriever", "pre_ranker") for p in cascade.models[name].parameters())
    assert any(p.grad is not None for p in cascade.models["ranker"].parameters())
    assert cascade.prior_scales["pre_ranker"].grad is None
    torch.testing.assert_close(cascade.prior_scales["ranker"].grad, scores["pre_ranker"].detach().sum())


def test_a_new_prior_starts_from_a_factor_of_one(items: ItemTable):
    stages = [{**STAGES[0], "keep": 9}, {**STAGES[1], "keep": 3, "prior": True}]
    cascade = Cascade(train_config("nowhere", stages=stages, changes={"lists": {}}), items.state.space)
    assert {name: scale.item() for name, scale in cascade.prior_scales.items()} == {"pre_ranker": 1.0}


# ---------------------------------------------------------------- the state of a stage
def test_a_stages_state_moves_into_another_cascade_prior_included(items: ItemTable, batch: Batch):
    cascade, _ = cascade_with_priors(items)
    other, _ = cascade_with_priors(items, seed=6)
    with torch.no_grad():
        other.prior_scales["ranker"].fill_(9.0)
    for name in cascade.names:
        state = cascade.stage_state(name)
        assert ("prior_scale" in state) == (name in SCALES)
        assert not torch.equal(cascade(batch)[name], other(batch)[name])
        before = dict(state)
        other.load_stage_state(name, state)
        assert state.keys() == before.keys()  # the caller's mapping stays whole
        assert torch.equal(cascade(batch)[name], other(batch)[name])
    assert other.prior_scales["ranker"].item() == -1.5


def test_a_state_that_does_not_fit_is_refused(items: ItemTable):
    cascade, _ = cascade_with_priors(items)
    state = cascade.stage_state("ranker")
    with pytest.raises(RuntimeError, match="prior_scale is missing"):
        cascade.load_stage_state("ranker", {k: v for k, v in state.items() if k != "prior_scale"})
    retriever = cascade.stage_state("retriever")
    with pytest.raises(RuntimeError, match="prior_scale"):
        cascade.load_stage_state("retriever", {**retriever, "prior_scale": torch.ones(())})
    with pytest.raises(RuntimeError, match="Missing key"):
        cascade.load_stage_state("retriever", dict(list(retriever.items())[1:]))


# ---------------------------------------------------------------- what the prior of the second stage is made of
@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("more", [{}, {"index_task": 1}, {"user_history": "recency", "history_by": "action"}], ids=str)
def test_logits_from_products_of_vectors_are_the_models_own(similarity: str, item_bias: bool, more: dict[str, Any]):
    model = build("two_tower", {"similarity": similarity, "item_bias": item_bias, "item_hidden": [], **more},
                  num_tasks=2)
    batch = random_batch()
    users_QD = model.embed_users(batch)
    for c in range(5):
        items_QD = model.embed_items({name: values[:, c] for name, values in batch.item.items()})
        logits_Q = model.to_logits((users_QD * items_QD).sum(-1))
        torch.testing.assert_close(logits_Q, model(batch)[:, c, more.get("index_task", 0)], rtol=0, atol=1e-10)
    assert (model.bias.abs() > 0.01).all()


def test_a_new_stage_with_a_prior_starts_as_the_stage_before_it(items: ItemTable, batch: Batch):
    stages = [{**stage, "prior": stage["name"] in SCALES} for stage in STAGES]
    config = train_config("nowhere", stages=stages, changes={"lists": {"k": 2, "quotas": list(QUOTAS)}})
    scores = Cascade(config, items.state.space).eval()(batch)
    for name in SCALES:
        torch.testing.assert_close(scores[name][batch.mask_QC], scores["retriever"][batch.mask_QC], rtol=0, atol=1e-6)
