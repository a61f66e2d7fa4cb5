"""Stages of trees beside stages that learn: refused options, frozen scores, workers, evaluation, bundles."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raycascade.batch import Batch, collate
from raycascade.bundle import load_bundle, save_bundle, write_manifest
from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import BundleError, ConfigError
from raycascade.evaluation import Evaluator
from raycascade.items import ItemTable
from raycascade.models._tree_columns import TreeColumns
from raycascade.reporting import _importance
from raycascade.schema import FeatureSchema
from raycascade.shards import Shards
from raycascade.training import checkpoint
from raycascade.training.checkpoint import Progress
from raycascade.training.gbdt import fit_stages, load_fitted, read_rows, save_fitted
from raycascade.training.loop import Place, Run
from raycascade.trial import run_once, run_stream
from tests.f3 import close
from tests.tiny_shards import STAGES, same, train_config, trained, weights, write_shards
from tests.tiny_world import fitted, raw_items, raw_requests

TREES = {"name": "ranker", "keep": 5, "model": {"name": "gbdt", "rounds": 8, "depth": 3, "label": "click"}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


def config_of(shards: str, **options: Any) -> Config:
    return train_config(shards, stages=[*STAGES[:2], TREES], **options)


def built(config: Config) -> Run:
    """A run whose trees are fitted."""
    run = Run.build(config, Shards.open(config.paths.shards), Place())
    fit_stages(config, run.shards, run.cascade, threads=1)
    return run


def collated(run: Run) -> Batch:
    return collate(run.shards.table("requests/test"), run.shards.items, keep=run.cascade.quotas, k=2)


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize(("position", "changes", "message"), [
    (0, {"exclude": []}, "no item vectors to search a catalogue by; put a model such as two_tower first"),
    (2, {"prior": True}, "no score yet to add to; leave prior out"),
    (2, {"epochs": 1}, "epochs: gbdt is fitted by its own objective"),
    (2, {"lr": 0.1}, "lr: gbdt is fitted by its own objective"),
    (2, {"loss": {"name": "bce"}}, "loss: gbdt is fitted by its own objective"),
])
def test_stage_options_of_models_that_learn_are_refused(
    shards: str, position: int, changes: dict[str, Any], message: str
):
    stages = [dict(stage) for stage in STAGES]
    stages[position] |= {"model": TREES["model"], **changes}
    with pytest.raises(ConfigError, match=message):
        Cascade(train_config(shards, stages=stages), Shards.open(shards).state.space)


# ---------------------------------------------------------------- beside stages that learn
def test_trees_have_no_parameters_and_stand_still_while_the_others_learn(shards: str):
    run = built(config_of(shards))
    before, first = run.cascade.fitted["ranker"].to_files(), weights(run)
    assert not any(name.startswith("models.ranker") for name in run.cascade.state_dict())
    _, progress = trained(run.config, run=run)
    assert progress.finished
    assert run.cascade.fitted["ranker"].to_files() == before
    assert not same(weights(run), first)


def test_a_joint_loss_sees_scores_that_no_training_moves(shards: str):
    """The part of the trees is the same on the same batches before and after a training."""
    run = built(config_of(shards))
    losses = []
    for _ in range(2):
        _, progress = trained(config_of(shards), run=run, progress=Progress())
        losses.append(dict(progress.curves["bce/ranker"]))
    assert losses[0] == losses[1]
    assert len(set(losses[0].values())) > 1


def test_a_stage_behind_trees_can_refine_their_score(shards: str):
    stages = [STAGES[0], {**TREES, "name": "pre_ranker", "keep": 15}, {**STAGES[2], "prior": True}]
    run = built(train_config(shards, stages=stages))
    batch = collated(run)
    found = run.cascade.eval()(batch)
    torch.testing.assert_close(found["ranker"][batch.mask_QC], found["pre_ranker"][batch.mask_QC])


def test_where_only_trees_are_left_to_a_joint_loss_there_is_none(shards: str):
    own = [{**stage, "loss": {"name": "bce", "label": "click"}} for stage in STAGES[:2]]
    run = built(train_config(shards, stages=[*own, TREES]))
    assert [term.names for term in run.objective.terms] == [("retriever",), ("pre_ranker",)]
    trained(run.config, run=run)


def test_a_checkpoint_goes_on_beside_trees(shards: str, tmp_path: Path):
    run = built(config_of(shards))
    checkpoint.save(str(tmp_path), run.cascade, run.objective, run.optimisers, Progress())
    other = built(config_of(shards, train={"seed": 9}))
    checkpoint.load(str(tmp_path), other.cascade, other.objective, other.optimisers)
    assert same(weights(run), weights(other))


def test_the_rows_are_those_of_the_log_with_their_labels(shards: str):
    run = built(config_of(shards))
    model: Any = run.cascade.fitted["ranker"]
    rows = read_rows(run.config, run.shards, run.cascade.stages["ranker"], model)
    lists = run.shards.table("requests/train")
    assert len(rows.request_R) == sum(len(row) for row in lists["candidates"].to_pylist())
    assert rows.labels_RT[:, 0].tolist() == [label for row in lists["click"].to_pylist() for label in row]
    assert len(np.unique(rows.request_R)) == len(lists)
    assert (np.diff(rows.request_R) >= 0).all()


def test_two_workers_read_all_rows_once_but_for_what_does_not_fill_a_batch(shards: str):
    run = built(config_of(shards, train={"batch_size": 2}))
    model: Any = run.cascade.fitted["ranker"]
    stage = run.cascade.stages["ranker"]
    whole = read_rows(run.config, run.shards, stage, model).columns_RF
    parts = np.concatenate([read_rows(run.config, run.shards, stage, model, place=Place(rank, 2)).columns_RF
                            for rank in range(2)])
    seen, all_rows = (sorted(map(bytes, np.nan_to_num(rows, nan=-99.0))) for rows in (parts, whole))
    assert len(all_rows) * 0.9 < len(seen) <= len(all_rows)
    assert set(seen) <= set(all_rows)


def test_events_can_carry_the_vector_of_their_item_and_the_cosine_is_with_their_mean():
    declared = fitted().schema.model_dump()
    history = next(feature for feature in declared["features"] if feature["kind"] == "history")
    history["fields"] = ["author", "content"]
    state = replace(fitted(), schema=FeatureSchema.model_validate(declared))
    items = ItemTable.from_encoded(state.encode_items(raw_items(), where="tiny"), state)
    batch = collate(state.encode_requests(raw_requests().slice(3, 5), where="tiny"), items)
    columns = TreeColumns(state.space, max_categories=256)
    place = [column.name for column in columns.columns].index("history.content.cosine")
    seen = columns.table(batch)[:, place].reshape(batch.mask_QC.shape)
    content = items.static["content"]
    for request in range(batch.num_requests):
        events = batch.history_rows_QL[request][batch.history_mask_QL[request]].numpy()
        for candidate, row in enumerate(batch.candidates_QC[request].tolist()):
            mean = content[events].mean(0) if len(events) else np.zeros(4)
            norms = np.linalg.norm(mean) * np.linalg.norm(content[row])
            expected = content[row] @ mean / norms if norms else np.nan
            assert seen[request, candidate] == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_every_task_has_trees_of_its_own_and_the_fusion_scores(shards: str):
    stage = {**TREES, "model": {**TREES["model"], "label": None}, "tasks": ["click"], "fusion": {"sum": {"click": 2.0}}}
    run = built(train_config(shards, stages=[*STAGES[:2], stage]))
    batch = collated(run)
    logits = run.cascade.logits(batch)["ranker"]
    close(run.cascade.scores_from(run.cascade.logits(batch))["ranker"], 2 * torch.sigmoid(logits[..., 0]))


def test_a_label_of_one_class_is_refused(shards: str):
    stage = {**TREES, "model": {**TREES["model"], "label": None, "entry_level": 9}}
    with pytest.raises(ConfigError, match=r"stage 'ranker': gbdt: 'the truth' is known for no candidate"):
        built(train_config(shards, stages=[*STAGES[:2], stage]))


def test_fitted_stages_of_an_interrupted_run_are_found_again(shards: str, tmp_path: Path):
    run = built(config_of(shards))
    save_fitted(str(tmp_path), run.cascade, "ranker")
    other = Run.build(config_of(shards), run.shards, Place())
    assert load_fitted(str(tmp_path / "elsewhere"), other.cascade) == ["ranker"]
    assert load_fitted(str(tmp_path), other.cascade) == []
    batch = collated(run)
    assert torch.equal(other.cascade.model("ranker")(batch), run.cascade.model("ranker")(batch))


def test_a_run_of_a_comparison_fits_the_trees_and_a_stream_refuses_them(shards: str):
    opened, config = Shards.open(shards), config_of(shards, train={"max_steps": 1})
    found = run_once(config, opened, Place(), groups=opened.groups("test"))
    assert 0 < found["metrics"]["ndcg@2/ranker"] < 1
    with pytest.raises(ConfigError, match="--streaming: ranker: trees are fitted at once"):
        run_stream(config, opened, Place())


# ---------------------------------------------------------------- the bundle
@pytest.fixture(scope="module")
def bundle(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = built(config_of(shards))
    return save_bundle(str(tmp_path_factory.mktemp("bundles") / "trees"), config=run.config, cascade=run.cascade,
                       items=run.shards.items, encoded_items=run.shards.table("items"),
                       users=run.shards.table("users"), metrics={"train": {}, "curves": {}})


def test_a_bundle_holds_the_trees_and_recommends_as_the_run_does(bundle: str, shards: str):
    loaded, run = load_bundle(bundle), built(config_of(shards))
    files = [name for name in loaded.manifest["files"] if name.startswith("stages/ranker/")]
    assert files == ["stages/ranker/columns.json", "stages/ranker/model.ubj"]
    batch = collated(run)
    assert torch.equal(loaded.cascade.model("ranker")(batch), run.cascade.model("ranker")(batch))
    ranking = loaded.recommend(loaded.users.table)
    assert ranking.final.kept()[1].all()
    (columns,) = _importance(loaded).values()
    assert columns
    assert [column.shap for column in columns] == sorted((column.shap for column in columns), reverse=True)


@pytest.mark.parametrize("objective", ["binary:logistic", "rank:ndcg"])
def test_only_a_margin_that_is_a_logit_has_a_logloss(shards: str, tmp_path: Path, objective: str):
    stage = {**TREES, "model": {**TREES["model"], "objective": objective}}
    run = built(train_config(shards, stages=[*STAGES[:2], stage]))
    uri = save_bundle(str(tmp_path / "b"), config=run.config, cascade=run.cascade, items=run.shards.items,
                      encoded_items=run.shards.table("items"), users=run.shards.table("users"), metrics={})
    evaluator = Evaluator(load_bundle(uri))
    evaluator.update(run.shards.table("requests/test"))
    metrics = evaluator.measured.metrics()
    assert "auc" in metrics
    assert ("logloss" in metrics) == (objective == "binary:logistic")


def test_a_bundle_whose_config_was_changed_says_so(bundle: str, tmp_path: Path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("name: gbdt", "name: gbdt\n    max_categories: 1"))
    write_manifest(str(copy), fingerprint=json.loads((copy / "manifest.json").read_text())["fingerprint"])
    with pytest.raises(BundleError, match=r"stages/ranker: they do not fit the config .*; train again"):
        load_bundle(str(copy))
