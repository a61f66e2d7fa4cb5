"""Configs from YAML: overrides and `extends`, defaults, and every mistake answered with one line that names it."""

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
import yaml

from raycascade.config import Config, Splits, load_config, parse_config
from raycascade.errors import ConfigError

TREE: dict[str, Any] = {
    "dataset": {"name": "simulated", "num_users": 50},
    "stages": [
        {"name": "retriever", "keep": 40, "model": {"name": "two_tower", "dim": 8}},
        {"name": "ranker", "keep": 5, "model": {"name": "din"}},
    ],
    "train": {"batch_size": 64},
}


def write(folder: Path, name: str, tree: object) -> str:
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return str(path)


def refused(expected: str, folder: Path, *overrides: str, tree: object = None) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(write(folder, "run.yaml", TREE if tree is None else tree), overrides)
    assert "\n" not in str(caught.value)


def changed(**top: Any) -> dict[str, Any]:
    return {**TREE, **top}


def moment_ms(*parts: int, hours: float = 0.0) -> int:
    return round(dt.datetime(*parts, tzinfo=dt.timezone(dt.timedelta(hours=hours))).timestamp() * 1000)  # type: ignore[misc]


# ---------------------------------------------------------------- overrides
def test_an_override_changes_one_value_and_leaves_the_rest(tmp_path: Path):
    path = write(tmp_path, "run.yaml", TREE)
    before, after = load_config(path), load_config(path, ["train.epochs=3"])
    assert (before.train.epochs, after.train.epochs) == (1, 3)
    assert after.model_copy(update={"train": before.train}) == before


def test_an_override_reaches_an_entry_of_a_list_by_its_name_or_its_position(tmp_path: Path):
    path = write(tmp_path, "run.yaml", TREE)
    config = load_config(path, ["stages.ranker.keep=3", "stages.0.model.dim=16", "stages.retriever.exclude=[pair]"])
    assert [stage.keep for stage in config.stages] == [40, 3]
    assert config.stages[0].model == {"name": "two_tower", "dim": 16}
    assert config.stages[0].exclude == ("pair",)


@pytest.mark.parametrize(("text", "number"), [
    ("1e-3", 1e-3), ("3E-4", 3e-4), ("2.5e-2", 2.5e-2), (".5e1", 5.0), ("0.01", 0.01), ("1", 1.0),
])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str, number: float):
    path = write(tmp_path, "run.yaml", TREE)
    assert load_config(path, [f"train.lr={text}"]).train.lr == number
    assert load_config(path, [f"dataset.drift={text}"]).dataset["drift"] == number


@pytest.mark.parametrize("word", ["nan", "inf", "infinity", "run_7"])
def test_words_that_python_reads_as_numbers_stay_words(tmp_path: Path, word: str):
    assert load_config(write(tmp_path, "run.yaml", TREE), [f"train.run={word}"]).train.run == word


def test_an_exponent_in_the_file_itself_is_a_number_too(tmp_path: Path):
    path = write(tmp_path, "run.yaml", yaml.safe_dump(TREE) + "lists: {k: 5}\n")
    Path(path).write_text(Path(path).read_text().replace("batch_size: 64", "lr: 1e-3"))
    assert load_config(path).train.lr == 1e-3


def test_an_empty_value_is_null_and_a_whole_mapping_can_be_given(tmp_path: Path):
    config = load_config(write(tmp_path, "run.yaml", TREE), ["train.clip=", "loss={name: lcron, temperature: 5}"])
    assert config.train.clip is None
    assert config.loss == {"name": "lcron", "temperature": 5}


@pytest.mark.parametrize(("override", "expected"), [
    ("train.epochs", "expected key.path=value"), ("=3", "expected key.path=value"),
    ("train.epochs=[1", "not valid YAML"), ("stages.rankr.keep=3", "no entry 'rankr'; did you mean 'ranker'"),
    ("stages.7.keep=3", "no entry '7'"), ("train.epochs.more=3", "train.epochs: .*valid integer"),
    ("train.batch_size.more=3", "'more' is below 64, which is not a mapping"),
])
def test_an_override_that_cannot_be_applied_is_named(tmp_path: Path, override: str, expected: str):
    refused(expected, tmp_path, override)


# ---------------------------------------------------------------- extends
def test_extends_lays_the_file_over_its_base_and_the_overrides_over_both(tmp_path: Path):
    base = changed(train={"batch_size": 64, "epochs": 4}, loss={"name": "lcron", "temperature": 9})
    write(tmp_path, "base.yaml", base)
    (tmp_path / "runs").mkdir()
    top = {"extends": "../base.yaml", "train": {"epochs": 5}, "loss": {"name": "bce"}}
    config = load_config(write(tmp_path / "runs", "run.yaml", top), ["train.seed=1"])
    assert (config.train.batch_size, config.train.epochs, config.train.seed) == (64, 5, 1)
    assert config.loss == {"name": "bce"}, "options of another plug-in must not stay"
    assert [stage.name for stage in config.stages] == ["retriever", "ranker"]


def test_extends_is_one_level_deep(tmp_path: Path):
    write(tmp_path, "oldest.yaml", TREE)
    write(tmp_path, "base.yaml", {"extends": "oldest.yaml"})
    refused("extends base.yaml, which extends another file; one level", tmp_path, tree={"extends": "base.yaml"})


def test_a_base_that_is_not_there_is_named(tmp_path: Path):
    message = r"nothing.yaml: cannot be read .*give the path of a YAML config"
    refused(message, tmp_path, tree={"extends": "nothing.yaml"})


# ---------------------------------------------------------------- keys and values
@pytest.mark.parametrize(("tree", "expected"), [
    (changed(trian={}), "trian: unknown key; did you mean 'train'"),
    (changed(train={"epoch": 2}), "train.epoch: unknown key; did you mean 'epochs'"),
    (changed(train={"negatives": {"per_reqest": 2}}), "unknown key; did you mean 'per_request'"),
    (changed(stages=[{**TREE["stages"][0], "kep": 2}]), "stages.0.kep: unknown key; did you mean 'keep'"),
    (changed(stages=[{**TREE["stages"][0], "model": {"name": "two_tower", "dimm": 2}}]),
     "stages.0.model.dimm: unknown key; did you mean 'dim'"),
    (changed(stages=[{**TREE["stages"][0], "model": {"name": "two_towr"}}]), "did you mean 'two_tower'"),
    (changed(loss={"name": "lcrom"}), "there is no 'lcrom'; did you mean 'lcron'"),
    (changed(dataset={"name": "simulatd"}), "did you mean 'simulated'"),
    (changed(dataset={"name": "simulated", "num_user": 5}), "dataset.num_user: unknown key; did you mean 'num_users'"),
    (changed(dataset="simulated"), "dataset"),
    (changed(index={"nam": "exact"}), "index: expected a mapping with a name"),
    (changed(train={"lr": -1}), "train.lr: .*greater than 0; got -1"),
    (changed(train={"epochs": 1.5}), "train.epochs: .*got 1.5"),
    (changed(stages=[]), "stages: .*at least 1"),
    ({key: value for key, value in TREE.items() if key != "dataset"}, "dataset: missing; add it"),
])
def test_an_unknown_key_or_a_wrong_value_is_named_with_the_near_miss(tmp_path: Path, tree: dict, expected: str):
    refused(expected, tmp_path, tree=tree)


def test_every_kind_of_feature_of_a_table_is_known_and_another_one_is_named(tmp_path: Path):
    features = [{"kind": "idd", "name": "city", "side": "user"}]
    refused("dataset.features.0.*'idd'", tmp_path, tree=changed(dataset={"name": "table", "features": features}))


# ---------------------------------------------------------------- impossible funnels
@pytest.mark.parametrize(("keeps", "possible"), [((40, 5), True), ((5, 5), True), ((5, 40), False)])
def test_keep_must_not_grow_along_the_stages(keeps: tuple[int, int], possible: bool):
    stages = [{**stage, "keep": keep} for stage, keep in zip(TREE["stages"], keeps, strict=True)]
    if possible:
        assert [stage.keep for stage in parse_config(changed(stages=stages), where="run").stages] == list(keeps)
        return
    with pytest.raises(ConfigError, match="'ranker' keeps 40 but 'retriever' hands on only 5"):
        parse_config(changed(stages=stages), where="run")


def test_quotas_are_one_positive_number_a_stage_that_does_not_grow(tmp_path: Path):
    assert parse_config(TREE, where="run").quotas == (40, 5)
    assert parse_config(changed(lists={"quotas": [30, 20]}), where="run").quotas == (30, 20)
    refused("lists.quotas: 1 widths for 2 stages", tmp_path, tree=changed(lists={"quotas": [30]}))
    for quotas in ([5, 30], [5, 0]):
        refused("lists.quotas: .* must not grow along the stages", tmp_path, tree=changed(lists={"quotas": quotas}))


def test_stage_names_differ_and_are_plain_words(tmp_path: Path):
    refused("names must differ", tmp_path, tree=changed(stages=[TREE["stages"][0]] * 2))
    refused("stages.0.name: ", tmp_path, tree=changed(stages=[{**TREE["stages"][0], "name": "../x"}]))


# ---------------------------------------------------------------- splits
def test_splits_are_half_open_ranges_in_order_of_time():
    splits = Splits(train_from="2024-01-01", valid_from="2024-01-07", test_from="2024-01-08", test_until="2024-01-09")
    days = [moment_ms(2024, 1, day) for day in (1, 7, 8, 9)]
    assert splits.ranges_ms() == {"train": (days[0], days[1]), "valid": (days[1], days[2]), "test": (days[2], days[3])}
    assert list(Splits(test_from="2024-01-08").ranges_ms()) == ["train", "test"]
    assert list(Splits().ranges_ms()) == ["train"]
    ranges = list(Splits(valid_from="2024-01-08").ranges_ms().values())
    assert ranges[0][1] == ranges[1][0] == days[2]
    assert ranges[0][0] < -(10**15)
    assert ranges[1][1] > 10**15


@pytest.mark.parametrize(("text", "hours", "expected"), [
    ("2022-04-30", 0.0, moment_ms(2022, 4, 30)),
    ("2022-04-30", 8.0, moment_ms(2022, 4, 30, hours=8)),
    ("2022-04-30", -5.5, moment_ms(2022, 4, 30, hours=-5.5)),
    ("2022-04-30T06:30", 8.0, moment_ms(2022, 4, 30, 6, 30, hours=8)),
    ("2022-04-30T06:30Z", 8.0, moment_ms(2022, 4, 30, 6, 30)),  # a zone of its own goes first
    ("2022-04-30T06:30+02:00", 8.0, moment_ms(2022, 4, 30, 6, 30, hours=2)),
])
def test_a_date_is_a_midnight_of_the_splits_zone_unless_it_names_one(text: str, hours: float, expected: int):
    assert Splits(test_from=text, utc_offset_hours=hours).moment_ms("test_from") == expected


def test_dates_may_be_dates_of_yaml_and_overrides(tmp_path: Path):
    dates = "splits: {valid_from: 2024-01-07, test_from: 2024-01-08 12:00:00}\n"
    path = write(tmp_path, "run.yaml", yaml.safe_dump(TREE) + dates)
    splits = load_config(path, ["splits.test_until=2024-02-01"]).splits
    assert [splits.moment_ms(n) for n in ("valid_from", "test_from", "test_until")] == [
        moment_ms(2024, 1, 7), moment_ms(2024, 1, 8, 12), moment_ms(2024, 2, 1)]


def test_splits_out_of_order_or_with_something_else_than_a_date_are_refused(tmp_path: Path):
    wrong = {"valid_from": "2024-01-08", "test_from": "2024-01-08"}
    refused(r"valid_from \(2024-01-08\) must lie before test_from", tmp_path, tree=changed(splits=wrong))
    refused("splits.test_from: expected an ISO date such as 2022-04-30, got 'soon'", tmp_path, "splits.test_from=soon")


# ---------------------------------------------------------------- files
@pytest.mark.parametrize(("text", "expected"), [
    ("a: [1", "run.yaml: not valid YAML"), ("- 1\n- 2\n", "expected a mapping of options, got list"),
    ("\n", "expected a mapping of options, got NoneType"), ("a: b: c\n", "run.yaml: not valid YAML"),
])
def test_a_file_that_is_no_mapping_of_yaml_is_refused(tmp_path: Path, text: str, expected: str):
    refused(expected, tmp_path, tree=text)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nothing.yaml"):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_config(str(path))
        assert "\n" not in str(caught.value)


def test_the_config_is_frozen_and_comes_back_from_its_own_dump():
    config = parse_config(TREE, where="run")
    with pytest.raises(Exception, match="frozen"):
        config.train = config.train  # type: ignore[misc]
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_paths_are_absolute_and_an_empty_one_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(changed(paths={"shards": "here", "bundles": "s3://bucket/b"}), where="run")
    assert config.paths.model_dump() == {"raw": "", "shards": str(tmp_path / "here"), "bundles": "s3://bucket/b"}
