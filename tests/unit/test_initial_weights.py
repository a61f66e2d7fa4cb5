"""Stages that start with the towers of a bundle: the same figures at first, and never over other values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade import storage
from raycascade.batch import Targets, collate
from raycascade.bundle import Bundle, load_bundle, save_bundle
from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import BundleError, ConfigError
from raycascade.evaluation import Evaluator
from raycascade.shards import Shards
from raycascade.training.initial_weights import take_initial_weights
from raycascade.training.loop import Place, Run
from tests.early_stages import CHANGING, SMALL
from tests.tiny_shards import train_config, trained, weights, write_shards

TOWERS = {"dim": 4, "hidden": [8], "vector_dim": 6}


def stages(model: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    first = {"name": "retriever", "keep": 40, "exclude": ["pair"], "model": {"name": "two_tower", **TOWERS}}
    return [first, {"name": "pre_ranker", "keep": 15, "exclude": ["pair", *CHANGING], "model": model,
                    "item_cache": None, **options}]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("initial") / "shards"))


def config_of(shards: str, model: dict[str, Any], **options: Any) -> Config:
    return train_config(shards, stages=stages(model, **options),
                        loss={"name": "bce", "label": "click", "entry_levels": [0, 0]})


def saved(uri: Path, run: Run) -> str:
    held = run.shards
    return save_bundle(str(uri), config=run.config, cascade=run.cascade, items=held.items,
                       encoded_items=held.table("items"), users=held.table("users"), metrics={})


@pytest.fixture(scope="module")
def source(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained bundle with two_towers, the second one with a prior scale among its weights."""
    run, _ = trained(config_of(shards, {"name": "two_tower", **TOWERS}, prior=True))
    return saved(tmp_path_factory.mktemp("source") / "two-towers", run)


def measured(bundle: Bundle, shards: Shards) -> dict[str, float]:
    evaluator = Evaluator(bundle)
    evaluator.update(shards.table("requests/test"))
    return evaluator.measured.metrics()


def test_a_gesr_that_starts_with_a_two_tower_and_no_share_of_its_parts_has_all_of_its_metrics(
    shards: str, source: str, tmp_path: Path
):
    before = load_bundle(source)
    run = Run.build(config_of(shards, {"name": "gesr", **SMALL}, prior=True, init_from=f"{source}/pre_ranker"),
                    Shards.open(shards), Place())
    run.cascade.models["retriever"].load_state_dict(before.cascade.models["retriever"].state_dict())
    run.cascade.prior_scales["pre_ranker"].data.copy_(before.cascade.prior_scales["pre_ranker"].data)
    model: Any = run.cascade.models["pre_ranker"]
    expected = measured(before, run.shards)
    with torch.no_grad():
        for parameter in model.gated.heads.parameters():  # silent at first, as those of any stage with a prior
            parameter.copy_(torch.randn_like(parameter))
    assert measured(load_bundle(saved(tmp_path / "shared", run)), run.shards) != expected
    torch.nn.init.zeros_(model.gated.shares)
    assert measured(load_bundle(saved(tmp_path / "gesr", run)), run.shards) == expected
    assert len(expected) > 5


def test_the_weights_that_it_starts_with_are_those_of_the_bundle_and_train(shards: str, source: str):
    config = config_of(shards, {"name": "gesr", **SMALL}, init_from=f"{source}/pre_ranker")
    run = Run.build(config, Shards.open(shards), Place())
    given = load_bundle(source).cascade.models["pre_ranker"].state_dict()
    own = weights(run)
    assert all(torch.equal(own[f"models.pre_ranker.tower.{name}"], value) for name, value in given.items())
    plain = weights(Run.build(config_of(shards, {"name": "gesr", **SMALL}), Shards.open(shards), Place()))
    scale = "models.pre_ranker.tower.log_scale"
    assert not torch.equal(plain[scale], own[scale])
    trained(config, run=run)
    assert not torch.equal(weights(run)[scale], own[scale])


def test_what_cannot_be_taken_is_named(shards: str, source: str):
    gesr = {"name": "gesr", **SMALL}
    for model, place, words in (
        ({"name": "mlp"}, f"{source}/pre_ranker", "stage 'pre_ranker': init_from: mlp has no towers"),
        (gesr, f"{source}/ranker", "has no stage 'ranker', only retriever, pre_ranker"),
        ({**gesr, "vector_dim": 7}, f"{source}/pre_ranker", "the towers differ in"),
        (gesr, f"{source}/retriever", "the towers differ in"),
    ):
        with pytest.raises(ConfigError, match=words):
            Run.build(config_of(shards, model, init_from=place), Shards.open(shards), Place())
    with pytest.raises(BundleError, match="no finished bundle"):
        Run.build(config_of(shards, gesr, init_from="nowhere/pre_ranker"), Shards.open(shards), Place())


def test_towers_over_other_values_are_refused(shards: str, source: str):
    held = Shards.open(shards).state
    config = config_of(shards, {"name": "gesr", **SMALL}, init_from=f"{source}/pre_ranker")
    cascade = Cascade(config, held.space)
    author = held.vocabularies["author"]
    swapped = replace(author, values=author.values.take(pa.array(np.arange(len(author.values))[::-1])))
    stats = held.dense["length"].model_copy(update={"mean": 3.0})
    for state, name in ((replace(held, vocabularies={**held.vocabularies, "author": swapped}), "author"),
                        (replace(held, dense={**held.dense, "length": stats}), "length")):
        with pytest.raises(ConfigError, match=f"other values of '{name}'"):
            take_initial_weights(config, cascade, state)
    take_initial_weights(config, cascade, held)


def test_a_place_is_good_in_any_folder(shards: str):
    config = config_of(shards, {"name": "gesr", **SMALL}, init_from="some/bundle/stage")
    assert config.stages[1].init_from == storage.absolute("some/bundle/stage")


# ---------------------------------------------------------------- tasks
def test_the_tasks_of_a_stage_are_the_labels_of_its_first_logits(shards: str):
    held = Shards.open(shards)
    space = held.state.space.model_copy(update={"labels": ("click", "like", "share")})
    chosen = config_of(shards, {"name": "gesr", **SMALL, "primary_weight": 1.0}, tasks=["share", "like"],
                       fusion={"product": {"like": 1.0}}, loss={"name": "bce"})
    model: Any = Cascade(chosen, space).models["pre_ranker"]
    batch = collate(held.table("requests/test"), held.items)
    draw = torch.Generator().manual_seed(0)
    labels = {name: torch.rand(batch.mask_QC.shape, generator=draw).round() for name in space.labels}
    targets = batch.targets
    assert isinstance(targets, Targets)

    def primary(labels: dict[str, torch.Tensor]) -> float:
        return model.train_outputs(replace(batch, targets=replace(targets, labels=labels)))[1]["primary"].item()

    logits = model.primary(model.encode_request(batch), model.encode_items(batch.item, batch.mask_QC.shape))
    mask_QC, loss = batch.mask_QC, torch.nn.functional.binary_cross_entropy_with_logits
    expected = sum(loss(logits[..., task][mask_QC], labels[name][mask_QC]).item()
                   for task, name in enumerate(("share", "like")))
    assert primary(labels) == pytest.approx(expected, rel=1e-5)
    assert primary({**labels, "click": 1 - labels["click"]}) == primary(labels)
