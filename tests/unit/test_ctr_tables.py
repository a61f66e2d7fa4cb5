"""The click tables of the comparison with other libraries: point in time, split and encoded."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RAW = Path(__file__).parents[3] / "shared" / "data"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return _load("_ctr_tables")


def test_a_row_sees_the_hits_of_its_key_at_strictly_earlier_moments(tables: ModuleType) -> None:
    draw = np.random.default_rng(5)
    keys, moments, hits = draw.integers(0, 6, 200), draw.integers(0, 15, 200), draw.integers(0, 2, 200)
    past = tables.past_of(keys, moments, hits, prior=0.25)
    for row in range(200):
        before = (keys == keys[row]) & (moments < moments[row])
        assert past.counts[row] == before.sum()
        expected = (hits[before].sum() + tables.SMOOTHING * 0.25) / (before.sum() + tables.SMOOTHING)
        assert past.shares[row] == pytest.approx(expected)


def test_a_history_holds_the_users_last_events_before_the_row_oldest_first(tables: ModuleType) -> None:
    events = pd.DataFrame({"user": [1, 1, 2, 1, 1], "moment": [30, 10, 5, 20, 40], "item": [103, 101, 201, 102, 104]})
    found = tables.histories(np.array([1, 1, 2, 3]), np.array([40, 10, 9, 99]), events, length=2)
    assert [items.tolist() for items in found] == [[102, 103], [], [201], []]


@pytest.fixture(scope="module")
def published(tables: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    if not (RAW / "movietweetings").is_dir():
        pytest.skip("the MovieTweetings snapshot is not at ../shared/data/movietweetings")
    table = tables.movietweetings(str(RAW / "movietweetings"))
    return table, tables.publish_table(str(tmp_path_factory.mktemp("shards")), table)


def test_movietweetings_is_split_by_time_and_exported_row_by_row(
    tables: ModuleType, published: tuple[Any, Any]
) -> None:
    table, shards = published
    assert [len(table.requests[split]) for split in tables.SPLITS] == [80_000, 10_000, 10_000]
    times = {split: table.requests[split]["time_ms"].to_numpy() for split in tables.SPLITS}
    assert times["train"].max() <= times["valid"].min() <= times["valid"].max() <= times["test"].min()
    exported = tables.export(shards)
    names = {field["name"] for field in tables.describe(shards)}
    for split in tables.SPLITS:
        columns = {key.removeprefix(f"{split}/") for key in exported if key.startswith(f"{split}/")}
        assert columns == names | {"label:liked", "label:loved"}
        assert {len(exported[f"{split}/{name}"]) for name in columns} == {len(table.requests[split])}
    likes = table.requests["test"]["liked"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(exported["test/label:liked"], likes)
    for field in tables.describe(shards):
        if field["kind"] != "dense":
            values = exported[f"test/{field['name']}"]
            assert values.max() < field["rows"]
            assert values.min() >= (0 if field["kind"] == "history" else 1)


def test_a_pair_is_compared_on_the_seeds_that_both_sides_have() -> None:
    pairs, report = _load("_quality_pairs"), _load("_quality_report")
    pair = pairs.PAIRS[0]
    figures = {"test_gauc": 0.5, "test_logloss": 0.5, "valid_auc": 0.5}
    runs = [{"data": "log", "side": side, "model": pair.model, "inputs": pair.inputs, "seed": seed, "test_auc": auc,
             **figures} for side, seed, auc in
            (("ours", 1, 0.71), ("ours", 2, 0.73), ("ours", 3, 0.1), (pair.peer, 1, 0.72), (pair.peer, 2, 0.721))]
    (found,) = report.compare(runs)
    assert [run["seed"] for run in found.ours] == [1, 2]
    assert found.gain == pytest.approx(0.72 - 0.7205)
    assert found.met
    assert "| -.0005 |" in report.table_of([found])
