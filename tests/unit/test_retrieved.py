"""The lists of the later stages: what the first stage would retrieve at this moment, against sorting by brute force."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raycascade.batch import Batch, collate
from raycascade.cascade import Cascade
from raycascade.shards import Shards
from raycascade.training.loop import Place, Run
from raycascade.training.sampling import Catalogue, SharedItems, _compacted, shared_items, with_retrieved
from tests.tiny_shards import train_config, write_shards

NUM, WIDE, NARROW = 24, 40, 8
RNG_SEED = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A cascade with weights large enough that scores differ."""
    shards = write_shards(str(tmp_path_factory.mktemp("shards") / "s"))
    run = Run.build(train_config(shards), Shards.open(shards), Place())
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in run.cascade.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    run.cascade.eval()
    return run


@pytest.fixture(scope="module")
def batch(run: Run) -> Batch:
    """24 requests of one moment with 3 to 6 candidates, of whom every third excludes items; one has no positive."""
    full = collate(run.shards.table("requests/train").slice(0, NUM), run.shards.items, keep=(5, 4, 3), k=2)
    full = replace(full, time_ms_Q=torch.full_like(full.time_ms_Q, int(full.time_ms_Q[9])))
    mask_QC = torch.arange(6) < 3 + torch.arange(NUM)[:, None] % 4
    assert full.targets is not None
    labels = {"click": full.targets.labels["click"].index_fill(0, torch.tensor([5]), 0.0)}
    full = full.with_candidates(full.candidates_QC, mask_QC, run.shards.items)
    exclude = tuple(np.arange(2, 2 + 7 * (q % 3 == 0)) for q in range(NUM))
    targets = collate(run.shards.table("requests/train").slice(0, NUM), run.shards.items, keep=(5, 4, 3), k=2).targets
    assert targets is not None
    return replace(full, exclude=exclude, targets=replace(targets, mask_QC=mask_QC, labels=labels))


def first_stage(cascade: Cascade, batch: Batch, catalogue: Catalogue, **options: Any) -> tuple[Tensor, SharedItems]:
    """The first stage's scores of the list and of the shared items."""
    tower: Any = cascade.retriever
    state = tower.encode_request(batch)
    shared = shared_items(batch, lambda item: tower.score_items(state, item), catalogue,
                          rng=np.random.default_rng(RNG_SEED), **{"num_sampled": None, "source": "uniform", **options})
    return tower.score_candidates(state, batch)[:, :, 0], shared


def widened(run: Run, batch: Batch, *, count: int = 6) -> tuple[Batch, Tensor]:
    scores_QC, shared = first_stage(run.cascade, batch, run.catalogue)
    return with_retrieved(batch, scores_QC, shared, run.catalogue, count=count, keeps=(WIDE, NARROW),
                          rng=np.random.default_rng(RNG_SEED))


def scores_of(run: Run, batch: Batch, q: int, rows: list[int]) -> list[float]:
    """The first stage's scores of some items for one request, by the forward pass."""
    one = batch.take(torch.arange(batch.num_requests) == q)
    listed = one.with_candidates(torch.tensor([rows]), torch.ones(1, len(rows), dtype=torch.bool), run.shards.items)
    with torch.no_grad():
        return run.cascade.score("retriever", listed)[0].tolist()


def order_of(run: Run, batch: Batch, q: int) -> list[tuple[int, float]]:
    """(row, score) of the catalogue without the request's own candidates and exclusions, best first."""
    banned = {*batch.candidates_QC[q][batch.mask_QC[q]].tolist(), *batch.exclude[q].tolist()}
    rows = [row for row in run.shards.items.all_rows.tolist() if row not in banned]
    return sorted(zip(rows, scores_of(run, batch, q, rows), strict=True), key=lambda pair: -pair[1])


def kept_of(run: Run, batch: Batch, q: int) -> list[tuple[int, int]]:
    """(column, place) of the candidates that the first stage would keep."""
    assert batch.targets is not None
    order = order_of(run, batch, q)
    own = scores_of(run, batch, q, batch.candidates_QC[q].tolist())
    places = [sum(score > one for _, score in order) for one in own]
    return [(c, place) for c, place in enumerate(places) if batch.mask_QC[q, c] and place < WIDE]


def chosen_of(run: Run, batch: Batch) -> list[tuple[int, list[tuple[int, int]]]]:
    """The requests that keep a positive, with what they keep."""
    assert batch.targets is not None
    clicks, found = batch.targets.labels["click"], []
    for q in range(NUM):
        kept = kept_of(run, batch, q)
        if any(clicks[q, c] > 0.5 for c, _ in kept):
            found.append((q, kept))
    return found


# ---------------------------------------------------------------- shared items
@pytest.mark.parametrize("num_sampled", [None, 50])
def test_own_candidates_and_excluded_rows_are_masked_and_nothing_else(run: Run, batch: Batch, num_sampled: int | None):
    _, shared = first_stage(run.cascade, batch, run.catalogue, num_sampled=num_sampled, source="popularity")
    rows_S, hits = shared.rows_S.tolist(), 0
    assert len(rows_S) == len(set(rows_S))
    assert len(rows_S) == 120 if num_sampled is None else 20 < len(rows_S) <= 50
    for q in range(NUM):
        banned = {*batch.candidates_QC[q][batch.mask_QC[q]].tolist(), *batch.exclude[q].tolist()}
        assert shared.negatives.mask_QS[q].tolist() == [row not in banned for row in rows_S]
        hits += len(banned & set(rows_S))
        expected = scores_of(run, batch, q, rows_S)
        np.testing.assert_allclose(shared.negatives.scores_QS[q].tolist(), expected, rtol=1e-4, atol=1e-5)
    assert hits > 20
    assert (shared.log_q_QC is None) == (shared.negatives.log_q_S is None) == (num_sampled is None)


# ---------------------------------------------------------------- the lists
def test_requests_without_a_positive_in_reach_are_left_out_and_candidates_out_of_reach_are_dropped(
    run: Run, batch: Batch
):
    before = batch.mask_QC.clone()
    wide, _ = widened(run, batch)
    chosen = chosen_of(run, batch)
    assert 5 not in [q for q, _ in chosen]
    assert 5 < len(chosen) < NUM
    assert wide.request_ids == tuple(batch.request_ids[q] for q, _ in chosen)
    assert wide.targets is not None
    assert batch.targets is not None
    width = max(len(kept) for _, kept in chosen)
    assert wide.mask_QC.shape == wide.targets.mask_QC.shape == (len(chosen), width + 6)
    assert torch.equal(wide.mask_QC, wide.targets.mask_QC)
    for i, (q, kept) in enumerate(chosen):
        columns = [c for c, _ in kept]
        assert wide.mask_QC[i, :width].tolist() == [c < len(kept) for c in range(width)]
        assert wide.candidates_QC[i, :len(kept)].tolist() == batch.candidates_QC[q, columns].tolist()
        for name in ("relevance_QC", "reached_QC"):
            assert torch.equal(getattr(wide.targets, name)[i, :len(kept)], getattr(batch.targets, name)[q, columns])
        assert torch.equal(wide.targets.labels["click"][i, :len(kept)], batch.targets.labels["click"][q, columns])
        assert torch.equal(wide.history_rows_QL[i], batch.history_rows_QL[q])
    assert torch.equal(batch.mask_QC, before)
    assert not wide.targets.relevance_QC[:, width:].any()
    assert not wide.targets.reached_QC[:, width:].any()
    assert wide.targets.labels["click"][:, width:].isnan().all()


def test_every_drawn_item_is_among_the_best_of_the_first_stage_half_of_them_among_its_very_best(
    run: Run, batch: Batch
):
    count = 2000
    wide, _ = widened(run, batch, count=count)
    chosen = chosen_of(run, batch)
    width = wide.mask_QC.shape[1] - count
    places = []
    for i, (q, _) in enumerate(chosen):
        place_of = {row: place for place, (row, _) in enumerate(order_of(run, batch, q))}
        assert wide.mask_QC[i, width:].all()
        places.append([place_of[row] for row in wide.candidates_QC[i, width:].tolist()])
    places_QM = np.array(places)
    assert places_QM.max() == WIDE - 1
    assert places_QM[:, count // 2:].max() == NARROW - 1
    chance = np.where(np.arange(WIDE) < NARROW, 0.5 / NARROW, 0.0) + 0.5 / WIDE
    seen = np.bincount(places_QM.flatten(), minlength=WIDE) / places_QM.size
    assert (np.abs(seen - chance) < 4.5 * np.sqrt(chance * (1 - chance) / places_QM.size)).all()
    assert wide.targets is not None
    assert wide.targets.log_q_QC is not None
    np.testing.assert_allclose(wide.targets.log_q_QC[:, width:].exp(), count * chance[places_QM], rtol=1e-5)


def test_log_q_of_a_logged_candidate_is_the_density_at_its_place(run: Run, batch: Batch):
    wide, _ = widened(run, batch)
    assert wide.targets is not None
    assert wide.targets.log_q_QC is not None
    seen = set()
    for i, (_, kept) in enumerate(chosen_of(run, batch)):
        expected = [6 * (0.5 / WIDE + (place < NARROW) * 0.5 / NARROW) for _, place in kept]
        np.testing.assert_allclose(wide.targets.log_q_QC[i, :len(kept)].exp(), expected, rtol=1e-5)
        seen |= {place < NARROW for _, place in kept}
    assert seen == {False, True}


@pytest.mark.parametrize("count", [1, 5])
def test_an_odd_number_draws_one_more_from_the_wide_part(run: Run, batch: Batch, count: int):
    wide, _ = widened(run, batch, count=count)
    width = wide.mask_QC.shape[1] - count
    assert wide.targets is not None
    assert wide.targets.log_q_QC is not None
    expected = {round((count - count // 2) / WIDE + inside * (count // 2) / NARROW, 5) for inside in (0, 1)}
    assert {round(x, 5) for x in wide.targets.log_q_QC[wide.mask_QC].exp().tolist()} <= expected
    assert wide.candidates_QC[:, width:].shape[1] == count


def test_the_scores_returned_are_the_first_stages_scores_of_the_new_lists(run: Run, batch: Batch):
    wide, scores_QC = widened(run, batch)
    assert scores_QC.shape == wide.mask_QC.shape
    assert not scores_QC.requires_grad
    with torch.no_grad():
        again_QC = run.cascade.score("retriever", wide)
    torch.testing.assert_close(scores_QC[wide.mask_QC], again_QC[wide.mask_QC], rtol=1e-4, atol=1e-5)
    assert scores_QC.isfinite().all()


def test_the_item_fields_are_those_of_the_rows(run: Run, batch: Batch):
    wide, _ = widened(run, batch)
    again = wide.with_candidates(wide.candidates_QC, wide.mask_QC, run.shards.items)
    assert wide.item.keys() == again.item.keys()
    assert all(torch.equal(values, again.item[name]) for name, values in wide.item.items())


def test_fewer_items_than_the_first_stage_keeps_are_all_retrieved_without_what_is_excluded(run: Run, batch: Batch):
    scores_QC, shared = first_stage(run.cascade, batch, run.catalogue, num_sampled=12)
    wide, _ = with_retrieved(batch, scores_QC, shared, run.catalogue, count=200, keeps=(500, 100),
                             rng=np.random.default_rng(RNG_SEED))
    width = wide.mask_QC.shape[1] - 200
    masked = 0
    for i, one in enumerate(wide.request_ids):
        q = batch.request_ids.index(one)
        banned = {*batch.candidates_QC[q][batch.mask_QC[q]].tolist(), *batch.exclude[q].tolist()}
        drawn = set(wide.candidates_QC[i, width:][wide.mask_QC[i, width:]].tolist())
        assert drawn == set(shared.rows_S.tolist()) - banned
        masked += int((~wide.mask_QC[i, width:]).sum())
    assert masked > 0


def test_a_batch_without_any_positive_leaves_no_request(run: Run, batch: Batch):
    assert batch.targets is not None
    nothing = {"click": torch.zeros_like(batch.targets.labels["click"])}
    wide, scores_QC = widened(run, replace(batch, targets=replace(batch.targets, labels=nothing)))
    assert wide.num_requests == 0
    assert scores_QC.shape == wide.mask_QC.shape == (0, 6)
    for name in ("pre_ranker", "ranker"):
        assert run.cascade.score(name, wide).shape == (0, 6)


# ---------------------------------------------------------------- compacting
def test_compacting_moves_what_is_unmasked_to_the_front_in_its_order(batch: Batch):
    mask_QC = torch.rand(batch.mask_QC.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    mask_QC[0] = False
    assert batch.targets is not None
    other_QC = torch.arange(mask_QC.numel()).view(mask_QC.shape)
    compact, (moved_QC,) = _compacted(replace(batch, targets=replace(batch.targets, mask_QC=mask_QC)), (other_QC,))
    width = int(mask_QC.sum(1).max())
    assert 0 < width < 6
    assert compact.targets is not None
    assert compact.mask_QC.shape == moved_QC.shape == (NUM, width)
    for q in range(NUM):
        columns = mask_QC[q].nonzero()[:, 0]
        assert compact.mask_QC[q].tolist() == [c < len(columns) for c in range(width)]
        for new, old in ((moved_QC, other_QC), (compact.candidates_QC, batch.candidates_QC),
                         (compact.targets.relevance_QC, batch.targets.relevance_QC),
                         (compact.targets.reached_QC, batch.targets.reached_QC),
                         (compact.targets.labels["click"], batch.targets.labels["click"])):
            assert torch.equal(new[q, :len(columns)], old[q, columns])
    assert torch.equal(compact.mask_QC, compact.targets.mask_QC)
