"""Training with real workers: two like one, killed ones like undisturbed ones, and evaluation like in the process.

Deaths happen at a chosen step: what a worker runs is replaced by a function that waits there until its checkpoint is
known to Ray, and then kills.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import yaml

from raycascade import selfcheck
from raycascade.bundle import load_bundle
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.evaluation import Evaluator
from raycascade.flows import train as flow
from raycascade.flows.evaluate import evaluate
from raycascade.flows.train import train
from raycascade.shards import Shards
from raycascade.slices import by_name
from raycascade.training.checkpoint import Progress
from raycascade.training.loop import Run, Save
from tests.tiny_shards import train_config, write_shards

pytestmark = pytest.mark.ray

EPOCHS, CHECKPOINT_STEPS, DEATH = 3, 8, 20
WAIT_S = 150.0  # for a test that would hang; a driver on a busy machine takes a minute to start its Ray
Worker = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 150 requests in four files; ten steps an epoch."""
    folder = tmp_path_factory.mktemp("train")
    write_shards(str(folder / "shards"))
    return folder


def config_of(folder: Path, run: str, **options: Any) -> Config:
    train = {"run": run, "epochs": EPOCHS, "checkpoint_steps": CHECKPOINT_STEPS, **options}
    return train_config(str(folder / "shards"), train=train, bundles=str(folder / "bundles"))


@pytest.fixture(scope="module")
def one(ray_cluster: None, folder: Path) -> dict[str, Any]:
    """An undisturbed run on one worker."""
    return train(config_of(folder, "one"))


@pytest.fixture(scope="module")
def two(ray_cluster: None, folder: Path) -> dict[str, Any]:
    """An undisturbed run on two workers, half a batch each."""
    return train(config_of(folder, "two", workers=2))


def test_a_trained_bundle_records_answers_and_gives_them_again(one: dict[str, Any]):
    assert selfcheck.require_whole(load_bundle(one["bundle"]))


def bundle_weights(uri: str) -> dict[str, bytes]:
    """Bytes of every stage's weights."""
    return {path.parent.name: path.read_bytes() for path in Path(uri, "stages").glob("*/weights.safetensors")}


def wait_for_checkpoint(run: Path) -> None:
    """Returns once Ray has noted a checkpoint of the run; the deadline is for a test that would hang."""
    deadline = time.monotonic() + WAIT_S
    snapshot = run / "checkpoint_manager_snapshot.json"
    while time.monotonic() < deadline:
        if snapshot.exists() and json.loads(snapshot.read_text() or "{}").get("checkpoint_results"):
            return
        time.sleep(0.01)
    raise TimeoutError(f"no checkpoint in {snapshot}")


def at_step(death: Callable[[], None], *, rank: int, marks: Path) -> Worker:
    """What a worker runs: the real thing, which notes where it begins, and dies once after step DEATH on one rank."""
    real_worker, real_fit = flow._worker, flow.fit

    def worker(options: dict[str, Any]) -> None:
        def fit(run: Run, progress: Progress, report: Callable[[Progress, int, Save | None], None]) -> Progress:
            with (marks / f"begins-{run.place.rank}").open("a") as stream:
                stream.write(f"{progress.total_steps}\n")

            def watched(progress: Progress, steps: int, save: Save | None) -> None:
                report(progress, steps, save)
                if progress.total_steps == DEATH and run.place.rank == rank and not (marks / "died").exists():
                    (marks / "died").touch()
                    death()

            return real_fit(run, progress, watched)

        flow.fit = fit
        real_worker(options)

    return worker


def begins(marks: Path, rank: int) -> list[int]:
    return [int(line) for line in (marks / f"begins-{rank}").read_text().split()]


def test_two_workers_reach_the_loss_of_one_on_the_same_global_batch(one: dict[str, Any], two: dict[str, Any]):
    curves = [json.loads(Path(run["bundle"], "metrics.json").read_text())["curves"] for run in (one, two)]
    last = [curve["valid_loss"][-1][1] for curve in curves]
    gain = curves[0]["loss"][0][1] - last[0]
    assert gain > 0.5  # there was something to learn, most of it in the first epoch
    assert abs(last[0] - last[1]) < 0.05 * gain
    assert bundle_weights(one["bundle"]).keys() == bundle_weights(two["bundle"]).keys()


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_nothing(
    two: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = folder / "bundles" / "_runs" / "mourned"

    def death() -> None:
        wait_for_checkpoint(run)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(flow, "_worker", at_step(death, rank=1, marks=tmp_path))
    result = train(config_of(folder, "mourned", workers=2))
    assert (tmp_path / "died").exists()
    for rank in range(2):
        start, again = begins(tmp_path, rank)
        assert start == 0
        assert again in range(CHECKPOINT_STEPS, DEATH + 1, CHECKPOINT_STEPS)
    assert bundle_weights(result["bundle"]) == bundle_weights(two["bundle"])
    assert not run.exists()


DRIVER = """
import sys
from pathlib import Path
import time
from raycascade.cli import run
from raycascade.flows import train as flow
from tests.flow.test_train import at_step

def death():
    time.sleep(600)  # until the driver dies, and this worker with it

flow._worker = at_step(death, rank=0, marks=Path(sys.argv[1]))
sys.exit(run(sys.argv[2:]))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[bytes]]]:
    """Starts a driver in a process of its own; it does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(arguments: list[str]) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with (tmp_path / "driver.log").open("ab") as log:
            started.append(subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log, stderr=log))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_killed_driver_started_again_with_the_same_command_goes_on_where_it_was(
    one: dict[str, Any], folder: Path, tmp_path: Path, start: Callable[[list[str]], subprocess.Popen[bytes]]
):
    config = config_of(folder, "orphan").model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["-c", DRIVER, str(tmp_path), "train", str(tmp_path / "config.yaml"), "train.run=orphan"]
    driver = start(command)
    wait_for_checkpoint(folder / "bundles" / "_runs" / "orphan")
    deadline = time.monotonic() + WAIT_S
    while not (tmp_path / "died").exists():
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (folder / "bundles" / "orphan").exists()
    assert start(command).wait(WAIT_S) == 0, (tmp_path / "driver.log").read_text()
    assert begins(tmp_path, 0) in ([0, CHECKPOINT_STEPS], [0, 2 * CHECKPOINT_STEPS])
    assert bundle_weights(str(folder / "bundles" / "orphan")) == bundle_weights(one["bundle"])


def test_what_a_user_has_to_mend_is_said_at_once_and_tried_once(
    ray_cluster: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(run: Run, progress: Progress, report: object) -> Progress:
        with (tmp_path / "tries").open("a") as stream:
            stream.write("x")
        raise ConfigError(f"nobody can train with lr {run.config.train.lr}")

    real = flow._worker

    def worker(options: dict[str, Any]) -> None:
        flow.fit = refuse
        real(options)

    monkeypatch.setattr(flow, "_worker", worker)
    with pytest.raises(ConfigError, match=r"nobody can train with lr 0.01"):
        train(config_of(folder, "refused"))
    assert (tmp_path / "tries").read_text() == "x"


def test_a_finished_run_is_not_trained_again(one: dict[str, Any], folder: Path):
    with pytest.raises(ConfigError, match=r"train\.run 'one' is finished: its bundle is"):
        train(config_of(folder, "one"))


def test_an_unfinished_run_does_not_go_on_with_another_config(folder: Path):
    note = folder / "bundles" / "_runs" / "half"
    flow._check_same_run("half", str(note / "begun.json"), {"stages": [1], "loss": {"name": "bce"}})
    flow._check_same_run("half", str(note / "begun.json"), {"stages": [1], "loss": {"name": "bce"}})
    with pytest.raises(ConfigError, match=r"train\.run 'half' was begun with other loss; restore"):
        flow._check_same_run("half", str(note / "begun.json"), {"stages": [1], "loss": {"name": "lcron"}})


def test_evaluation_on_ray_is_the_evaluation_in_the_process(one: dict[str, Any]):
    found = evaluate(one["bundle"])
    bundle = load_bundle(one["bundle"])
    evaluator = Evaluator(bundle)
    evaluator.update(Shards.open(bundle.config.paths.shards).table("requests/test"))
    assert found["metrics"] == pytest.approx(evaluator.measured.metrics(), abs=1e-6)
    for name, figures in evaluator.measured.baselines().items():
        assert found["baselines"][name] == pytest.approx(figures, abs=1e-9)
    slices = by_name(evaluator.measured.slice_figures())
    assert set(slices) == {"all", "cold", "tail"}
    for name, figures in slices.items():
        assert found["slices"][name] == pytest.approx(figures, abs=1e-6)
    assert json.loads(Path(bundle.uri, "evaluation.test.json").read_text())["slices"] == found["slices"]
    assert Path(found["report"]).read_text().startswith("<!DOCTYPE html>")
    assert {"loss", "rows", "rows_per_s", "train_seconds"} <= one.keys()


def test_the_weights_in_a_bundle_are_the_trained_ones(one: dict[str, Any], folder: Path):
    fresh = Run.build(config_of(folder, "fresh"), Shards.open(str(folder / "shards")), flow.Place())
    trained = safetensors.numpy.load(bundle_weights(one["bundle"])["ranker"])
    first = fresh.cascade.models["ranker"].state_dict()
    assert any((trained[name] != value.numpy()).any() for name, value in first.items())
