"""The cascade against naive loops: who is scored, who goes on, and in which order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from raycascade.batch import Batch, collate
from raycascade.bundle import Bundle, build_index, load_bundle
from raycascade.cascade import Cascade, without_excluded
from raycascade.errors import ConfigError
from raycascade.indexes import Candidates, ItemIndex
from raycascade.items import ItemTable
from tests.tiny_shards import STAGES, train_config
from tests.tiny_world import encoded_users, fitted, raw_items, raw_requests

WIDTHS = (30, 12, 8, 5, 3)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def logged(bundle: Bundle) -> Batch:
    """60 requests with 6 logged candidates, every seventh with fewer."""
    requests = bundle.state.encode_requests(raw_requests().slice(0, 60), where="tiny")
    batch = collate(requests, bundle.items, keep=(4, 3, 2), k=2)
    short_Q1 = torch.arange(60)[:, None] % 7 == 0
    mask_QC = batch.mask_QC & ~(short_Q1 & (torch.arange(6) >= 2))
    return replace(batch, mask_QC=mask_QC, candidates_QC=torch.where(mask_QC, batch.candidates_QC, 0))


@pytest.fixture(scope="module")
def bare(bundle: Bundle) -> Batch:
    """All users, one of whom excludes five items."""
    return bundle.batch(encoded_users(bundle.state))


def naive_rank(scores: dict[str, Tensor], widths: tuple[int, ...], batch: Batch, q: int) -> list[list[int]]:
    """What each stage keeps of one request: sort, cut, next."""
    left = [c for c in range(batch.mask_QC.shape[1]) if batch.mask_QC[q, c]]
    kept = []
    for stage_QC, width in zip(scores.values(), widths, strict=True):
        left = sorted(left, key=lambda c: -float(stage_QC[q, c]))[:width]
        kept.append([int(batch.candidates_QC[q, c]) for c in left])
    return kept


def test_rank_is_the_loop_over_stages_that_anyone_would_write(
    bundle: Bundle, logged: Batch, monkeypatch: pytest.MonkeyPatch
):
    cascade = bundle.cascade
    monkeypatch.setattr(cascade, "quotas", (4, 3, 2))
    with torch.no_grad():
        scores = cascade(logged)
    ranking = cascade.rank(logged)
    for q in range(60):
        for stage, expected in zip(ranking.stages, naive_rank(scores, cascade.quotas, logged, q), strict=True):
            rows_QC, mask_QC = stage.kept()
            assert rows_QC[q][mask_QC[q]].tolist() == expected


def catalogue_scores(bundle: Bundle, batch: Batch) -> dict[str, np.ndarray]:
    """Every request against every item, by the forward pass of all stages with the whole catalogue as candidates."""
    rows_N = torch.from_numpy(bundle.items.all_rows)
    everything = batch.with_candidates(rows_N.expand(batch.num_requests, -1),
                                       torch.ones(batch.num_requests, len(rows_N), dtype=torch.bool), bundle.items)
    with torch.no_grad():
        return {name: scores_QN.numpy() for name, scores_QN in bundle.cascade(everything).items()}


def test_recommend_is_brute_force_over_the_whole_catalogue(bundle: Bundle, bare: Batch):
    # item vectors stand for the end of the training log: requests of that moment can be held against the forward pass
    bare = replace(bare, time_ms_Q=torch.full_like(bare.time_ms_Q, bundle.state.as_of_ms))
    scores = catalogue_scores(bundle, bare)
    ranking = bundle.cascade.recommend(bare, bundle.index, bundle.items)
    for q in range(bare.num_requests):
        left = [n for n in range(bundle.items.num_items) if n + 2 not in bare.exclude[q]]
        for stage, keep in zip(ranking.stages, bundle.cascade.keeps, strict=True):
            left = sorted(left, key=lambda n: -scores[stage.name][q, n])[:keep]
            assert stage.kept()[0][q].tolist() == [n + 2 for n in left], (q, stage.name)


def test_a_candidate_dropped_by_the_pre_ranker_cannot_reach_the_ranker(
    bundle: Bundle, bare: Batch, monkeypatch: pytest.MonkeyPatch
):
    before = bundle.cascade.recommend(bare, bundle.index, bundle.items)
    dropped_Q1 = torch.from_numpy(before["pre_ranker"].rows_QC[:, 15:16].copy())  # the first that misses the cut at 15
    honest = bundle.cascade.score

    def in_love(name: str, batch: Batch) -> Tensor:
        return honest(name, batch) + (1e6 * (batch.candidates_QC == dropped_Q1) if name == "ranker" else 0.0)

    monkeypatch.setattr(bundle.cascade, "score", in_love)
    after = bundle.cascade.recommend(bare, bundle.index, bundle.items)
    assert not (after["ranker"].rows_QC == dropped_Q1.numpy()).any()
    assert np.array_equal(after["ranker"].rows_QC, before["ranker"].rows_QC)
    kept_Q1 = torch.from_numpy(before["pre_ranker"].rows_QC[:, 14:15].copy())  # the last that makes it
    dropped_Q1.copy_(kept_Q1)
    loved = bundle.cascade.recommend(bare, bundle.index, bundle.items)
    assert np.array_equal(loved["ranker"].rows_QC[:, :1], kept_Q1.numpy())


def test_excluded_items_never_come_back_and_the_list_is_still_full(bundle: Bundle, bare: Batch):
    best = bundle.cascade.recommend(replace(bare, exclude=()), bundle.index, bundle.items)
    exclude = tuple(np.concatenate([row[:q % 7], [1, 999]]) for q, row in enumerate(best["retriever"].rows_QC))
    again = bundle.cascade.recommend(replace(bare, exclude=exclude), bundle.index, bundle.items)
    for stage, keep in zip(again.stages, bundle.cascade.keeps, strict=True):
        rows_QC, mask_QC = stage.kept()
        assert rows_QC.shape == (bare.num_requests, keep)
        assert mask_QC.all()
        for q, rows in enumerate(rows_QC):
            assert not set(rows.tolist()) & set(exclude[q].tolist())
            assert len(set(rows.tolist())) == keep


def test_where_fewer_items_are_left_than_asked_for_the_rest_is_masked(bundle: Bundle, bare: Batch):
    everything_but_two = tuple(bundle.items.all_rows[:-2] for _ in range(bare.num_requests))
    final = bundle.cascade.recommend(replace(bare, exclude=everything_but_two), bundle.index, bundle.items).final
    rows_QC, mask_QC = final.kept()
    assert (mask_QC.sum(1) == 2).all()
    assert {tuple(sorted(rows[mask])) for rows, mask in zip(rows_QC, mask_QC, strict=True)} == {(120, 121)}
    assert (rows_QC[~mask_QC] == 0).all()
    assert np.isneginf(final.scores_QC[:, :5][~mask_QC]).all()


def test_exclusions_are_dropped_in_place_and_the_order_of_the_others_stays():
    found = Candidates(np.array([[9, 4, 7, 2], [5, 9, 3, 0]]), np.array([[4, 3, 2, 1], [3, 2, 1, -np.inf]], np.float32))
    kept = without_excluded(found, (np.array([4, 4, 88]), np.array([9])), 3)
    assert kept.rows_QK.tolist() == [[9, 7, 2], [5, 3, 0]]
    assert kept.scores_QK.tolist() == [[4, 2, 1], [3, 1, -np.inf]]


def test_ties_keep_the_order_of_the_stage_before(bundle: Bundle, bare: Batch, monkeypatch: pytest.MonkeyPatch):
    before = bundle.cascade.retrieve(bare, bundle.index)
    monkeypatch.setattr(bundle.cascade, "score", lambda name, batch: (batch.candidates_QC % 2).float())
    after = bundle.cascade.narrow("pre_ranker", 5, bare, before, bundle.items)  # no prior, so no score of the retriever
    for seen, sorted_rows in zip(before.rows_QC, after.rows_QC, strict=True):
        assert sorted_rows.tolist() == [row for row in seen if row % 2] + [row for row in seen if row % 2 == 0]


def deep(depth: int) -> tuple[Cascade, ItemIndex, ItemTable]:
    """A cascade of so many stages with random weights."""
    stages = [{**STAGES[min(i, 2)], "name": f"stage_{i}", "keep": WIDTHS[i]} for i in range(depth)]
    config = train_config("nowhere", stages=stages, changes={"lists": {}})
    state = fitted()
    items = ItemTable.from_encoded(state.encode_items(raw_items(), where="tiny"), state)
    torch.manual_seed(depth)
    cascade = Cascade(config, state.space).eval()
    return cascade, build_index(config, cascade, items), items


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_any_depth_goes_through_the_same_code(depth: int):
    cascade, index, items = deep(depth)
    requests = items.state.encode_requests(raw_requests().slice(0, 10), where="tiny")
    batch = collate(requests, items, keep=cascade.quotas, k=2)
    assert [stage.name for stage in cascade.rank(batch).stages] == list(cascade.names)
    ranking = cascade.recommend(replace(batch, exclude=()), index, items)
    assert len(ranking.stages) == depth
    for before, after in zip(ranking.stages, ranking.stages[1:], strict=False):
        assert np.array_equal(np.sort(before.kept()[0], 1), np.sort(after.rows_QC, 1))  # it sees what was kept
    assert ranking.final.kept()[0].shape == (10, WIDTHS[depth - 1])
    assert (np.diff(ranking.final.scores_QC, axis=1) <= 0).all()


def test_a_request_alone_is_answered_like_a_row_of_a_big_batch(bundle: Bundle):
    users = encoded_users(bundle.state)
    together = bundle.recommend(users)
    for q in range(0, len(users), 4):
        alone = bundle.recommend(users.slice(q, 1))
        for big, small in zip(together.stages, alone.stages, strict=True):
            assert small.rows_QC[0].tolist() == big.rows_QC[q].tolist()
            np.testing.assert_allclose(small.scores_QC[0], big.scores_QC[q], rtol=1e-5, atol=1e-5)


def test_a_first_stage_without_item_vectors_cannot_search_and_says_so(bundle: Bundle):
    cascade = Cascade(train_config("nowhere", stages=[STAGES[1]], changes={"lists": {}}), bundle.state.space)
    with pytest.raises(ConfigError, match="stage 'pre_ranker' cannot search a catalogue"):
        _ = cascade.retriever


def test_a_mistake_in_a_stage_names_the_stage(bundle: Bundle):
    stages = [STAGES[0], {**STAGES[1], "exclude": ["citty"]}]
    with pytest.raises(ConfigError, match=r"stages.1 \(pre_ranker\): .*did you mean 'city'"):
        Cascade(train_config("nowhere", stages=stages, changes={"lists": {}}), bundle.state.space)
