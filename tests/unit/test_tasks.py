"""Stages with several tasks: loss and fusion by hand, what a config may say, and the way to a bundle's metrics."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from raycascade import plugins, storage
from raycascade.batch import Targets, collate
from raycascade.bundle import Bundle, load_bundle, save_bundle
from raycascade.cascade import Cascade
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.evaluation import Evaluator
from raycascade.fitting import FitPart
from raycascade.reporting import describe
from raycascade.schema import FeatureSchema
from raycascade.shards import Shards, publish, write_part
from raycascade.training.loop import Place, Run
from tests.f3 import close
from tests.tiny_shards import STAGES, train_config, trained
from tests.tiny_world import DAY_MS, SCHEMA, START_MS, encoded_users, raw_items, raw_requests

LABELS = ("click", "like", "share")  # nobody ever shares
PRODUCT = {"product": {"click": 1.0, "like": 0.5}}
TASKS: dict[str, Any] = {"tasks": ["click", "like"], "loss": {"name": "bce", "task_weights": {"like": 2.0}},
                         "fusion": PRODUCT}


# ---------------------------------------------------------------- a log with three labels
def write_labelled_shards(root: str) -> str:
    """The hand-made log with likes, which are observed for clicked candidates only."""
    schema = FeatureSchema.model_validate({**SCHEMA.model_dump(), "labels": LABELS})
    raw, draw = raw_requests(), np.random.default_rng(5)
    likes = [[int(draw.integers(0, 2)) if click else None for click in row] for row in raw["click"].to_pylist()]
    kind = pa.list_(pa.int64())
    raw = raw.append_column("like", pa.array(likes, kind))
    raw = raw.append_column("share", pa.array([[0] * len(row) for row in likes], kind))
    part = FitPart(schema)
    part.add_requests(raw, where="labelled")
    part.add_items(raw_items(), where="labelled")
    state = part.finish(raw_items(), as_of_ms=START_MS + 7 * DAY_MS)
    folder = storage.join(root, "v-1")
    state.save(storage.join(folder, "features"))
    tables = {"requests/train": state.encode_requests(raw.slice(0, 160), where="labelled"),
              "requests/test": state.encode_requests(raw.slice(160), where="labelled"),
              "items": state.encode_items(raw_items(), where="labelled"), "users": encoded_users(state)}
    for name, table in tables.items():
        write_part(storage.join(folder, name, "part-00000.parquet"), iter([table]))
    publish(root, "v-1", {"requests": {"train": 160, "test": 40}, "fingerprint": state.schema.fingerprint()})
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled_shards(str(tmp_path_factory.mktemp("shards") / "s"))


def with_tasks(shards: str, *, model: str = "mmoe", stage: dict[str, Any] | None = None) -> Config:
    """Three stages, the last of them with tasks."""
    last = {**STAGES[-1], "model": {"name": model, "dim": 4}, **TASKS, **(stage or {})}
    return train_config(shards, stages=[*STAGES[:2], last], loss={"name": "bce", "label": "click"},
                        train={"epochs": 2})


# ---------------------------------------------------------------- the loss
def targets_of(labels: dict[str, Tensor], *, mask_QC: Tensor | None = None) -> Targets:
    some = next(iter(labels.values()))
    mask_QC = torch.ones(some.shape, dtype=torch.bool) if mask_QC is None else mask_QC
    return Targets(relevance_QC=torch.zeros(some.shape), reached_QC=torch.zeros(some.shape, dtype=torch.long),
                   mask_QC=mask_QC, keep=(1,), k=1, labels=labels)


def bce(**options: Any) -> Any:
    cls, config = plugins.options("losses", {"name": "bce", **options}, "loss")
    return cls(config, ("ranker",))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_the_loss_over_tasks_equals_the_hand_computed_one(shape: tuple[int, int]):
    """Rows are candidates: as two requests of one, or as one request of two."""
    logits_QCT = torch.tensor([[0.2, -0.4], [1.0, 0.5]]).view(*shape, 2)
    targets = targets_of({"click": torch.tensor([1.0, 0.0]).view(shape),
                          "like": torch.tensor([0.0, torch.nan]).view(shape)})
    output = bce().over_tasks(logits_QCT, ("click", "like"), targets)
    close(output.parts["bce/ranker/click"], 0.955700)
    close(output.parts["bce/ranker/like"], 0.513015)
    close(output.total, 0.955700 + 0.513015)
    weighted = bce(task_weights={"like": 3.0}).over_tasks(logits_QCT, ("click", "like"), targets)
    close(weighted.total, 0.955700 + 3 * 0.513015, atol=1e-5)


def test_unobserved_labels_and_masked_candidates_teach_nothing_and_never_make_a_nan():
    logits_QCT = torch.tensor([[[0.3, torch.inf], [1.2, 0.4], [9.0, 9.0]]]).requires_grad_()
    mask_QC = torch.tensor([[True, True, False]])
    labels = {"click": torch.tensor([[1.0, torch.nan, 1.0]]), "like": torch.full((1, 3), torch.nan)}
    output = bce().over_tasks(logits_QCT, ("click", "like"), targets_of(labels, mask_QC=mask_QC))
    output.total.backward()
    assert logits_QCT.grad is not None
    assert (logits_QCT.grad != 0).tolist() == [[[True, False], [False, False], [False, False]]]
    close(output.parts["bce/ranker/like"], 0.0)


def test_a_stage_learns_from_what_reached_its_level_only():
    targets = replace(targets_of({"click": torch.tensor([[1.0, 0.0]])}), reached_QC=torch.tensor([[0, 2]]))
    logits_QCT = torch.tensor([[[5.0], [1.0]]])
    output = bce(entry_levels=[1]).over_tasks(logits_QCT, ("click",), targets)
    close(output.total, float(torch.nn.functional.softplus(torch.tensor(1.0))))


# ---------------------------------------------------------------- the fusion
@pytest.mark.parametrize(("fusion", "expected"), [
    (PRODUCT, lambda click, like: click * like**0.5), ({"product": {"like": -1.0}}, lambda click, like: 1.0 / like),
    ({"sum": {"click": 1.0, "like": 0.5}}, lambda click, like: click + 0.5 * like)])
def test_a_fused_score_orders_like_the_product_or_sum_of_probabilities(shards: str, fusion: Any, expected: Any):
    cascade = Cascade(with_tasks(shards, stage={"fusion": fusion}), Shards.open(shards).state.space)
    logits_QCT = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(3))
    value_QC = expected(*logits_QCT.sigmoid().unbind(-1))
    score_QC = cascade.fused("ranker", logits_QCT)
    close(score_QC if "sum" in fusion else score_QC.exp(), value_QC)


def test_without_a_fusion_the_score_is_the_only_logit(shards: str):
    stage = {"tasks": ["like"], "fusion": None, "loss": {"name": "bce"}}
    cascade = Cascade(with_tasks(shards, stage=stage), Shards.open(shards).state.space)
    logits_QC1 = torch.randn(3, 4, 1)
    assert torch.equal(cascade.fused("ranker", logits_QC1), logits_QC1[:, :, 0])


# ---------------------------------------------------------------- what a config may say
@pytest.mark.parametrize(("stage", "words"), [
    ({"tasks": ["click", "click"]}, "tasks must differ"),
    ({"fusion": None}, r"add fusion: \{product: \{click: 1.0, like: 1.0\}\}"),
    ({"fusion": {"product": {"clik": 1.0}}}, "'clik' is not a task of the stage; did you mean 'click'"),
    ({"tasks": [], "loss": None}, "'click' is not a task of the stage"),
    ({"fusion": {}}, "either product or sum"),
    ({"fusion": {**PRODUCT, "sum": {"click": 1.0}}}, "either product or sum"),
    ({"fusion": {"sum": {"click": 0.0}}}, "either product or sum"),
    ({"fusion": {"mean": {"click": 1.0}}}, r"fusion\.mean: unknown key"),
    ({"loss": None}, r"a loss of the stage's own, got none; set loss: \{name: bce\}"),
    ({"loss": {"name": "softmax"}}, "a loss of the stage's own, got softmax"),
    ({"loss": {"name": "bce", "label": "click"}}, "leave label out"),
    ({"loss": {"name": "bce", "task_weights": {"lik": 1.0}}}, "'lik' is not a task of the stage; did you mean 'like'"),
    ({"tasks": [], "fusion": None}, "task_weights without tasks"),
    ({"prior": True}, "prior adds to one logit"),
])
def test_a_config_that_makes_no_sense_is_refused_in_one_line(stage: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words) as error:
        with_tasks("nowhere", stage=stage)
    assert "\n" not in str(error.value)


def test_a_task_that_is_no_label_of_the_log_is_refused(shards: str):
    stage = {"tasks": ["click", "likes"], "fusion": {"product": {"likes": 1.0}}, "loss": {"name": "bce"}}
    with pytest.raises(ConfigError, match=r"stages.2 \(ranker\): tasks: 'likes' is not a label.*'like'"):
        Cascade(with_tasks(shards, stage=stage), Shards.open(shards).state.space)


def test_an_index_over_several_tasks_is_refused_and_over_one_is_not(shards: str):
    space = Shards.open(shards).state.space
    single = {"tasks": ["like"], "loss": {"name": "bce"}}
    assert Cascade(train_config(shards, stages=[{**STAGES[0], **single}]), space).retriever is not None
    with pytest.raises(ConfigError, match=r"stages.0 \(retriever\): an index .* single task"):
        Cascade(train_config(shards, stages=[{**STAGES[0], **TASKS}]), space)


@pytest.mark.parametrize("stage", [
    {"tasks": ["click", "share"], "fusion": {"sum": {"click": 1.0}}, "loss": {"name": "bce"}},
    {"tasks": [], "fusion": None, "loss": {"name": "bce", "label": "share"}}])
def test_a_label_of_one_class_is_refused_before_training(shards: str, stage: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"\['ranker'\]: the label 'share' is 0 for every candidate"):
        Run.build(with_tasks(shards, stage=stage), Shards.open(shards), Place())


# ---------------------------------------------------------------- from training to a bundle
@pytest.fixture(scope="module", params=["mmoe", "ple", "shared_bottom", "dien"])
def bundle(request: pytest.FixtureRequest, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Trained as the last of three stages, saved and loaded."""
    opened, config = Shards.open(shards), with_tasks(shards, model=request.param)
    run, progress = trained(config)
    assert {"bce/ranker/click", "bce/ranker/like"} <= set(progress.curves)
    uri = save_bundle(str(tmp_path_factory.mktemp("bundles") / "b"), config=config, cascade=run.cascade.eval(),
                      items=opened.items, encoded_items=opened.table("items"), users=opened.table("users"),
                      metrics={"train": {"rows": 1}, "curves": progress.curves})
    loaded = load_bundle(uri)
    batch = collate(opened.table("requests/test"), opened.items)
    with torch.no_grad():
        for name, scores_QC in run.cascade(batch).items():
            assert torch.equal(loaded.cascade(batch)[name], scores_QC)
    return loaded


def test_a_bundle_keeps_tasks_and_fusion_and_recommends_by_the_fused_score(bundle: Bundle, shards: str):
    stage = bundle.config.stages[-1]
    assert (stage.tasks, stage.fusion and stage.fusion.product) == (("click", "like"), PRODUCT["product"])
    users = Shards.open(shards).table("users").slice(0, 3)
    final, batch = bundle.recommend(users).final, bundle.batch(users)
    rows_QC, mask_QC = (torch.from_numpy(np.ascontiguousarray(x)) for x in final.kept())
    chosen = batch.with_candidates(rows_QC, mask_QC, bundle.items)
    with torch.no_grad():
        click, like = bundle.cascade.logits(chosen)["ranker"].sigmoid().unbind(-1)
    close(torch.from_numpy(np.ascontiguousarray(final.scores_QC[:, :5])).exp(), click * like**0.5, atol=1e-5)


def test_every_task_has_metrics_of_its_own_and_a_fused_score_has_an_order_only(bundle: Bundle, shards: str):
    evaluator = Evaluator(bundle)
    evaluator.update(Shards.open(shards).table("requests/test"))
    metrics = evaluator.measured.metrics()
    figures = ("auc", "gauc", "logloss", "calibration_error")
    assert {f"{figure}/ranker/{task}" for figure in figures for task in ("click", "like")} <= set(metrics)
    assert {"auc", "gauc"} <= set(metrics)
    assert not {"logloss", "calibration_error"} & set(metrics)
    likes = Shards.open(shards).table("requests/test")["like"].to_pylist()
    assert evaluator.measured.tasks["ranker/like"].num_rows == sum(x is not None for row in likes for x in row)
    other = Evaluator(bundle)
    other.update(Shards.open(shards).table("requests/test").slice(0, 15))
    rest = Evaluator(bundle)
    rest.update(Shards.open(shards).table("requests/test").slice(15))
    other.measured.merge(rest.measured)
    assert other.measured.metrics()["auc/ranker/like"] == pytest.approx(metrics["auc/ranker/like"], abs=1e-12)
    assert set(describe(bundle, evaluator.measured, split="test", moment="now").calibration) == {
        "ranker: click", "ranker: like"}


def test_training_moves_every_tasks_prediction_towards_its_label(shards: str):
    _, progress = trained(with_tasks(shards))
    for task in ("click", "like"):
        curve = [value for _, value in progress.curves[f"bce/ranker/{task}"]]
        assert np.mean(curve[-5:]) < np.mean(curve[:5]), task
