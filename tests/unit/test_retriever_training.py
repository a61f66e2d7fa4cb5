"""Whole trainings in which the first stage learns from the catalogue and the later ones from what it retrieves."""

from typing import Any

import numpy as np
import pytest
import torch

from raycascade.batch import collate
from raycascade.errors import ConfigError
from raycascade.shards import Shards
from raycascade.training.loop import Place, Run
from tests.tiny_shards import STAGES, train_config, trained, write_shards

CATALOGUE = {"name": "softmax", "label": "click", "over": "catalogue"}
LIST = {"name": "softmax", "label": "click", "negatives": "unobserved"}
RETRIEVER = {"per_request": 6, "source": "retriever"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


def stages_with(*losses: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [{**stage, "loss": loss, "prior": stage["name"] != "retriever"}
            for stage, loss in zip(STAGES, losses, strict=True)]


def build(shards: str, *losses: dict[str, Any] | None, negatives: dict[str, Any] = RETRIEVER, **train: Any) -> Run:
    config = train_config(shards, stages=stages_with(*losses), train={"negatives": negatives, **train})
    return Run.build(config, Shards.open(shards), Place())


# ---------------------------------------------------------------- what cannot be
@pytest.mark.parametrize("first", [None, LIST, {**LIST, "over": "list"}], ids=str)
def test_retrieved_negatives_need_a_first_stage_that_learns_from_the_catalogue(shards: str, first: Any):
    config = train_config(shards, stages=stages_with(first, LIST, LIST), loss=LIST, train={"negatives": RETRIEVER})
    with pytest.raises(ConfigError, match="the first stage must have a loss of its own over the catalogue"):
        Run.build(config, Shards.open(shards), Place())


@pytest.mark.parametrize("over", ["catalogue", "sampled"])
def test_only_the_first_stage_can_have_a_loss_over_the_catalogue(shards: str, over: str):
    with pytest.raises(ConfigError, match=f"stage 'ranker': loss: over '{over}' is for the first stage"):
        build(shards, CATALOGUE, LIST, {**CATALOGUE, "over": over})
    config = train_config(shards, loss={**CATALOGUE, "over": over})  # one loss of all three
    with pytest.raises(ConfigError, match=f"loss: over '{over}' is for the first stage"):
        Run.build(config, Shards.open(shards), Place())


def test_retrieved_negatives_in_no_number_are_refused(shards: str):
    with pytest.raises(ConfigError, match="per_request is 0, so nothing would be drawn"):
        build(shards, CATALOGUE, LIST, LIST, negatives={"source": "retriever"})


# ---------------------------------------------------------------- what can
def test_three_stages_with_priors_over_retrieved_lists_learn(shards: str):
    run = build(shards, CATALOGUE, LIST, LIST, epochs=5, lr=0.03, positives_only=True, order="time", warmup_steps=5,
                final_lr=0.5)
    _, progress = trained(run.config, run=run)
    assert progress.total_steps == 50
    for name in ("loss", "softmax/retriever", "softmax/pre_ranker", "softmax/ranker"):
        values = [value for _, value in progress.curves[name]]
        assert len(values) == 50
        assert np.isfinite(values).all()
        assert np.mean(values[-10:]) < np.mean(values[:10]) - 0.02, name
    parts = [progress.curves[f"softmax/{name}"] for name in run.cascade.names]
    sums = np.sum([[value for _, value in curve] for curve in parts], axis=0)
    np.testing.assert_allclose([value for _, value in progress.curves["loss"]], sums, rtol=1e-5)
    assert all(scale.item() != 1.0 for scale in run.cascade.prior_scales.values())


def test_a_joint_loss_of_the_later_stages_goes_over_the_retrieved_lists_too(shards: str):
    stages = stages_with({**CATALOGUE, "over": "sampled", "num_sampled": 60}, None, None)
    config = train_config(shards, stages=stages, loss={"name": "bce", "label": "click", "entry_levels": [0, 0]},
                          train={"negatives": RETRIEVER})
    _, progress = trained(config)
    assert {"softmax/retriever", "bce/pre_ranker", "bce/ranker"} <= progress.curves.keys()


def gradients(run: Run, requests: Any) -> tuple[float, dict[str, torch.Tensor]]:
    batch = collate(requests, run.shards.items, keep=(5, 4, 3), k=2)
    run.optimisers.zero()
    total = run.objective(run.cascade.eval(), batch, run.catalogue, np.random.default_rng(1)).total
    total.backward()
    return total.item(), {n: p.grad.to_dense() for n, p in run.cascade.named_parameters() if p.grad is not None}


def test_the_later_stages_teach_the_first_one_nothing(shards: str):
    rows = Shards.open(shards).table("requests/train").slice(0, 40)
    cascade = build(shards, CATALOGUE, LIST, LIST)
    alone = Run.build(train_config(shards, stages=stages_with(CATALOGUE, LIST, LIST)[:1]), cascade.shards, Place())
    alone.cascade.load_stage_state("retriever", cascade.cascade.stage_state("retriever"))
    whole, together = gradients(cascade, rows)
    own, expected = gradients(alone, rows)
    assert whole > own + 0.1
    assert len(expected) > 5
    for name, gradient in expected.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_batch_in_which_nothing_is_retrieved_teaches_the_later_stages_nothing(shards: str):
    """No request of it has a positive, so that no list is left."""
    table = Shards.open(shards).table("requests/train").slice(0, 8)
    clicks = table["click"].combine_chunks()
    quiet = type(clicks).from_arrays(clicks.offsets, np.zeros(len(clicks.flatten()), np.float32))
    table = table.set_column(table.column_names.index("click"), "click", quiet.cast(clicks.type))
    total, found = gradients(build(shards, CATALOGUE, LIST, LIST), table)
    assert total == 0.0
    assert not any(gradient.any() for gradient in found.values())
