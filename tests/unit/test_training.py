"""Training: gradients, negatives, repeatability, resuming, early stop; the oracles are hand, brute force and alone."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from raycascade.batch import Batch, collate
from raycascade.config import Train
from raycascade.errors import ConfigError
from raycascade.losses import LossOutput
from raycascade.schema import FIRST_ROW
from raycascade.shards import Shards
from raycascade.training import checkpoint, loop
from raycascade.training.checkpoint import Best, Progress
from raycascade.training.loop import Place, Run, Save, fit
from raycascade.training.optimisers import Optimisers, average_gradients, clip_norm
from raycascade.training.row_adam import coalesced
from raycascade.training.sampling import Catalogue, shared_items, with_negatives
from tests.tiny_shards import STAGES, same, train_config, trained, weights, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


@pytest.fixture
def batch(shards: str) -> Batch:
    opened = Shards.open(shards)
    return collate(opened.table("requests/train").slice(0, 8), opened.items, keep=(5, 4, 3), k=2)


@pytest.fixture
def catalogue(shards: str) -> Catalogue:
    return Catalogue.of(Shards.open(shards).items)


# ---------------------------------------------------------------- the sum of losses
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_sum_of_the_losses_trains_each_stage_as_if_it_were_alone(shards: str, clip: float | None):
    stages = [{**stage, "model": {**stage["model"], "dropout": 0.0}} for stage in STAGES]
    options = {"epochs": 2, "clip": clip}
    run = Run.build(train_config(shards, stages=stages, train=options), Shards.open(shards), Place())
    start = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in run.cascade.models.items()}
    trained(run.config, run=run)
    for stage in stages:
        loss = {"name": "bce", "label": "click", "entry_levels": [0]}
        alone = Run.build(train_config(shards, stages=[stage], loss=loss, train=options), run.shards, Place())
        alone.cascade.models[stage["name"]].load_state_dict(start[stage["name"]])
        trained(alone.config, run=alone)
        together = run.cascade.models[stage["name"]].state_dict()
        moved = 0
        for name, value in alone.cascade.models[stage["name"]].state_dict().items():
            torch.testing.assert_close(together[name], value, rtol=0, atol=1e-6)
            moved += not torch.equal(value, start[stage["name"]][name])
        assert moved > 5


# ---------------------------------------------------------------- optimisers
class OneTable(nn.Module):
    """A cascade of one stage, as far as optimisers look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 3, sparse=True)
        self.dense = nn.Linear(3, 1)
        self.models = nn.ModuleDict({"only": nn.ModuleList([self.table, self.dense])})
        self.prior_scales = nn.ParameterDict()


def test_the_sparse_optimiser_touches_only_the_rows_of_the_batch():
    cascade: Any = OneTable()
    optimisers = Optimisers(cascade, nn.Identity(), Train(lr=0.1, embedding_lr=0.5))
    before = cascade.table.weight.detach().clone()
    for rows in ([3, 7, 7], [7, 9]):
        optimisers.zero()
        cascade.dense(cascade.table(torch.tensor(rows))).sum().backward()
        optimisers.step()
    changed = (cascade.table.weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 7, 9]
    state = optimisers.state()[0]["0.0.exp_avg_sq"]
    assert state.any(1).nonzero().flatten().tolist() == [3, 7, 9]
    # Adam's first step has the length of the learning rate in every coordinate
    np.testing.assert_allclose((cascade.table.weight[3] - before[3]).detach().abs(), [0.5] * 3, rtol=1e-4)


def test_the_padding_row_of_a_table_stays_zero(shards: str):
    run, _ = trained(train_config(shards))
    tables = [m for m in run.cascade.modules() if isinstance(m, nn.Embedding)]
    assert tables
    assert not any(table.weight[0].any() for table in tables)


def test_clipping_scales_all_gradients_of_a_stage_to_the_limit():
    dense, table = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4, 1))
    dense.grad = torch.tensor([3.0, 0.0])
    # row 1 is hit twice: 1 + 3 = 4, so the norm is the 5 of (3, 4), not of (3, 1, 3)
    rows, values = torch.tensor([[1, 1]]), torch.tensor([[1.0], [3.0]])
    table.grad = coalesced(torch.sparse_coo_tensor(rows, values, (4, 1), check_invariants=True))
    clip_norm([dense, table], 1.0)
    torch.testing.assert_close(dense.grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(table.grad.to_dense(), torch.tensor([[0.0], [0.8], [0.0], [0.0]]))


def test_gradients_within_the_limit_are_left_alone_bit_by_bit():
    dense, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    dense.grad = torch.tensor([0.1, 0.7])
    clip_norm([dense, unused], 1.0)
    assert torch.equal(dense.grad, torch.tensor([0.1, 0.7]))
    assert unused.grad is None


# ---------------------------------------------------------------- several workers
class Net(nn.Module):
    """Two tables and a layer; the second table is used for odd rows only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.always, self.odd = (nn.Embedding(6, 2, sparse=True) for _ in range(2))
        self.layer = nn.Linear(2, 1)

    def forward(self, rows: Tensor) -> Tensor:
        odd = rows[rows % 2 == 1]
        total = self.layer(self.always(rows)).square().sum()
        return total + self.layer(self.odd(odd)).pow(3).sum() if len(odd) else total


ROWS = torch.tensor([[0, 2, 2, 4], [1, 2, 3, 5]])  # what each of two workers sees


def gradients(net: Net) -> dict[str, Tensor]:
    return {name: p.grad.to_dense() for name, p in net.named_parameters() if p.grad is not None}


def average_in_one_of_two(rank: int, folder: str) -> None:
    """One of two processes; it writes its averaged gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = Net()
    net(ROWS[rank]).backward()
    tables = [net.always.weight, net.odd.weight]
    assert (net.odd.weight.grad is None) == (rank == 0)
    average_gradients(tables, list(net.layer.parameters()))
    assert net.odd.weight.grad is not None
    assert net.odd.weight.grad.is_sparse
    safetensors.torch.save_file(gradients(net), f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_gradient_of_one_sparse_tables_included(tmp_path: Path):
    spawn(average_in_one_of_two, (str(tmp_path),), nprocs=2)
    net = Net()
    ((net(ROWS[0]) + net(ROWS[1])) / 2).backward()
    expected = gradients(net)
    for rank in range(2):
        seen = safetensors.torch.load_file(tmp_path / f"{rank}.safetensors")
        assert set(seen) == set(expected)
        for name, grad in expected.items():
            np.testing.assert_allclose(seen[name], grad, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- negatives
def test_drawn_items_that_are_in_the_list_are_masked_and_the_rest_are_negatives(batch: Batch, catalogue: Catalogue):
    assert batch.targets is not None
    width = batch.mask_QC.shape[1]
    mask_QC = batch.mask_QC & (torch.arange(width) < width - 1)  # the last one is padding
    batch = replace(batch, mask_QC=mask_QC, targets=replace(batch.targets, mask_QC=mask_QC))
    wide = with_negatives(batch, catalogue, count=60, source="uniform", rng=np.random.default_rng(5))
    drawn_QM, mask_QM = wide.candidates_QC[:, width:], wide.mask_QC[:, width:]
    again_QM = catalogue.draw((len(drawn_QM), 60), "uniform", np.random.default_rng(5))
    seen = 0
    for q, m in itertools.product(*map(range, drawn_QM.shape)):
        in_list = again_QM[q, m] in batch.candidates_QC[q][batch.mask_QC[q]]
        seen += in_list
        assert bool(mask_QM[q, m]) == (not in_list)
        assert int(drawn_QM[q, m]) == (0 if in_list else again_QM[q, m])
    assert seen > 5
    assert batch.targets is not None
    assert wide.targets is not None
    assert wide.targets.log_q_QC is not None
    assert torch.equal(wide.mask_QC, wide.targets.mask_QC)
    np.testing.assert_allclose(wide.targets.log_q_QC.exp(), 60 / 120, rtol=1e-5)  # how often an item is expected
    assert not wide.targets.relevance_QC[:, width:].any()
    assert wide.targets.labels["click"][:, width:].isnan().all()
    assert torch.equal(wide.targets.labels["click"][:, :width], batch.targets.labels["click"])


@pytest.mark.parametrize("source", ["uniform", "popularity"])
def test_log_q_of_a_shared_sample_is_the_chance_of_being_in_it(source: str, batch: Batch, catalogue: Catalogue):
    draws, rounds = 40, 2000
    rng = np.random.default_rng(11)
    hits_N = np.zeros(catalogue.items.num_items)
    for _ in range(rounds):
        hits_N[np.unique(catalogue.draw((draws,), source, rng)) - FIRST_ROW] += 1
    shared = shared_items(batch, lambda item: torch.zeros(8, len(item["item_id"])), catalogue, num_sampled=draws,
                          source=source, rng=rng)
    assert shared.log_q_QC is not None
    assert shared.negatives.log_q_S is not None
    listed_QC = shared.log_q_QC.exp().numpy()
    seen_QC = hits_N[batch.candidates_QC.numpy() - FIRST_ROW] / rounds
    spread_QC = np.sqrt(listed_QC * (1 - listed_QC) / rounds)
    assert (np.abs(listed_QC - seen_QC) < 4.5 * spread_QC).all()
    # by the binomial formula
    p_QC = catalogue.probability(batch.candidates_QC.numpy(), source)
    np.testing.assert_allclose(listed_QC, 1 - (1 - p_QC) ** draws, rtol=1e-5)
    p_S = catalogue.probability(shared.rows_S, source)
    np.testing.assert_allclose(shared.negatives.log_q_S.exp(), 1 - (1 - p_S) ** draws, rtol=1e-5)


def test_popularity_is_the_logged_positives_plus_one(catalogue: Catalogue):
    state = catalogue.items.state
    counts = state.counters.as_of(catalogue.items.all_rows, np.int64(1 << 60), "click") + 1.0
    assert counts.max() > 3
    np.testing.assert_allclose(catalogue.probability(catalogue.items.all_rows, "popularity"), counts / counts.sum())


def test_the_shared_catalogue_list_is_every_item_once_and_scored_as_one_by_one(
    shards: str, batch: Batch, catalogue: Catalogue
):
    run = Run.build(train_config(shards), Shards.open(shards), Place())
    tower: Any = run.cascade.eval().model("retriever")
    state = tower.encode_request(batch)
    batch = replace(batch, exclude=tuple(np.array([2 + q, 60]) for q in range(8)))
    shared = shared_items(batch, lambda item: tower.score_items(state, item), catalogue, num_sampled=None,
                          source="popularity", rng=np.random.default_rng(0))
    rows_N = catalogue.items.all_rows
    assert np.array_equal(shared.rows_S, rows_N)
    assert shared.log_q_QC is None
    assert shared.negatives.log_q_S is None
    moment = batch.time_ms_Q.median()
    everything = replace(batch, time_ms_Q=torch.full_like(batch.time_ms_Q, int(moment))).with_candidates(
        torch.from_numpy(np.tile(rows_N, (8, 1))), torch.ones(8, len(rows_N), dtype=torch.bool), catalogue.items)
    one_by_one_QN = tower.score_candidates(state, everything)[:, :, 0]
    torch.testing.assert_close(shared.negatives.scores_QS, one_by_one_QN, rtol=1e-5, atol=1e-5)
    for q in range(8):
        own = set(batch.candidates_QC[q][batch.mask_QC[q]].tolist())
        assert set(rows_N[~shared.negatives.mask_QS[q].numpy()]) == own | {2 + q, 60}


# ---------------------------------------------------------------- the loop
class Spy(nn.Module):
    """A loss that remembers the types it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, scores: Mapping[str, Tensor], targets: object) -> LossOutput:
        del targets
        self.seen += [s.dtype for s in scores.values()]
        return LossOutput(torch.stack([s.mean() for s in scores.values()]).sum(), {})


def test_losses_get_float32_scores_even_where_the_models_ran_in_bfloat16(shards: str, batch: Batch):
    run = Run.build(train_config(shards), Shards.open(shards), Place())
    spy = Spy()
    run.objective.terms[:] = [replace(term, loss=spy) for term in run.objective.terms]
    with torch.autocast("cpu", torch.bfloat16):
        assert run.cascade.models["ranker"](batch).dtype == torch.bfloat16
        total = run.objective(run.cascade, batch, run.catalogue, np.random.default_rng(0)).total
    assert spy.seen == [torch.float32] * 3
    assert total.dtype == torch.float32


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(shards: str):
    negatives = {"per_request": 3}
    first, second, other = (weights(trained(train_config(shards, train={"seed": seed, "negatives": negatives}))[0])
                            for seed in (1, 1, 2))
    assert same(first, second)
    assert not same(first, other)


def resumed_from_every_checkpoint(run: Run, folder: Path) -> list[int]:
    """Trains to the end, keeping a checkpoint of every step; each one goes on in a new process to the same weights."""
    kept: list[int] = []

    def keep(progress: Progress, steps: int, save: Save | None) -> None:
        del steps
        if save is not None and progress.total_steps not in kept:
            (folder / f"{progress.total_steps}").mkdir()
            save(str(folder / f"{progress.total_steps}"))
            kept.append(progress.total_steps)

    end = fit(run, Progress(), keep)
    for step in kept:
        again = Run.build(run.config, run.shards, run.place)
        with torch.no_grad():
            for parameter in again.cascade.parameters():
                parameter.add_(1.0)  # whatever is not restored shows
        progress = checkpoint.load(str(folder / str(step)), again.cascade, again.objective, again.optimisers,
                                   best=again.best)
        _, progress = trained(run.config, run=again, progress=progress)
        assert same(weights(run), weights(again)), step
        points = {name: [tuple(p) for p in curve] for name, curve in progress.curves.items()}
        assert points == end.curves
        assert (progress.total_steps, progress.rows, progress.best_valid) == (end.total_steps, end.rows, end.best_valid)
    return kept


def test_a_run_resumed_from_any_step_ends_with_the_same_bits(shards: str, tmp_path: Path):
    config = train_config(shards, train={"epochs": 2, "batch_size": 32, "checkpoint_steps": 1, "weight_decay": 0.01,
                                         "negatives": {"per_request": 3}}, loss={"name": "lcron", "uncertainty": True})
    run = Run.build(config, Shards.open(shards), Place())
    assert resumed_from_every_checkpoint(run, tmp_path) == list(range(1, 11))


def curve_of(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict[str, Tensor]]:
    """Makes the epochs' validation losses what a test wants; returns where the epochs' weights will stand."""
    seen: list[dict[str, Tensor]] = []

    def told(run: Run) -> float:
        seen.append(weights(run))
        return losses[len(seen) - 1]

    monkeypatch.setattr(loop, "validation_loss", told)
    return seen


def test_early_stop_stops_and_leaves_the_weights_of_the_best_epoch(shards: str, monkeypatch: pytest.MonkeyPatch):
    seen = curve_of(monkeypatch, [0.5, 0.3, 0.4, 0.35, 0.1])
    run, progress = trained(train_config(shards, train={"epochs": 5, "early_stop": 2, "batch_size": 64}))
    assert progress.epoch == len(seen) == 4
    assert same(weights(run), seen[1])
    assert not same(seen[1], seen[3])


def test_without_early_stop_all_epochs_run_and_the_last_weights_stay(shards: str, monkeypatch: pytest.MonkeyPatch):
    seen = curve_of(monkeypatch, [0.1, 0.3, 0.4])
    run, progress = trained(train_config(shards, train={"epochs": 3, "batch_size": 64}))
    assert progress.epoch == 3
    assert same(weights(run), seen[2])


def test_the_best_epoch_survives_a_resume(shards: str, tmp_path: Path):
    # a high rate overshoots, so that the best epoch is not the last one
    train = {"epochs": 6, "batch_size": 32, "checkpoint_steps": 4, "lr": 0.1, "early_stop": 1}
    config = train_config(shards, train=train)
    run = Run.build(config, Shards.open(shards), Place())
    kept = resumed_from_every_checkpoint(run, tmp_path)
    assert len(kept) > 2
    assert run.best.weights
    assert same(weights(run), dict(run.best.weights))


def test_early_stop_without_a_validation_split_is_refused(shards: str):
    opened = Shards.open(shards)
    blind = Shards(opened.folder, {**opened.manifest, "requests": {"train": 150}})
    with pytest.raises(ConfigError, match="no validation split to judge by"):
        Run.build(train_config(shards, train={"early_stop": 1}), blind, Place())


def test_the_best_weights_are_a_copy():
    layer, best = nn.Linear(1, 1), Best()
    best.keep(layer)
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    best.restore(layer)
    assert torch.equal(layer.weight, kept)


def test_validation_is_the_same_on_every_worker_though_negatives_are_drawn(
    shards: str, monkeypatch: pytest.MonkeyPatch
):
    config = train_config(shards, train={"negatives": {"per_request": 5}})
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: None)
    losses = [loop.validation_loss(Run.build(config, Shards.open(shards), Place(rank, 2))) for rank in range(2)]
    assert losses[0] == losses[1]


def test_a_loss_that_is_not_finite_stops_with_one_line(shards: str):
    run = Run.build(train_config(shards), Shards.open(shards), Place())
    with torch.no_grad():
        for parameter in run.cascade.models["ranker"].parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"not finite at step 0 .*bce/ranker.*lower train.lr") as caught:
        trained(run.config, run=run)
    assert "\n" not in str(caught.value)


def test_a_batch_that_the_workers_cannot_share_evenly_is_refused(shards: str):
    run = Run.build(train_config(shards, train={"batch_size": 15}), Shards.open(shards), Place(0, 2))
    with pytest.raises(ConfigError, match="batch_size 15 must be a multiple of the 2 workers"):
        run.reader("train")
