"""Comparisons: statistics against hand-worked figures, which runs are the same, and which are still to be run."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from raycascade.comparison import Record, Trial, chosen, complete, paired_t_test, plan, ranked, run_key, summarise
from raycascade.comparison_page import brief_sheets, csv_of, render_comparison, sheets
from raycascade.config import Config, parse_config
from raycascade.errors import ConfigError

METRIC = "joint_recall@10@20"
STAGES = [{"name": "retriever", "keep": 30, "model": {"name": "two_tower"}},
          {"name": "ranker", "keep": 20, "model": {"name": "mlp"}}]


def config(**sections: Any) -> Config:
    return parse_config({"dataset": {"name": "simulated"}, "stages": STAGES, **sections}, where="test")


def key(parsed: Config, *, shards: str = "s", streaming: bool = False, gpu: bool = False) -> str:
    return run_key(parsed, shards=shards, streaming=streaming, gpu=gpu)


def trials(*, losses: Sequence[str] = ("bce", "lcron"), seeds: int = 2, **sections: Any) -> list[Trial]:
    compared = chosen(config(**sections), losses=losses, seeds=seeds)
    return plan(compared, shards="s", streaming=False, gpu=False)


def record(value: float, **more: float) -> Record:
    return {"metrics": {METRIC: value, **more}, "requests": 5, "seconds": 2.0, "rows_per_s": 10.0, "peak_gb": 0.5}


# ---------------------------------------------------------------- statistics
def test_the_paired_t_test_gives_the_published_oracle():
    a = (.8731, .8735, .8729, .8738, .8727)
    clear = paired_t_test(a, (.8712, .8716, .8705, .8719, .8710))
    assert (clear["t"], clear["p"]) == pytest.approx((16.806861, 7.345541e-5), rel=1e-6)
    assert clear["significant"]
    chance = paired_t_test(a, (.8729, .8737, .8724, .8739, .8722))
    assert (chance["t"], chance["p"]) == pytest.approx((1.230455, .285939), rel=2e-6)
    assert not chance["significant"]


def test_the_t_test_is_two_sided_and_turns_its_sign_with_the_sides():
    a, b = (.5, .7, .6), (.4, .5, .7)
    one, other = paired_t_test(a, b), paired_t_test(b, a)
    assert one["p"] == other["p"]
    assert one["t"] == -other["t"]


@pytest.mark.parametrize(("a", "b", "p"), [
    ((.5, .5), (.5, .5), 1.0), ((.5, .75), (.25, .5), 0.0), ((.5,), (.4,), None),
])
def test_without_variance_or_pairs_there_is_no_t(a: tuple[float, ...], b: tuple[float, ...], p: float | None):
    found = paired_t_test(a, b)
    assert found["t"] is None
    assert found["p"] == p


def summary(values: dict[str, list[float]], *, baseline: str | None = None, metric: str = METRIC) -> dict[str, Any]:
    runs = trials(losses=list(values), seeds=len(next(iter(values.values()))))
    first = runs[0].seed
    records = {run: record(values[run.label][run.seed - first], other=1 - values[run.label][run.seed - first])
               for run in runs}
    return summarise(records, metric=metric, baseline=baseline)


def test_an_objective_has_the_mean_and_the_sample_deviation_of_its_seeds():
    found = summary({"bce": [.1, .3], "lcron": [.5, .9]})
    assert found["objectives"]["bce"]["metrics"][METRIC]["mean"] == pytest.approx(.2)
    assert found["objectives"]["bce"]["metrics"][METRIC]["std"] == pytest.approx(.02 ** .5)  # two times .01, over 2 - 1
    assert found["objectives"]["bce"]["metrics"][METRIC]["values"] == [.1, .3]
    assert found["best"] == "lcron"
    assert found["tests"]["lcron"]["metrics"][METRIC]["difference"] == pytest.approx(.5)
    assert found["tests"]["lcron"]["metrics"]["other"]["difference"] == pytest.approx(-.5)


def test_every_objective_is_tested_against_the_best_of_the_others_or_the_baseline():
    values = {"bce": [.1, .3], "lcron": [.5, .9], "softmax": [.4, .4]}
    against = {label: test["against"] for label, test in summary(values)["tests"].items()}
    assert against == {"bce": "lcron", "lcron": "softmax", "softmax": "lcron"}
    against = {label: test["against"] for label, test in summary(values, baseline="bce")["tests"].items()}
    assert against == {"lcron": "bce", "softmax": "bce"}


def test_only_seeds_that_both_have_are_paired():
    runs = trials(seeds=3)
    values = {("bce", 7): .1, ("bce", 8): .9, ("bce", 9): .2, ("lcron", 7): .3, ("lcron", 9): .5}
    records = {run: record(values[run.label, run.seed]) for run in runs if (run.label, run.seed) in values}
    test = summarise(records, metric=METRIC, baseline=None)["tests"]["lcron"]
    assert test["seeds"] == 2
    assert test["metrics"][METRIC]["difference"] == pytest.approx((.2 + .3) / 2)


def test_a_single_objective_and_a_single_seed_have_no_test_and_no_deviation():
    found = summary({"bce": [.1]})
    assert found["tests"] == {}
    assert found["objectives"]["bce"]["metrics"][METRIC]["std"] is None
    json.dumps(found, allow_nan=False)


def test_losses_count_down():
    found = {"bce": {"metrics": {"lost/ranker": {"mean": .1}}}, "lcron": {"metrics": {"lost/ranker": {"mean": .2}}}}
    assert ranked(found, "lost/ranker") == ["bce", "lcron"]


def test_a_metric_that_was_not_measured_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match=r"compare.metric: 'joint_recall@10@2' .*joint_recall@10@20"):
        summary({"bce": [.1]}, metric="joint_recall@10@2")


# ---------------------------------------------------------------- which runs there are
def test_a_named_loss_is_the_label_the_configs_own_loss_or_the_loss_with_its_defaults():
    base = config(loss={"name": "lcron", "temperature": 20}, compare={"objectives": {"sharp": {"name": "lcron",
                                                                                              "temperature": 1}}})
    named = chosen(base, losses=["sharp", "lcron", "bce"]).compare.objectives
    assert named == {"sharp": {"name": "lcron", "temperature": 1}, "lcron": {"name": "lcron", "temperature": 20},
                     "bce": {"name": "bce"}}
    assert chosen(base).compare.objectives == {"sharp": {"name": "lcron", "temperature": 1}}


def test_mistakes_in_what_is_compared_are_errors():
    with pytest.raises(ConfigError, match="there is no objective"):
        chosen(config())
    with pytest.raises(ConfigError, match="did you mean 'lcron'"):
        chosen(config(), losses=["lcrn"])
    with pytest.raises(ConfigError, match="baseline: 'bce' is not compared"):
        chosen(config(compare={"baseline": "bce"}), losses=["lcron"])
    with pytest.raises(ConfigError, match=r"compare.objectives.a.temperatur: unknown key"):
        config(compare={"objectives": {"a": {"name": "lcron", "temperatur": 2}}})


def test_the_runs_are_all_objectives_of_a_seed_before_the_next_seed():
    runs = trials(train={"seed": 3, "run": "mine", "workers": 2})
    assert [(run.label, run.seed) for run in runs] == [("bce", 3), ("lcron", 3), ("bce", 4), ("lcron", 4)]
    for run in runs:
        assert (run.config.loss["name"], run.config.train.seed) == (run.label, run.seed)
        assert (run.config.train.run, run.config.train.workers) == (None, 1)
    assert len({run.key for run in runs}) == 4


@pytest.mark.parametrize("sections", [
    {"paths": {"bundles": "elsewhere"}}, {"index": {"name": "hnsw"}}, {"expect": {"x": 1.0}},
    {"train": {"checkpoint_steps": 3, "run": "x"}}, {"compare": {"seeds": 9, "cpus_per_run": 2}},
    {"evaluate": {"popularity_hours": 3}}, {"loss": {"name": "bce", "label": None}},
    {"stages": [{**STAGES[0], "model": {"name": "two_tower", "dim": 16}}, STAGES[1]]},
])
def test_what_cannot_change_the_figures_does_not_make_another_run(sections: dict[str, Any]):
    assert key(config(**sections)) == key(config())


@pytest.mark.parametrize("sections", [
    {"train": {"seed": 8}}, {"train": {"lr": 0.1}}, {"loss": {"name": "lcron"}}, {"lists": {"k": 5}},
    {"loss": {"name": "bce", "entry_levels": [0, 1]}}, {"evaluate": {"max_requests": 9}},
    {"stages": [{**STAGES[0], "model": {"name": "two_tower", "dim": 8}}, STAGES[1]]},
    {"stages": [{**STAGES[0], "loss": {"name": "softmax"}}, STAGES[1]]},
])
def test_what_can_change_the_figures_makes_another_run(sections: dict[str, Any]):
    assert key(config(**sections)) != key(config())


def test_other_data_another_device_and_streaming_are_other_runs():
    keys = {key(config()), key(config(), shards="t"), key(config(), gpu=True), key(config(), streaming=True)}
    assert len(keys) == 4


# ---------------------------------------------------------------- what is still to be run
class Runs:
    """A runner that notes what it was given; it fails, or stops, where it is told to."""

    def __init__(self, *, fails: Sequence[tuple[str, int]] = (), stops_before: int | None = None) -> None:
        self.given: list[tuple[str, int]] = []
        self.fails, self.stops_before = fails, stops_before

    def __call__(self, runs: Sequence[Trial]) -> Iterator[tuple[Trial, Record]]:
        for number, run in enumerate(runs):
            if number == self.stops_before:
                raise KeyboardInterrupt
            self.given.append((run.label, run.seed))
            yield run, {"problem": "diverged"} if self.given[-1] in self.fails else record(run.seed / 10)


ALL = [("bce", 7), ("lcron", 7), ("bce", 8), ("lcron", 8)]


def test_finished_runs_are_not_run_again(tmp_path: Path):
    first, second = Runs(), Runs()
    before, _ = complete(trials(), str(tmp_path), first)
    after, _ = complete(trials(), str(tmp_path), second)
    assert first.given == ALL
    assert second.given == []
    assert [found["metrics"] for found in after.values()] == [found["metrics"] for found in before.values()]


def test_an_interrupted_comparison_goes_on_with_the_runs_that_are_missing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        complete(trials(), str(tmp_path), Runs(stops_before=3))
    rest = Runs()
    records, _ = complete(trials(), str(tmp_path), rest)
    assert rest.given == ALL[3:]
    assert [(run.label, run.seed) for run in records] == ALL


def test_more_seeds_and_objectives_only_run_what_is_new(tmp_path: Path):
    complete(trials(), str(tmp_path), Runs())
    more = Runs()
    complete(trials(losses=["softmax", "bce", "lcron"], seeds=3), str(tmp_path), more)
    assert sorted(more.given) == [("bce", 9), ("lcron", 9), ("softmax", 7), ("softmax", 8), ("softmax", 9)]


def test_a_failed_run_is_told_in_a_line_and_tried_again_and_the_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records, failed = complete(trials(), str(tmp_path), Runs(fails=[("lcron", 7)]))
    assert {(run.label, run.seed): problem for run, problem in failed.items()} == {("lcron", 7): "diverged"}
    assert len(records) == 3
    assert "compare: lcron seed 7 failed: diverged\n" in capsys.readouterr().err
    again = Runs()
    complete(trials(), str(tmp_path), again)
    assert again.given == [("lcron", 7)]


# ---------------------------------------------------------------- tables, CSV and page
def result(*, streaming: bool = False) -> dict[str, Any]:
    found = summary({"bce": [.1, .3], "lcron": [.5, .9]})
    if streaming:
        for label, objective in found["objectives"].items():
            metrics = [{METRIC: {"mean": value, "std": None, "values": [value]}} for value in (.25, .75)]
            objective["curve"] = [{"day": f"2024-01-0{i}", "requests": 3, "metrics": metrics[i] if label else {}}
                                  for i in range(2)]
    return {"out": "o", **found, "streaming": streaming, "failed": {"bce seed 9": "a < b"}, "shards": "s",
            "raycascade": "1", "loss": {"bce": {"name": "bce"}, "lcron": {"name": "lcron"}}}


def test_the_first_table_ranks_the_objectives_with_their_tests():
    (_, columns, rows), *_ = sheets(result())
    best = dict(zip(columns, rows[0], strict=True))
    assert [row[0] for row in rows] == ["lcron", "bce"]
    assert (best["mean ± std"], best["difference"], best["from"]) == ("0.7000 ± 0.2828", "+0.5000", "bce")
    assert (best["t"], best["p"]) == ("5.0000", "0.1257")  # differences .4 and .6: mean .5, standard error .1


def test_what_a_terminal_shows_is_eighty_columns_wide():
    found = result()
    found["objectives"]["fs_plackett_luce"] = found["objectives"].pop("bce")
    found["tests"]["fs_plackett_luce"] = found["tests"].pop("bce")
    (_, columns, rows), _ = brief_sheets(found)
    assert columns == ["objective", "mean ± std", "difference", "from", "p"]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    assert sum(widths) + 3 * len(widths) <= 80


def test_the_csv_has_a_line_per_objective_and_metric_with_the_values_of_all_seeds():
    lines = list(csv.DictReader(io.StringIO(csv_of(result()))))
    assert [(line["objective"], line["metric"]) for line in lines] == [
        ("bce", METRIC), ("bce", "other"), ("lcron", METRIC), ("lcron", "other")]
    assert (float(lines[2]["seed_7"]), float(lines[2]["seed_8"])) == (.5, .9)
    assert float(lines[2]["t"]) == pytest.approx(5.0)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_page_is_one_file_with_one_figure_and_escapes_its_text(streaming: bool):
    page = render_comparison(result(streaming=streaming))
    assert page.count("<figure>") == 1
    assert "a &lt; b" in page
    assert "a < b" not in page
    assert "src=" not in page
    assert "<script" not in page
    assert page.count("<circle") == 4  # a dot per seed, or per day
    if streaming:
        assert "on the last day, 2024-01-01: lcron 0.7500, bce 0.7500" in page
