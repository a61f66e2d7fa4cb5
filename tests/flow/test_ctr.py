"""A ranker alone on a log of single impressions through its life on Ray: prepared, trained, evaluated, scored."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raycascade.batch import collate
from raycascade.bundle import load_bundle
from raycascade.errors import ConfigError, DataError
from raycascade.flows.evaluate import evaluate
from raycascade.flows.index import index
from raycascade.flows.prepare import prepare
from raycascade.flows.score import score
from raycascade.flows.serving import application
from raycascade.flows.train import train
from raycascade.serving.options import ServeOptions
from raycascade.shards import Shards
from tests.ctr_table import brute_auc, brute_gauc, ctr_config, requests_of, write_log

pytestmark = pytest.mark.ray

TEST_FROM_MS = 1_704_067_200_000 + 7 * 86_400_000
TASKS = ("click", "like")
MMOE = [{"name": "ranker", "keep": 1, "tasks": list(TASKS), "model": {"name": "mmoe", "dim": 8, "hidden": [32, 16]},
         "loss": {"name": "bce"}, "fusion": {"product": {"click": 1.0, "like": 0.5}}}]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """The folder, and the rows of the test split in order of time."""
    folder = tmp_path_factory.mktemp("ctr")
    table = write_log(folder / "raw", rows=6000)
    return folder, table.filter(pa.array(table["time_ms"].to_numpy() >= TEST_FROM_MS))


@pytest.fixture(scope="module")
def shards(ray_cluster: None, log: tuple[Path, pa.Table]) -> Shards:
    folder, _ = log
    options = {**ctr_config(folder).dataset, "labels": {"click": "click", "like": "like"}}
    return Shards.open(prepare(ctr_config(folder, dataset=options))["shards"])


@pytest.fixture(scope="module")
def uri(log: tuple[Path, pa.Table], shards: Shards) -> str:
    return train(ctr_config(log[0]))["bundle"]


def test_every_row_is_a_request_of_one_candidate(shards: Shards, log: tuple[Path, pa.Table]):
    test = shards.table("requests/test")
    assert sum(shards.splits.values()) == 6000
    assert len(test) == len(log[1])
    assert {len(row) for row in test["candidates"].to_pylist()} == {1}


def test_the_evaluation_of_a_ranker_alone_is_the_brute_force_over_what_score_writes(
    uri: str, log: tuple[Path, pa.Table], tmp_path: Path
):
    _, test = log
    pq.write_table(requests_of(test), tmp_path / "requests.parquet")
    assert score(uri, requests=str(tmp_path / "requests.parquet"), out=str(tmp_path / "out"))["rows"] == len(test)
    rows = {row["request_id"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    in_order = [rows[f"r{n}"] for n in range(len(test))]
    assert [row["items"] for row in in_order] == [[item] for item in test["item_id"].to_pylist()]
    scores, clicks = np.array([row["scores"][0] for row in in_order]), test["click"].to_numpy()

    found = evaluate(uri)
    metrics = found["metrics"]
    assert metrics["auc"] == pytest.approx(brute_auc(scores, clicks), abs=1e-5)
    assert metrics["gauc"] == pytest.approx(brute_gauc(scores, clicks, test["user_id"].to_numpy()), abs=1e-5)
    predicted = 1 / (1 + np.exp(-scores))
    by_hand = -np.where(clicks == 1, np.log(predicted), np.log(1 - predicted)).mean()
    assert metrics["logloss"] == pytest.approx(by_hand, abs=1e-5)
    assert metrics["predicted_over_observed"] == pytest.approx(predicted.sum() / clicks.sum(), abs=1e-5)
    assert {name: metrics[f"{name}/ranker"] for name in ("auc", "gauc", "logloss")} == {
        name: metrics[name] for name in ("auc", "gauc", "logloss")}
    # What is known about how the clicks were drawn: no model can order them better, and a constant loses more.
    best = brute_auc(test["truth"].to_numpy(), clicks)
    rate = clicks.mean()
    assert 0.72 < best - 0.06 < metrics["auc"] < best + 0.01
    assert metrics["logloss"] < -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)) - 0.03
    assert metrics["calibration_error"] < 0.08
    assert 0.85 < metrics["predicted_over_observed"] < 1.15
    assert not any(name.startswith("recall@1/") or name == "recall@1" for name in metrics)  # nothing was searched
    page = Path(found["report"]).read_text()
    assert "Predictions of labels" in page
    assert "predicted over observed" in page


def test_two_tasks_have_figures_of_their_own_that_equal_brute_force(log: tuple[Path, pa.Table], shards: Shards):
    uri = train(ctr_config(log[0], stages=MMOE))["bundle"]
    metrics, bundle, test = evaluate(uri)["metrics"], load_bundle(uri), shards.table("requests/test")
    batch = collate(test, bundle.items)
    with torch.no_grad():
        logits = bundle.cascade.logits(batch)["ranker"][:, 0].double().numpy()
    users = test["user_key"].to_numpy()
    for task, column in zip(TASKS, logits.T, strict=True):
        labels = np.array([row[0] for row in test[task].to_pylist()], np.float64)
        known = ~np.isnan(labels)
        assert known.all() == (task == "click")
        assert metrics[f"auc/ranker/{task}"] == pytest.approx(brute_auc(column[known], labels[known]), abs=1e-6)
        expected = brute_gauc(column[known], labels[known], users[known])
        assert metrics[f"gauc/ranker/{task}"] == pytest.approx(expected, abs=1e-6)
        assert metrics[f"auc/ranker/{task}"] > 0.62
        assert metrics[f"calibration_error/ranker/{task}"] < 0.12
        assert 0.8 < metrics[f"predicted_over_observed/ranker/{task}"] < 1.2
    assert "auc/ranker" in metrics
    assert "logloss/ranker" not in metrics  # a fused score is no probability


def test_what_needs_a_catalogue_search_is_refused_in_one_line(uri: str, tmp_path: Path, log: tuple[Path, pa.Table]):
    with pytest.raises(ConfigError, match="stage 'ranker' cannot search a catalogue"):
        application(uri, ServeOptions(mode="fused"))
    with pytest.raises(ConfigError, match="stage 'ranker' cannot search a catalogue"):
        index(uri)
    bare = requests_of(log[1].slice(0, 4))
    cases: list[tuple[pa.Table, str]] = [
        (bare.drop_columns(["candidates"]), "'candidates' is missing; stage 'ranker' searches no catalogue"),
        (bare.set_column(bare.column_names.index("candidates"), "candidates", pa.array([[7]] * 4)),
         r"candidate 7 is not in the bundle's catalogue \(4 such\)"),
    ]
    for number, (table, message) in enumerate(cases):
        pq.write_table(table, tmp_path / f"{number}.parquet")
        with pytest.raises(DataError, match=message):
            score(uri, requests=str(tmp_path / f"{number}.parquet"), out=str(tmp_path / f"out {number}"))


@pytest.mark.parametrize(("changes", "expected"), [
    ({"stages": [{"name": "ranker", "keep": 1, "model": {"name": "din"}}]}, "din: the stage sees no history"),
    ({"stages": [{**MMOE[0], "tasks": ["click", "lyke"], "fusion": {"sum": {"click": 1.0}}}]},
     "'lyke' is not a label of the log"),
])
def test_a_model_or_task_that_the_log_cannot_feed_is_refused_before_the_log_is_read(
    tmp_path: Path, changes: dict[str, Any], expected: str
):
    """There is no log at all, and no Ray."""
    with pytest.raises(ConfigError, match=expected):
        prepare(ctr_config(tmp_path, **changes))
    assert not (tmp_path / "shards").exists()
