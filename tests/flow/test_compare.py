"""Comparing with real processes: the figures of a single process, resuming, runs that die, and streaming."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raycascade import cli
from raycascade.comparison import chosen
from raycascade.config import Config
from raycascade.errors import ComparisonError, ConfigError
from raycascade.flows import compare as flow
from raycascade.flows.compare import compare
from raycascade.shards import Shards
from raycascade.training.loop import Place
from raycascade.trial import run_once, run_stream
from tests.tiny_shards import train_config, write_shards

pytestmark = pytest.mark.ray

LOSSES = ("bce", "lcron")
METRIC = "joint_recall@2@3"
ALL = [("bce", 7), ("bce", 8), ("lcron", 7), ("lcron", 8)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of six days."""
    root = tmp_path_factory.mktemp("compare")
    write_shards(str(root / "shards"), daily=True)
    return root


def config_of(root: Path, *, seeds: int = 2, bundles: str = "bundles") -> Config:
    config = train_config(str(root / "shards"), loss={"name": "lcron"}, bundles=str(root / bundles))
    return chosen(config, losses=LOSSES, seeds=seeds)


def recorded(root: Path, bundles: str) -> dict[tuple[str, int], bytes]:
    """The files of finished runs."""
    found = {}
    for path in (root / bundles / "_compare" / "runs").glob("*.json"):
        record = json.loads(path.read_bytes())
        found[record["objective"], record["seed"]] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def compared(ray_cluster: None, root: Path) -> dict[str, Any]:
    return compare(config_of(root))


def test_a_comparison_has_the_figures_of_runs_in_a_single_process(compared: dict[str, Any], root: Path):
    shards, config = Shards.open(str(root / "shards")), config_of(root)
    assert list(compared["objectives"]) == list(LOSSES)
    for label, spec in config.compare.objectives.items():
        for position, seed in enumerate((7, 8)):
            train = config.train.model_copy(update={"seed": seed})
            own = config.model_copy(update={"loss": spec, "train": train})
            alone = run_once(own, shards, Place(), groups=shards.groups("test"))["metrics"]
            found = compared["objectives"][label]["metrics"]
            assert {name: figures["values"][position] for name, figures in found.items()} == alone
    assert compared["failed"] == {}
    assert sorted(recorded(root, "bundles")) == ALL


def test_a_comparison_leaves_its_tables_and_its_page(compared: dict[str, Any]):
    out = Path(compared["out"])
    assert sorted(path.name for path in out.glob("comparison.*")) == [
        "comparison.csv", "comparison.html", "comparison.json"]
    kept = json.loads((out / "comparison.json").read_text())
    assert {**kept, "page": compared["page"]} == compared
    assert Path(compared["page"]).read_text().startswith("<!DOCTYPE html>")
    assert (compared["metric"], compared["tests"]["bce"]["against"]) == (METRIC, "lcron")
    assert compared["objectives"]["bce"]["peak_gb"] > 0.05


def test_the_second_call_runs_nothing(compared: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flow, "_run", dies_for())
    before = recorded(root, "bundles")
    assert compare(config_of(root)) == compared
    assert recorded(root, "bundles") == before


def dies_for(*loss_names: str) -> Callable[..., Any]:
    """A run that kills its process for these losses (none named: for all)."""
    run = flow._run

    def dying(tree: dict[str, Any], options: dict[str, Any]) -> Any:
        if not loss_names or tree["loss"]["name"] in loss_names:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(tree, options)

    return dying


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_was(
    compared: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
):
    outcome, seen = flow._outcome, []

    def interrupted(reference: Any) -> Any:
        seen.append(reference)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return outcome(reference)

    monkeypatch.setattr(flow, "_outcome", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config_of(root, bundles="broken"))
    monkeypatch.setattr(flow, "_outcome", outcome)
    before = recorded(root, "broken")
    assert len(before) == 1
    found = compare(config_of(root, bundles="broken"))
    after = recorded(root, "broken")
    assert sorted(after) == ALL
    assert all(after[run] == content for run, content in before.items())
    for label in LOSSES:
        assert found["objectives"][label]["metrics"] == compared["objectives"][label]["metrics"]


@pytest.mark.slow
def test_a_run_whose_process_dies_is_told_and_the_others_are_kept(
    ray_cluster: None, root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flow, "_run", dies_for("lcron"))
    found = compare(config_of(root, seeds=1, bundles="dead"))
    assert list(found["objectives"]) == ["bce"]
    assert list(found["failed"]) == ["lcron seed 7"]
    assert "its process died" in found["failed"]["lcron seed 7"]
    only = chosen(config_of(root, bundles="dead"), losses=["lcron"], seeds=1)
    with pytest.raises(ComparisonError, match="all 1 runs failed"):
        compare(only)


def test_streaming_has_a_curve_over_the_days_and_the_last_point_as_its_figures(ray_cluster: None, root: Path):
    config = config_of(root, seeds=1)
    found = compare(config, streaming=True)
    alone = run_stream(config.model_copy(update={"loss": {"name": "bce"}}), Shards.open(str(root / "shards")), Place())
    curve = found["objectives"]["bce"]["curve"]
    assert [point["day"] for point in curve] == [f"2024-01-0{day}" for day in range(2, 7)]
    assert [point["metrics"][METRIC]["mean"] for point in curve] == [p["metrics"][METRIC] for p in alone["curve"]]
    assert found["objectives"]["bce"]["metrics"] == curve[-1]["metrics"]
    assert sorted(path.name for path in Path(found["out"]).glob("streaming.*")) == [
        "streaming.csv", "streaming.html", "streaming.json"]


def test_mistakes_show_before_a_run_starts(ray_cluster: None, root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flow, "complete", None)
    config = config_of(root)
    wrong = {"objectives": {"a": {"name": "bce", "entry_levels": [0]}}}
    with pytest.raises(ConfigError, match=r"compare\.objectives\.a: .*entry_levels"):
        compare(config.model_copy(update={"compare": config.compare.model_copy(update=wrong)}))
    many = config.compare.model_copy(update={"cpus_per_run": 1000})
    with pytest.raises(ConfigError, match="cpus_per_run: 1000 is more than"):
        compare(config.model_copy(update={"compare": many}))


def test_the_command_line_prints_the_whole_result_and_fails_where_a_run_failed(
    ray_cluster: None, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = root / "config.yaml"
    path.write_text(json.dumps(config_of(root).model_dump(mode="json")))
    arguments = ["compare", str(path), "--losses", "lcron,bce", "--seeds", "1", "--out", str(root / "mine"), "--json"]
    monkeypatch.setattr(flow, "_run", dies_for("bce"))
    assert cli.run(arguments) == 1
    said = capsys.readouterr()
    (line,) = (line for line in said.out.splitlines() if line.startswith("{"))  # Ray may tell of the death behind it
    result = json.loads(line)
    assert list(result)[:2] == ["out", "metric"]
    assert list(result["objectives"]) == ["lcron"]
    assert "1 runs failed (bce seed 7: " in said.err
