"""A cascade with a ranker of trees through its life: fitted and trained on Ray, evaluated, loaded, scored in batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raycascade.batch import collate
from raycascade.bundle import Bundle, load_bundle
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.flows import train as flow
from raycascade.flows.evaluate import evaluate
from raycascade.flows.train import train
from raycascade.shards import Shards
from raycascade.training.gbdt import fit_stages
from raycascade.training.loop import Place, Run
from tests.tiny_shards import STAGES, train_config, write_shards

pytestmark = pytest.mark.ray

TREES = {"name": "ranker", "keep": 5, "model": {"name": "gbdt", "rounds": 6, "depth": 3, "label": "click"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trees")
    write_shards(str(folder / "shards"))
    return folder


def config_of(folder: Path, run: str, *, model: dict[str, Any] | None = None, **options: Any) -> Config:
    stage = {**TREES, "model": {**TREES["model"], **(model or {})}}
    return train_config(str(folder / "shards"), stages=[*STAGES[:2], stage], train={"run": run, **options},
                        bundles=str(folder / "bundles"))


@pytest.fixture(scope="module")
def uri(ray_cluster: None, folder: Path) -> str:
    """The bundle of a run on one worker."""
    return train(config_of(folder, "one"))["bundle"]


def scores_of(bundle: Bundle, shards: Shards) -> torch.Tensor:
    """What the trees say of the lists of the test split, padding left out."""
    batch = collate(shards.table("requests/test"), bundle.items)
    return bundle.cascade.model("ranker")(batch)[batch.mask_QC]


def test_trees_fitted_on_ray_score_as_those_fitted_in_the_process(uri: str, folder: Path):
    config, shards = config_of(folder, "here"), Shards.open(str(folder / "shards"))
    run = Run.build(config, shards, Place())
    fit_stages(config, shards, run.cascade, threads=1)
    batch = collate(shards.table("requests/test"), shards.items)
    expected = run.cascade.model("ranker")(batch)[batch.mask_QC]
    assert expected.std() > 0.01
    torch.testing.assert_close(scores_of(load_bundle(uri), shards), expected, atol=1e-4, rtol=0)


def test_evaluation_measures_and_explains_the_trees(uri: str):
    found = evaluate(uri)
    assert 0 < found["metrics"]["auc"] < 1
    assert found["metrics"]["logloss"] > 0
    page = Path(found["report"]).read_text()
    assert "Feature importance" in page
    model: Any = load_bundle(uri).cascade.model("ranker")
    used = [c.name for c, shap in zip(model.columns.columns, model.importance[0].shap_F, strict=True) if shap]
    assert used
    assert all(f"<th scope='row'>{name}</th>" in page for name in used)


def test_the_last_stage_of_every_answer_is_ordered_by_the_trees(uri: str):
    bundle = load_bundle(uri)
    users = bundle.users.table
    final = bundle.recommend(users).final
    rows_QC, mask_QC = (torch.from_numpy(kept.copy()) for kept in final.kept())
    assert mask_QC.all()
    again = bundle.cascade.score("ranker", bundle.batch(users).with_candidates(rows_QC, mask_QC, bundle.items))
    torch.testing.assert_close(torch.from_numpy(final.scores_QC[:, :5].copy()), again)
    assert (again.diff(dim=1) <= 0).all()


@pytest.mark.slow
def test_two_workers_fit_nearly_the_trees_of_one(ray_cluster: None, folder: Path):
    """Each reads half of the rows, and the histograms of both are added up; the borders of their bins may differ."""
    model = {"subsample": 1.0, "colsample": 1.0}
    config = config_of(folder, "two", model=model, workers=2, batch_size=2, max_steps=2)
    shards = Shards.open(str(folder / "shards"))
    two = scores_of(load_bundle(train(config)["bundle"]), shards)
    run = Run.build(config, shards, Place())
    fit_stages(config, shards, run.cascade, threads=1)
    batch = collate(shards.table("requests/test"), shards.items)
    one = run.cascade.model("ranker")(batch)[batch.mask_QC]
    assert torch.corrcoef(torch.cat([one, two], 1).T)[0, 1] > 0.9


def test_what_a_user_has_to_mend_is_said(ray_cluster: None, folder: Path):
    with pytest.raises(ConfigError, match="'the truth' is known for no candidate"):
        train(config_of(folder, "refused", model={"label": None, "entry_level": 9}))


class Stopped(Exception):
    """In place of a death behind the trees."""


def test_a_run_that_goes_on_does_not_fit_its_trees_again(uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(config: Config, cascade: object, *, fitted: str) -> None:
        raise Stopped(fitted)

    monkeypatch.setattr(flow, "_fit_on_ray", interrupt)
    seen = []
    for _ in range(2):
        with pytest.raises(Stopped) as caught:
            train(config_of(folder, "halves"))
        trees = Path(str(caught.value), "ranker", "model.ubj")
        seen.append((trees.read_bytes(), trees.stat().st_mtime_ns))
    assert seen[0] == seen[1]
