"""A cascade with a ranker that is served in int8: trained with real workers, guarded, recorded, and scored alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from raycascade.bundle import load_bundle
from raycascade.config import Config
from raycascade.errors import ExpectationError
from raycascade.flows.evaluate import evaluate
from raycascade.flows.train import train
from raycascade.linears import Int8Linear
from raycascade.serving.stages import StageServer
from tests.tiny_shards import STAGES, train_config, write_shards
from tests.tiny_world import encoded_users

pytestmark = pytest.mark.ray

RANKER = {"name": "ranker", "keep": 5, "model": {"name": "mlp", "dim": 4, "hidden": [128, 32]}, "precision": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    write_shards(str(folder / "shards"))
    return folder


def config_of(folder: Path, run: str, guard: dict[str, Any], **options: Any) -> Config:
    return train_config(str(folder / "shards"), stages=[*STAGES[:2], {**RANKER, **options}],
                        train={"run": run, "max_steps": 12}, bundles=str(folder / "bundles"), changes={"guard": guard})


@pytest.fixture(scope="module")
def uri(ray_cluster: None, folder: Path) -> str:
    return train(config_of(folder, "int8", {"max_auc_change": 0.05, "min_overlap": 0.5}))["bundle"]


def test_the_bundle_keeps_what_the_variant_costs_and_the_report_shows_it(uri: str):
    kept = json.loads(Path(uri, "metrics.json").read_text())["guard"]
    assert kept["limits"] == {"max_auc_change": 0.05, "min_overlap": 0.5, "requests": 2048}
    (name, found), = kept["stages"].items()
    assert (name, found["precision"], found["requests"], found["non_finite"]) == ("ranker", "int8", 25, 0)
    assert 0.5 <= found["overlap"] <= 1.0
    assert abs(found["auc_change"]) <= 0.05
    assert "<h2>As served</h2>" in Path(evaluate(uri)["report"]).read_text()


def test_batch_scoring_and_serving_use_the_same_variant_of_float32_weights(uri: str):
    bundle, trained = load_bundle(uri), load_bundle(uri, served=())
    model, users = bundle.cascade.models["ranker"], encoded_users(bundle.state)
    assert [type(module) for module in model.modules() if isinstance(module, Int8Linear)]
    final = bundle.recommend(users).final
    survivors = None
    for name in bundle.cascade.names:
        survivors = StageServer(uri, name).run(bundle.batch(users), survivors)
    assert survivors is not None
    assert (survivors.rows_QK == final.kept()[0]).all()
    assert (survivors.scores_QK == final.scores_QC[:, :5]).all()
    assert (trained.recommend(users).final.scores_QC != final.scores_QC).any()


@pytest.mark.slow
def test_beyond_the_limits_nothing_is_published_and_the_run_goes_on_in_float32(ray_cluster: None, folder: Path):
    before = json.loads(Path(folder, "bundles", "latest.json").read_text()) if (folder / "bundles").exists() else None
    with pytest.raises(ExpectationError, match=r"stage 'ranker' as served \(int8\) differs from fp32") as caught:
        train(config_of(folder, "refused", {"max_auc_change": 0.0, "min_overlap": 1.0}))
    assert "\n" not in str(caught.value)
    assert not (folder / "bundles" / "refused").exists()
    if before is not None:
        assert json.loads(Path(folder, "bundles", "latest.json").read_text()) == before
    rescued = train(config_of(folder, "refused", {}, precision="fp32"))
    assert rescued["rows"] > 0
    assert "guard" not in json.loads(Path(rescued["bundle"], "metrics.json").read_text())
