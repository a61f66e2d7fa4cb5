"""A ranker alone on a log of single impressions: measured, saved and asked in this process; and its figures by hand."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from raycascade.batch import collate
from raycascade.bundle import Bundle, load_bundle, save_bundle
from raycascade.cascade import Cascade
from raycascade.datasets.table import TableDataset
from raycascade.errors import ConfigError
from raycascade.evaluation import Evaluator
from raycascade.explain import explain_item
from raycascade.flows.prepare import open_dataset
from raycascade.metrics import BinaryMetrics, grouped_auc
from raycascade.report import render_report
from raycascade.reporting import describe
from raycascade.shards import Shards
from raycascade.training.loop import Place, Run
from tests.ctr_table import brute_auc, brute_gauc, ctr_config, write_log
from tests.tiny_shards import train_config, write_shards


# ---------------------------------------------------------------- figures by hand
def test_gauc_weighs_users_by_their_rows_and_leaves_out_users_of_one_class():
    """User a: pairs (2 > 1) right, (2 > 3) wrong: 1/2 of 3 rows. User b: 1 of 2 rows. User c: positives only."""
    metrics = BinaryMetrics()
    metrics.update(np.array([2.0, 1.0, 3.0, 5.0, 4.0, 9.0]), np.array([1.0, 0, 0, 1, 0, 1]), list("aaabbc"))
    assert metrics.result()["gauc"] == pytest.approx((3 * 0.5 + 2 * 1.0) / 5)
    assert metrics.result()["auc"] == pytest.approx((1 + 3 + 3) / 9)
    assert metrics.num_skipped_groups() == 1


def test_calibration_error_and_the_ratio_of_predicted_to_observed_are_those_worked_out_by_hand():
    """Forty rows, two a bin: half of them promise 0.8 and get 0.5, the others promise 0.2 and get 0.2."""
    predicted = np.repeat([0.8, 0.2], 20)
    clicks = np.concatenate([np.arange(20) < 10, np.arange(20) < 4]).astype(float)
    metrics = BinaryMetrics()
    metrics.update(np.log(predicted / (1 - predicted)), clicks, np.arange(40))
    assert metrics.result()["calibration_error"] == pytest.approx((20 * 0.3 + 20 * 0.0) / 40, abs=1e-6)
    assert metrics.result()["predicted_over_observed"] == pytest.approx((20 * 0.8 + 20 * 0.2) / 14, abs=1e-6)
    nobody = BinaryMetrics()
    nobody.update(np.zeros(3), np.zeros(3), np.arange(3))
    assert math.isnan(nobody.result()["predicted_over_observed"])
    assert nobody.result()["calibration_error"] == pytest.approx(0.5)


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_auc_and_gauc_with_ties_equal_brute_force_over_all_pairs(levels: int):
    draw = np.random.default_rng(levels)
    scores, users = draw.integers(0, levels, 500) / 4.0, draw.integers(0, 40, 500)
    labels = (draw.random(500) < 0.3).astype(float)
    metrics = BinaryMetrics()
    metrics.update(scores, labels, users)
    assert metrics.result()["auc"] == pytest.approx(brute_auc(scores, labels), abs=1e-12)
    assert metrics.result()["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.result()["gauc"] == pytest.approx(brute_gauc(scores, labels, users), abs=1e-12)
    assert grouped_auc(scores, labels > 0.5, users)[0] == metrics.result()["gauc"]


def test_a_row_costs_thirteen_bytes_and_reading_the_figures_does_not_hold_it_twice():
    metrics, other = BinaryMetrics(), BinaryMetrics()
    for part in (metrics, other, metrics):
        part.update(torch.randn(100), torch.randint(0, 2, (100,)).float(), np.arange(100))
    metrics.merge(other)
    first = metrics.result()
    assert sum(array.nbytes for chunk in metrics._chunks for array in chunk) == 13 * 300
    assert len(metrics._chunks) == 1
    metrics.update(torch.randn(100), torch.randint(0, 2, (100,)).float(), np.arange(100))
    assert metrics.result() != first


# ---------------------------------------------------------------- one candidate a request
def split(table: pa.Table) -> pa.Table:
    """Every candidate of encoded lists as a request of its own."""
    names = [name for name in ("candidates", "click", "reached", "rank", "relevance") if name in table.column_names]
    rows = []
    for row in table.to_pylist():
        for position in range(len(row["candidates"])):
            rows.append({**row, "request_id": f"{row['request_id']}.{position}",
                         **{name: [row[name][position]] for name in names}})
    return pa.Table.from_pylist(rows, schema=table.schema.set(
        table.column_names.index("request_id"), pa.field("request_id", pa.string())))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


ALONE = [{"name": "ranker", "keep": 3, "model": {"name": "din", "dim": 4, "hidden": [8]}}]


@pytest.fixture(scope="module")
def bundle(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An untrained ranker without a stage before it."""
    torch.manual_seed(2)
    opened, config = Shards.open(shards), train_config(shards, stages=ALONE, loss={"name": "bce", "label": "click"})
    uri = save_bundle(str(tmp_path_factory.mktemp("bundles") / "b"), config=config,
                      cascade=Cascade(config, opened.state.space), items=opened.items,
                      encoded_items=opened.table("items"), users=opened.table("users"),
                      metrics={"train": {"rows": 1}, "curves": {}})
    return load_bundle(uri)


def test_lists_and_their_candidates_one_by_one_have_the_same_figures(bundle: Bundle, shards: str):
    """The listwise and the pointwise path are one."""
    requests = Shards.open(shards).table("requests/train").slice(0, 40)
    listwise, pointwise = Evaluator(bundle), Evaluator(bundle)
    listwise.update(requests)
    pointwise.update(split(requests))
    one, other = (e.measured.predictions()["ranker"] for e in (listwise, pointwise))
    assert set(one) == {"auc", "gauc", "logloss", "calibration_error", "predicted_over_observed"}
    for name, value in one.items():
        assert other[name] == pytest.approx(value, abs=1e-5), name
    assert listwise.measured.metrics()["auc"] == listwise.measured.metrics()["auc/ranker"]


def test_the_figures_of_a_stage_are_those_of_its_scores_grouped_by_user(bundle: Bundle, shards: str):
    requests = Shards.open(shards).table("requests/train")
    evaluator = Evaluator(bundle)
    evaluator.update(requests)
    batch = collate(requests, bundle.items)
    assert batch.targets is not None
    with torch.no_grad():
        scores = bundle.cascade(batch)["ranker"][batch.mask_QC].double().numpy()
    clicks = batch.targets.labels["click"][batch.mask_QC].numpy()
    users = np.repeat(requests["user_key"].to_numpy(), batch.mask_QC.sum(1).numpy())
    found = evaluator.measured.metrics()
    assert found["auc/ranker"] == pytest.approx(roc_auc_score(clicks, scores))
    assert found["gauc/ranker"] == pytest.approx(brute_gauc(scores, clicks, users))
    assert found["logloss/ranker"] == pytest.approx(log_loss(clicks, 1 / (1 + np.exp(-scores))))


def test_a_bundle_without_a_search_has_no_index_and_ranks_what_a_request_brings(bundle: Bundle, shards: str):
    assert bundle.index is None
    assert not Path(bundle.uri, "index").exists()
    requests = Shards.open(shards).table("requests/test")
    ranking = bundle.recommend(requests)
    scores_QC = bundle.cascade.score("ranker", bundle.batch(requests)).detach()
    for q, row in enumerate(requests.to_pylist()):
        allowed = [c for c in row["candidates"] if c not in row["exclude"]]
        by_score = dict(zip(row["candidates"], scores_QC[q].tolist(), strict=False))
        kept, mask = (x[q] for x in ranking.final.kept())
        assert kept[mask].tolist() == sorted(allowed, key=lambda c: -by_score[c])[:3]


def test_the_report_of_a_ranker_alone_shows_its_predictions_and_no_funnel(bundle: Bundle, shards: str):
    evaluator = Evaluator(bundle)
    evaluator.update(Shards.open(shards).table("requests/test"))
    content = describe(bundle, evaluator.measured, split="test", moment="now")
    assert content.headline == ["auc", "gauc", "logloss", "calibration_error", "predicted_over_observed"]
    assert [result.name for result in content.predictions] == ["ranker"]
    assert (content.survival, content.stages) == ([], [])
    page = render_report(content)
    assert "Predictions of labels" in page
    assert "there is no catalogue search" in page


def test_what_starts_from_a_search_says_that_there_is_none(bundle: Bundle):
    with pytest.raises(ConfigError, match="stage 'ranker' cannot search a catalogue"):
        explain_item(bundle, user="1", item="5000")
    with pytest.raises(ConfigError, match="stage 'ranker' cannot search a catalogue"):
        bundle.cascade.retrieve(bundle.batch(bundle.users.table), None)


def test_a_cascade_that_searches_reads_no_candidates(shards: str):
    config, opened = train_config(shards), Shards.open(shards)
    cascade = Cascade(config, opened.state.space)
    assert cascade.searches
    searching = Bundle("", {}, config, opened.items, cascade, None)
    assert searching.batch(opened.table("requests/test")).candidates_QC.shape[1] == 0


def test_any_ranker_alone_can_be_built_and_takes_a_step_on_lists_of_one(shards: str):
    """As the objective sees them: no loss, mask or statistic asks how many candidates there are."""
    opened = Shards.open(shards)
    single = split(opened.table("requests/train").slice(0, 8))
    for model in ("lr", "deepfm", "dcn_v2", "din", "autoint"):
        stages = [{**ALONE[0], "keep": 1, "model": {"name": model}}]
        config = train_config(shards, stages=stages, loss={"name": "bce", "label": "click"})
        run = Run.build(config, opened, Place())
        batch = collate(single, opened.items, keep=(1,), k=2)
        output = run.objective(run.cascade, batch, run.catalogue, np.random.default_rng(1))
        output.total.backward()
        assert torch.isfinite(output.total), model
        assert any(p.grad is not None for p in run.cascade.parameters()), model


# ---------------------------------------------------------------- the log
def test_a_plain_log_needs_a_few_lines_and_every_row_becomes_a_request(tmp_path: Path):
    write_log(tmp_path / "raw", rows=50)
    dataset = open_dataset(ctr_config(tmp_path))
    assert isinstance(dataset, TableDataset)
    tables = [table for piece in dataset.slices() for table in dataset.read(piece)]
    ids = pa.concat_tables(tables)["request_id"].to_pylist()
    assert len(set(ids)) == 50
    assert len(dataset.items()) == len({row for table in tables for row in table["item_id"].to_pylist()})
