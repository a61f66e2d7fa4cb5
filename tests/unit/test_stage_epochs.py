"""Learning rates by hand, requests without a positive left out, and stages that end before the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from raycascade.config import Train
from raycascade.errors import ConfigError
from raycascade.shards import Shards
from raycascade.training import checkpoint, loop, objective, optimisers
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Place, Run, Save, fit, lr_scales, with_label
from raycascade.training.optimisers import Optimisers
from tests.tiny_shards import STAGES, train_config, trained, write_shards

CATALOGUE = {"name": "softmax", "label": "click", "over": "catalogue"}
LIST = {"name": "softmax", "label": "click"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


def stages_with(epochs: dict[str, int]) -> list[dict[str, Any]]:
    """A retriever over the catalogue, then two stages with priors; the middle one has running statistics."""
    losses = {"retriever": CATALOGUE}
    stages = [{**stage, "loss": losses.get(stage["name"], LIST), "prior": stage["name"] != "retriever",
               "epochs": epochs.get(stage["name"])} for stage in STAGES]
    stages[1]["model"] = {**stages[1]["model"], "norm": "batch"}
    return stages


def config_of(shards: str, ends: dict[str, int], **train: Any) -> Any:
    negatives = {"per_request": 4, "source": "retriever"}
    options = {"epochs": 3, "batch_size": 32, "weight_decay": 0.1, "negatives": negatives}
    return train_config(shards, stages=stages_with(ends), train={**options, **train})


# ---------------------------------------------------------------- learning rates
def test_the_rates_warm_up_and_fall_to_their_last_share_at_the_end_of_the_stages_own_epochs(shards: str):
    config = config_of(shards, {"pre_ranker": 1, "ranker": 2}, epochs=4, warmup_steps=3, final_lr=0.2)

    def scales(step: int, done: float) -> list[float]:
        found = lr_scales(config, step, done)
        assert list(found) == ["retriever", "pre_ranker", "ranker"]
        return list(found.values())

    assert scales(0, 0.0) == pytest.approx([0.25] * 3)  # the first of three warm-up steps has a quarter
    assert scales(1, 0.5) == pytest.approx([0.5 * (1 - 0.8 / 8), 0.5 * (1 - 0.8 / 2), 0.5 * (1 - 0.8 / 4)])
    assert scales(3, 0.75) == pytest.approx([1 - 0.8 * 3 / 16, 1 - 0.8 * 3 / 4, 1 - 0.8 * 3 / 8])
    assert scales(99, 1.0) == pytest.approx([0.8, 0.0, 0.6])  # pre_ranker has ended
    assert scales(99, 1.999) == pytest.approx([1 - 0.8 * 1.999 / 4, 0.0, 1 - 0.8 * 1.999 / 2])
    assert scales(99, 2.0) == pytest.approx([0.6, 0.0, 0.0])
    assert scales(99, 4.0) == pytest.approx([0.2, 0.0, 0.0])


def test_without_options_the_rate_is_the_same_at_all_times(shards: str):
    config = train_config(shards, train={"epochs": 2})
    assert {scale for step in range(5) for scale in lr_scales(config, step, step / 2).values()} == {1.0}


def test_each_stage_moves_by_the_rate_times_its_scale(shards: str):
    run = Run.build(config_of(shards, {}), Shards.open(shards), Place())
    chosen = Optimisers(run.cascade, run.objective, Train(lr=0.1, clip=None))
    scales = {"retriever": 0.5, "pre_ranker": 0.25, "ranker": 0.0}
    before = {name: {k: v.clone() for k, v in run.cascade.stage_state(name).items()} for name in scales}
    for parameter in chosen.dense:
        parameter.grad = torch.ones_like(parameter)
    chosen.step(lr_scales=scales)  # Adam's first step has the length of the rate
    for name, scale in scales.items():
        state = run.cascade.stage_state(name)
        assert state.keys() == before[name].keys()
        moved = {k: v - before[name][k] for k, v in state.items() if "tables" not in k and "moments" not in k}
        assert len(moved) > 3
        for key, by in moved.items():
            torch.testing.assert_close(by, torch.full_like(by, -0.1 * scale), rtol=1e-4, atol=1e-6, msg=key)
    assert run.cascade.prior_scales["pre_ranker"].item() == pytest.approx(0.975)


# ---------------------------------------------------------------- requests with a positive
def test_requests_without_the_label_are_left_out_and_the_others_stay_in_order():
    nan = float("nan")
    table = pa.table({"id": range(7), "click": [[0.0, 1.0], [], [0.0], [nan, 0.5], [nan, 1.0], [0.6], [0.0, 0.0]],
                      "like": [[], [], [], [], [], [], []]})
    assert with_label(table, "click")["id"].to_pylist() == [0, 4, 5]
    assert with_label(table.slice(1, 4), "click")["id"].to_pylist() == [4]
    assert with_label(table.slice(1, 3), "click")["id"].to_pylist() == [1]  # none has it: the first
    assert with_label(table.set_column(2, "like", pa.array([[]] * 7, pa.list_(pa.float32()))),
                      "like")["id"].to_pylist() == [0]


@pytest.mark.parametrize("positives_only", [False, True])
def test_positives_only_trains_on_the_requests_with_a_positive(shards: str, positives_only: bool):
    run = Run.build(train_config(shards, train={"positives_only": positives_only, "batch_size": 16}),
                    Shards.open(shards), Place())
    batches = [batch for batch, _ in loop._prefetched(run, run.reader("train"), 0, 0, rank=0)]
    log = run.shards.table("requests/train").select(["request_id", "click"]).to_pylist()
    expected = {row["request_id"] for row in log if not positives_only or max(row["click"]) > 0.5}
    assert sorted(str(one) for batch in batches for one in batch.request_ids) == sorted(expected)
    assert len(batches) == 10
    assert (len(expected) < 150) == positives_only


# ---------------------------------------------------------------- stages that end
def trained_by_epoch(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, dict[str, Tensor]]]:
    """Every stage's state at first and after each epoch."""
    def seen() -> dict[str, dict[str, Tensor]]:
        return {name: {k: v.clone() for k, v in run.cascade.stage_state(name).items()} for name in run.cascade.names}

    states = [seen()]

    def told(run: Run) -> float:
        states.append(seen())
        return 0.0

    monkeypatch.setattr(loop, "validation_loss", told)
    trained(run.config, run=run)
    return states


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("epochs", [
    {"pre_ranker": 1, "ranker": 1}, {"pre_ranker": 1}, {"pre_ranker": 1, "ranker": 2}, {"retriever": 1}], ids=str)
def test_after_its_epochs_nothing_of_a_stage_changes_and_the_others_go_on(
    shards: str, epochs: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    run = Run.build(config_of(shards, epochs), Shards.open(shards), Place())
    states = trained_by_epoch(run, monkeypatch)
    assert len(states) == 4
    for name in run.cascade.names:
        assert "prior_scale" in states[0][name] or name == "retriever"
        for epoch in range(3):
            stays = equal(states[epoch][name], states[epoch + 1][name])
            assert stays == (epoch >= epochs.get(name, 3)), (name, epoch)


def test_a_stage_that_has_ended_stays_even_where_other_workers_make_its_gradients_zeros(
    shards: str, monkeypatch: pytest.MonkeyPatch
):
    def zeros(tables: list[Tensor], dense: list[Tensor]) -> None:
        for parameter in dense:  # as the mean over several workers does
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    monkeypatch.setattr(optimisers, "average_gradients", zeros)
    run = Run.build(config_of(shards, {"pre_ranker": 1, "ranker": 1}), Shards.open(shards), Place())
    states = trained_by_epoch(run, monkeypatch)
    for name in ("pre_ranker", "ranker"):
        assert equal(states[1][name], states[3][name])
        assert not equal(states[0][name], states[1][name])
    assert not equal(states[1]["retriever"], states[3]["retriever"])


def test_later_stages_still_train_on_retrieved_lists_when_the_retriever_has_ended(
    shards: str, monkeypatch: pytest.MonkeyPatch
):
    widths: list[int] = []

    def spied(*args: Any, **options: Any) -> Any:
        batch, scores_QC = with_retrieved(*args, **options)
        widths.append(batch.mask_QC.shape[1])
        return batch, scores_QC

    with_retrieved = objective.with_retrieved
    monkeypatch.setattr(objective, "with_retrieved", spied)
    monkeypatch.setattr(loop, "validation_loss", lambda run: 0.0)
    _, progress = trained(config_of(shards, {"retriever": 1}, epochs=2))
    assert progress.total_steps == len(widths) == 10
    assert min(widths) > 4
    curve = {step for step, _ in progress.curves["softmax/retriever"]}
    assert curve == set(range(5))  # its loss is no longer part of the total
    assert len(progress.curves["softmax/ranker"]) == 10


def test_a_run_resumed_around_the_end_of_a_stage_ends_with_the_same_bits(shards: str, tmp_path: Path):
    config = config_of(shards, {"pre_ranker": 1, "ranker": 1}, epochs=2, checkpoint_steps=1, final_lr=0.1,
                       warmup_steps=2)
    run = Run.build(config, Shards.open(shards), Place())
    kept = {4, 5, 6}  # an epoch has five steps

    def keep(progress: Progress, steps: int, save: Save | None) -> None:
        if save is not None and progress.total_steps in kept:
            folder = tmp_path / f"{progress.total_steps}"
            folder.mkdir()
            save(str(folder))

    end = fit(run, Progress(), keep)
    assert end.total_steps == 10
    for step in kept:
        again = Run.build(config, run.shards, Place())
        with torch.no_grad():
            for parameter in again.cascade.parameters():
                parameter.add_(1.0)  # whatever is not restored shows
        progress = checkpoint.load(str(tmp_path / str(step)), again.cascade, again.objective, again.optimisers)
        assert progress.total_steps == step
        _, progress = trained(config, run=again, progress=progress)
        assert equal(dict(run.cascade.state_dict()), dict(again.cascade.state_dict())), step
        assert progress.best_valid == end.best_valid


# ---------------------------------------------------------------- what cannot be
def test_stages_that_share_a_loss_must_end_together(shards: str):
    stages = [{**stage, "epochs": 1 if stage["name"] == "ranker" else None} for stage in STAGES]
    with pytest.raises(ConfigError, match="one loss trains them together, so they need the same `epochs`"):
        Run.build(train_config(shards, stages=stages, train={"epochs": 2}), Shards.open(shards), Place())
    Run.build(train_config(shards, stages=stages, train={"epochs": 1}), Shards.open(shards), Place())


def test_epochs_in_which_nothing_trains_are_refused(shards: str):
    epochs = {"retriever": 2, "pre_ranker": 1, "ranker": 1}
    with pytest.raises(ConfigError, match=r"train\.epochs 3: every stage ends after 2 at most; lower it"):
        Run.build(config_of(shards, epochs), Shards.open(shards), Place())
    assert np.isfinite(trained(config_of(shards, epochs, epochs=2))[1].best_valid or np.nan)



def test_a_stage_with_a_rate_of_its_own_follows_the_same_schedule(shards: str):
    config = config_of(shards, {})
    slower = config.stages[1].model_copy(update={"lr": config.train.lr / 4})
    config = config.model_copy(update={"stages": (config.stages[0], slower, config.stages[2])})
    first, second, third = lr_scales(config, 10_000, 0.5).values()
    assert second == pytest.approx(first / 4)
    assert third == first
