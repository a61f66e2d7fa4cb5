"""Semantic ids on Ray: prepared with the log, read by rankers from candidates and history, learned by the verb."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raycascade import cli
from raycascade.batch import collate
from raycascade.bundle import load_bundle
from raycascade.config import Config, load_config, parse_config
from raycascade.errors import BundleError, ConfigError
from raycascade.flows.evaluate import evaluate
from raycascade.flows.index import index
from raycascade.flows.prepare import open_dataset, prepare
from raycascade.flows.score import score
from raycascade.flows.semantic_ids import learned, semantic_ids
from raycascade.flows.train import train
from raycascade.semantic_ids.artefact import ItemContent, SemanticIds
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.shards import Shards

pytestmark = pytest.mark.ray

NAMES = ("retriever", "pre_ranker", "ranker")
CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "semantic_ids.yaml")
IDS = {"content": "content", "tokenizer": {"kind": "pieces", "rows": 120},
       "rqvae": {"levels": 3, "codes": 16, "hidden": [16], "dim": 8, "batch": 64, "steps": 30, "reset_every": 10}}
WORLD = {"name": "simulated", "num_users": 300, "num_items": 400, "num_days": 4, "pool": 120, "funnel": [30, 20, 15],
         "per_level": 5, "shown": 3, "history_len": 10}


def tree_of(folder: Path) -> dict[str, Any]:
    """The example, made small; its pre-ranker adds tokens to ids."""
    whole = load_config(CONFIG, [
        f"paths.shards={folder / 'shards'}", f"paths.bundles={folder / 'bundles'}", "train.epochs=1",
        "splits={valid_from: 2024-01-03, test_from: 2024-01-04}", "train.batch_size=128", "train.lr=0.01",
        "train.gpu=false", "stages.retriever.keep=60", "stages.pre_ranker.keep=20", "stages.ranker.keep=8",
        "stages.pre_ranker.semantic_ids={mode: add}", *(f"stages.{name}.model.dim=8" for name in NAMES),
        f"semantic_ids.main={json.dumps(IDS)}", f"dataset={json.dumps(WORLD)}", "lists={k: 5, quotas: [12, 8, 5]}"])
    return whole.model_dump(mode="json")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return parse_config(tree_of(tmp_path_factory.mktemp("sid")), where="test")


@pytest.fixture(scope="module")
def shards(ray_cluster: None, config: Config) -> Shards:
    return Shards.open(prepare(config)["shards"])


@pytest.fixture(scope="module")
def uri(config: Config, shards: Shards) -> str:
    return train(config)["bundle"]


def test_every_item_of_the_shards_has_the_tokens_of_its_content(shards: Shards, config: Config):
    ids, items = SemanticIds.load(shards.semantic_ids["main"]), shards.table("items")
    assert shards.manifest["semantic_ids"] == {"main": ids.version}
    content = ItemContent.of(items, "content", shards.state.counters)
    assert items["sid"].to_pylist() == ids.tokens(content.vectors_NV).to_arrow().to_pylist()
    assert (ids.codes_NL == ids.model.encode(content.vectors_NV)).all()
    assert len({tuple(codes) for codes in ids.codes_NL.tolist()}) > 50
    assert ids.facts["period_ms"] == shards.manifest["trained_ms"]
    assert ids.facts["period_ms"][1] == config.splits.moment_ms("valid_from")
    new = content.impressions_N == 0
    assert 0 < new.sum() < len(items) / 2
    assert ids.report["new_items"] == new.sum()
    assert all(len(tokens) for tokens in items["sid"].to_pylist())
    assert "Use of the codes" in Path(shards.semantic_ids["main"], "report.html").read_text()


def test_a_ranker_learns_from_tokens_of_candidates_and_history_and_recommends_with_them(uri: str, shards: Shards):
    bundle = load_bundle(uri)
    assert bundle.manifest["semantic_ids"] == shards.manifest["semantic_ids"]
    seen = bundle.cascade.item_fields
    assert [{"item_id", "sid", "sid+item_id"} & set(seen[name]) for name in bundle.cascade.names] == [
        {"item_id"}, {"sid+item_id"}, {"sid"}]
    found = evaluate(uri)
    assert 0.5 < found["metrics"]["auc"] < 1
    batch = collate(shards.table("requests/test").slice(0, 40), bundle.items)
    ranker = bundle.cascade.models["ranker"]
    with torch.no_grad():
        whole = ranker(batch)[batch.mask_QC]
        for side in ("item", "history"):
            values: dict[str, torch.Tensor] = dict(getattr(batch, side))
            blank = {**values, "sid": torch.zeros_like(values["sid"])}
            other = ranker(type(batch)(**{**vars(batch), side: blank}))[batch.mask_QC]
            assert (whole - other).abs().max() > 1e-3, side


def test_batch_scores_are_those_of_the_bundle(uri: str, tmp_path: Path):
    bundle = load_bundle(uri)
    users = bundle.users.table["user_key"].to_pylist()[:20]
    pq.write_table(pa.table({"request_id": [f"r{user}" for user in users], "user_id": users}),
                   tmp_path / "requests.parquet")
    assert score(uri, requests=str(tmp_path / "requests.parquet"), out=str(tmp_path / "out"))["rows"] == 20
    rows = {row["request_id"]: row["items"] for row in pq.read_table(tmp_path / "out").to_pylist()}
    ranking = bundle.recommend(bundle.encode(pa.table({"user_id": users})))
    expected = [bundle.items.ids_of(row) for row in ranking.final.kept()[0]]
    assert [rows[f"r{user}"] for user in users] == expected


def test_the_raw_catalogue_becomes_the_items_of_the_bundle_also_one_by_one(uri: str, config: Config):
    bundle, raw = load_bundle(uri), open_dataset(config).items()
    stored = pq.read_table(Path(uri, "items", "items.parquet"))
    assert bundle.encode_items(raw).equals(stored)
    assert bundle.encode_items(raw.slice(399, 1)).equals(stored.slice(399, 1))


def test_a_rebuilt_index_keeps_the_semantic_ids(uri: str):
    assert load_bundle(index(uri)["bundle"]).manifest["semantic_ids"] == load_bundle(uri).manifest["semantic_ids"]


def test_the_verb_learns_what_prepare_learned_and_reports(
    config: Config, shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    assert cli.run(["semantic-ids", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["semantic_ids"]["main"]
    assert found["sid_version"] == shards.manifest["semantic_ids"]["main"]
    assert found["uri"] == f"{config.paths.bundles}/_semantic_ids/main-{found['sid_version']}"
    assert found["items"] == 400
    assert len(found["prefix_cosine"]) == 4
    assert "Training loss by step" in Path(found["uri"], "report.html").read_text()
    assert Shards.open(config.paths.shards).manifest == shards.manifest
    assert not Path(config.paths.bundles, "_runs").exists() or not list(
        Path(config.paths.bundles, "_runs").glob("semantic-ids-*"))

    once = parse_config({**tree_of(tmp_path), "semantic_ids": {"main": {"content": "content", "reuse": found["uri"]}}},
                        where="test")
    again = Shards.open(prepare(once)["shards"])
    assert again.manifest["semantic_ids"] == shards.manifest["semantic_ids"]
    assert again.table("items")["sid"] == shards.table("items")["sid"]


def content(items: int = 300) -> ItemContent:
    vectors = np.random.default_rng(0).normal(size=(items, 8)).astype(np.float32)
    return ItemContent(pa.array(range(items)), vectors, np.ones(items, np.int64))


@pytest.mark.slow
def test_two_workers_learn_nearly_what_one_learns(ray_cluster: None, tmp_path: Path):
    models: list[RQVAE] = []
    for workers in (1, 2):
        options = {**IDS, "workers": workers}
        chosen = parse_config({**tree_of(tmp_path), "semantic_ids": {"main": options}}, where="test")
        models.append(learned(chosen, "main", content(), period_ms=(0, 1), work=str(tmp_path / str(workers))).model)
    one, two = (model.encode(content().vectors_NV) for model in models)
    assert (one == two).all(1).mean() > 0.97


# ---------------------------------------------------------------- refusals
def test_a_config_without_the_section_and_a_bundle_of_other_tokens_are_refused(
    uri: str, config: Config, shards: Shards
):
    bare = config.model_dump(mode="json") | {"semantic_ids": {}}
    for stage in bare["stages"]:
        stage["semantic_ids"] = None
    with pytest.raises(ConfigError, match="semantic_ids: the config declares none; add semantic_ids"):
        semantic_ids(parse_config(bare, where="test"))
    file = Path(config.paths.shards, "manifest.json")
    content = file.read_text()
    version = shards.manifest["semantic_ids"]["main"]
    try:
        file.write_text(content.replace(f'"main": "{version}"', '"main": "0123456789abcdef"'))
        with pytest.raises(BundleError, match=r"semantic_ids/main is not the one of the shards.*train again"):
            evaluate(uri)
    finally:
        file.write_text(content)


def test_what_a_user_has_to_mend_comes_back_from_the_workers(ray_cluster: None, tmp_path: Path):
    options = {"content": "content", "rqvae": {**IDS["rqvae"], "lr": 1e30}}
    chosen = parse_config({**tree_of(tmp_path), "semantic_ids": {"main": options}}, where="test")
    with pytest.raises(ConfigError, match=r"rqvae: the loss is not finite at step \d+; lower lr$"):
        learned(chosen, "main", content(), period_ms=(0, 1), work=str(tmp_path / "work"))


def test_content_that_no_item_of_the_log_has_is_refused_before_the_log_is_read(tmp_path: Path):
    tree = {**tree_of(tmp_path), "semantic_ids": {"main": {**IDS, "content": "contents"}}}
    with pytest.raises(ConfigError, match="'contents' is not a vector feature of the items; did you mean 'content'"):
        prepare(parse_config(tree, where="test"))
    assert not (tmp_path / "shards").exists()
