"""A generated RecFlow log through prepare, train, evaluate and streaming, with the config files for the real one."""

import math
from pathlib import Path
from typing import Any

import pytest

from raycascade import storage
from raycascade.config import load_config
from raycascade.flows.evaluate import evaluate
from raycascade.flows.prepare import prepare
from raycascade.flows.train import train
from raycascade.shards import Shards
from raycascade.training.loop import Place
from raycascade.trial import run_stream
from tests import recflow_world as world

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DAYS = ["2024-01-31", *(f"2024-02-0{day}" for day in range(1, 5))]
PER_DAY = 80
K, LAST_QUOTA = 10, 20
CASES = [("recflow.yaml", 40), ("recflow_three_stage.yaml", 50)]  # candidates of a full list


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recflow")
    world.write_recflow(folder, DAYS, PER_DAY, 7)
    return folder


def run(raw: Path, folder: Path, file: str) -> tuple[Shards, dict[str, Any], dict[str, Any]]:
    """The three verbs, and a pass over the days; nothing of the file but paths, days and batch size is changed."""
    overrides = [f"paths.raw={raw}", f"paths.shards={folder}/shards", f"paths.bundles={folder}/bundles",
                 f"dataset.first_day={DAYS[0]}", "train.batch_size=16"]
    config = load_config(str(CONFIGS / file), overrides)
    prepare(config)
    shards = Shards.open(config.paths.shards)
    return shards, evaluate(train(config)["bundle"])["metrics"], run_stream(config, shards, Place())


@pytest.mark.parametrize(("file", "width"), CASES)
def test_a_trained_cascade_finds_more_of_the_truth_than_chance(
    ray_cluster: None, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, width: int
):
    shards, metrics, stream = run(raw, tmp_path, file)
    assert shards.splits == {"train": PER_DAY * (len(DAYS) - 1), "test": PER_DAY}
    lists = shards.table("requests/test")["candidates"].combine_chunks()
    assert len(lists.flatten()) == PER_DAY * width
    chance = LAST_QUOTA / width
    variance = K * chance * (1 - chance) * (width - K) / (width - 1)  # of a draw of LAST_QUOTA of the list
    error = math.sqrt(variance / PER_DAY) / K
    assert metrics[f"joint_recall@{K}@{LAST_QUOTA}"] > chance + 5 * error
    assert [(point["day"], point["requests"]) for point in stream["curve"]] == [(day, PER_DAY) for day in DAYS[1:]]
    assert stream["metrics"][f"joint_recall@{K}@{LAST_QUOTA}"] > chance + 5 * error
    notes = storage.read_json(f"{tmp_path}/shards/manifest.json")["notes"]
    assert any("have a group of fewer than 10 candidates (short_list: keep)" in message for message in notes)
    printed = capsys.readouterr().err
    assert all(f"note: {count} {message}" in printed for message, count in notes.items())
