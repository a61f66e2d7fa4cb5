"""One run of a comparison: its figures are those of the loop and the metrics, and a stream never looks ahead."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raycascade import trial
from raycascade.batch import collate
from raycascade.config import Config
from raycascade.errors import ConfigError
from raycascade.metrics import ListMetrics
from raycascade.shards import Shards
from raycascade.training.loop import Place
from raycascade.trial import check_days, date_of, run_once, run_stream, streaming_config
from tests.tiny_shards import same, train_config, trained, weights, write_shards

DAYS = [f"2024-01-0{day}" for day in range(1, 7)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Requests on six days; the last day is cut into validation and test."""
    return write_shards(str(tmp_path_factory.mktemp("daily") / "s"), daily=True)


@pytest.fixture
def shards(root: str) -> Shards:
    return Shards.open(root)


def config_of(root: str, **train: Any) -> Config:
    return train_config(root, train=train)


# ---------------------------------------------------------------- one run
def test_a_run_has_the_figures_of_the_trained_cascade_on_the_test_lists(root: str, shards: Shards):
    config = config_of(root, epochs=2)
    found = run_once(config, shards, Place(), groups=shards.groups("test"))
    run, progress = trained(config)
    batch = collate(shards.table("requests/test"), shards.items, keep=config.quotas, k=config.lists.k)
    lists = ListMetrics(run.cascade.names, config.quotas, config.lists.k)
    assert batch.targets is not None
    lists.update(run.cascade.eval()(batch), batch.targets, batch.request_ids, batch.candidates_QC)
    by_hand = lists.result()
    assert found["metrics"] == by_hand
    assert (found["requests"], found["rows"]) == (25, progress.rows)
    assert found["peak_gb"] > 0.05  # torch alone is more
    assert found["rows_per_s"] == pytest.approx(found["rows"] / found["seconds"])


# ---------------------------------------------------------------- a stream
def test_a_stream_tests_every_day_with_the_days_before_it_and_only_then_trains_on_it(
    root: str, shards: Shards, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[str, str]] = []
    doing = ["train"]
    read, measure = Shards.read_group, trial.measure

    def measured(*arguments: Any) -> Any:
        doing.append("test")
        found = measure(*arguments)
        doing.pop()
        return found

    def spied(self: Shards, name: str, group: int) -> Any:
        table = read(self, name, group)
        days = {date_of(ms // 86_400_000) for ms in table["time_ms"].to_pylist()}
        seen.extend((doing[-1], day) for day in days)
        return table

    monkeypatch.setattr(trial, "measure", measured)
    monkeypatch.setattr(Shards, "read_group", spied)
    found = run_stream(config_of(root), shards, Place())
    events = list(dict.fromkeys(seen))
    by_hand = [("train", DAYS[0])]
    for day in DAYS[1:]:
        by_hand += [("test", day), ("train", day)]
    assert events == by_hand[:-1]  # nothing follows the last day that could be tested
    assert [point["day"] for point in found["curve"]] == DAYS[1:]
    assert found["curve"][-1]["requests"] == 50  # both splits of the last day
    assert found["metrics"] == found["curve"][-1]["metrics"]


def test_the_days_to_come_change_nothing_in_the_curve_so_far(
    root: str, shards: Shards, monkeypatch: pytest.MonkeyPatch
):
    whole = run_stream(config_of(root), shards, Place())
    days = dict(list(shards.days().items())[:4])
    monkeypatch.setattr(Shards, "days", lambda self: days)
    begun = run_stream(config_of(root), shards, Place())
    assert begun["curve"] == whole["curve"][:3]
    assert begun["rows"] < whole["rows"]


def test_a_stream_of_days_trains_like_epochs_of_their_rows(
    root: str, shards: Shards, monkeypatch: pytest.MonkeyPatch
):
    """The same log twice, as a day each, is two epochs."""
    groups = shards.groups("train")
    monkeypatch.setattr(Shards, "days", lambda self: {1: groups, 2: groups, 3: shards.groups("test")})
    kept: list[dict[str, torch.Tensor]] = []
    measure = trial.measure

    def keeping(run: Any, groups: Any) -> Any:
        kept.append(weights(run))
        return measure(run, groups)

    monkeypatch.setattr(trial, "measure", keeping)
    run_stream(config_of(root), shards, Place())
    run, _ = trained(config_of(root, epochs=2))
    assert same(kept[-1], weights(run))


def test_a_stream_is_one_pass_in_which_no_stage_ends_early(root: str):
    stages = [{**stage, "epochs": 1} for stage in config_of(root).model_dump(mode="json")["stages"]]
    config = train_config(root, stages=stages, train={"max_steps": 2, "early_stop": 1})
    streamed = streaming_config(config, num_days=6)
    assert (streamed.train.epochs, streamed.train.max_steps, streamed.train.early_stop) == (5, None, None)
    assert [stage.epochs for stage in streamed.stages] == [None] * 3


def test_missing_days_are_named_and_one_day_is_not_enough(shards: Shards, monkeypatch: pytest.MonkeyPatch):
    assert check_days(shards) == []
    days = shards.days()
    first = min(days)
    monkeypatch.setattr(Shards, "days", lambda self: {day: days[day] for day in (first, first + 2, first + 5)})
    assert check_days(shards) == [DAYS[1], DAYS[3], DAYS[4]]
    monkeypatch.setattr(Shards, "days", lambda self: {first: days[first]})
    with pytest.raises(ConfigError, match="holds 1 day; there must be two"):
        check_days(shards)


def test_the_digest_of_shards_is_that_of_their_content(root: str, shards: Shards, tmp_path: Path):
    again = Shards.open(write_shards(str(tmp_path / "again"), daily=True))
    other = Shards.open(write_shards(str(tmp_path / "other"), daily=False))
    assert again.digest() == shards.digest() != other.digest()
