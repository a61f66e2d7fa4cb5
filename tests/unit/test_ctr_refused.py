"""What a config cannot be trained on is said in one line, with exit status 2, before any work starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raycascade import cli, plugins
from raycascade.cascade import Cascade
from raycascade.config import Config, load_config, parse_config
from raycascade.errors import ConfigError
from raycascade.fitting import FitPart, declared_space
from raycascade.flows.prepare import open_dataset
from raycascade.schema import FeatureSchema
from raycascade.shards import Shards
from raycascade.training import loop
from raycascade.training.loop import Place, Run
from raycascade.training.objective import Objective
from raycascade.training.refusals import (
    check_stages,
    demand,
    free_bytes,
    free_of,
    refuse_labels_that_teach_nothing,
    refuse_tables_beyond_memory,
    resized,
)
from tests.ctr_table import CONFIG
from tests.model_cases import SPACE
from tests.tiny_shards import STAGES, train_config, write_shards
from tests.tiny_world import SCHEMA

CONFIGS = Path(__file__).parents[2] / "configs"
BARE = FeatureSchema.model_validate({
    "features": [{"kind": "id", "name": "item_id", "side": "item"}, {"kind": "id", "name": "city", "side": "user"},
                 {"kind": "dense", "name": "age", "side": "user"}, {"kind": "dense", "name": "price", "side": "item"}],
    "labels": ["click", "like"], "positive": "click"})
NO_ITEM = BARE.model_copy(update={"features": BARE.features[1:3]})


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert error.value.exit_status == 2
    return text


def config_of(model: dict[str, Any] | None = None, **stage: Any) -> Config:
    """A ranker alone, by default with one label."""
    plain = {} if "loss" in stage else {"loss": {"name": "bce", "label": "click"}}
    return parse_config({"dataset": {"name": "simulated"}, "stages": [
        {"name": "ranker", "keep": 1, "model": model or {"name": "deepfm"}, **plain, **stage}]}, where="test")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("shards") / "s"))


# ---------------------------------------------------------------- models and tasks
@pytest.mark.parametrize(("schema", "model", "expected"), [
    *[(BARE, {"name": name}, f"{name}: the stage sees no history") for name in ("din", "dien", "bst")],
    *[(NO_ITEM, {"name": name}, "no feature of the candidates is left") for name in ("lr", "mlp", "deepfm", "dcn_v2")],
    (BARE, {"name": "wide_deep", "crosses": ["city x item"]}, "city x item"),
    (BARE, {"name": "two_tower", "user_history": "attention"}, "user_history attention needs a history"),
    (SCHEMA, {"name": "two_tower"}, "depends on the user and the item together, which no tower sees"),
    (BARE, {"name": "gbdt"}, "gbdt has no item vectors to search a catalogue by; put a model such as two_tower first"),
])
def test_a_model_that_the_declared_features_cannot_feed_is_refused(schema: Any, model: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected) as error:
        check_stages(config_of(model, **({"loss": None} if model["name"] == "gbdt" else {})), schema)
    assert "stages.0 (ranker)" in one_line(error)


@pytest.mark.parametrize("model", [name for name in plugins.names("models") if name != "gbdt"])
def test_a_model_is_not_refused_for_values_that_only_the_log_will_show(model: str):
    """Vocabularies are empty and indicators of missing values are not known yet."""
    apart = model in ("two_tower", "int_tower", "gesr")  # a tower sees no pair
    exclude = ["pair", "income_missing"] if apart else ["income_missing"]
    check_stages(config_of({"name": model}, exclude=exclude), SCHEMA)


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.yaml")
                                         if p.name not in ("runtime_env.yaml", "serve.yaml")))
def test_the_configs_of_the_project_go_with_the_features_of_their_data(name: str):
    config = load_config(str(CONFIGS / name), [])
    check_stages(config, open_dataset(config).schema())


def test_the_declared_space_has_the_fields_of_the_fitted_one():
    fitted = FitPart(SCHEMA).finish(pa.table({"item_id": [1]}), as_of_ms=0).space
    names = {field.name for field in declared_space(SCHEMA).fields}
    assert {field.name for field in fitted.fields} < names
    assert names - {field.name for field in fitted.fields} == {"income_missing", "length_missing"}
    assert declared_space(SCHEMA)["device"].num_rows == 18  # declared buckets


def test_a_task_that_is_no_label_of_the_log_is_refused():
    fusion = {"sum": {"click": 1.0}}
    config = config_of({"name": "mmoe"}, tasks=["click", "lyke"], fusion=fusion, loss={"name": "bce"})
    with pytest.raises(ConfigError, match="tasks: 'lyke' is not a label of the log; did you mean 'like'") as error:
        check_stages(config, BARE)
    one_line(error)


# ---------------------------------------------------------------- labels
def judge(counts: dict[str, tuple[int, int]], **stage: Any) -> None:
    config = config_of(**stage)
    cascade = Cascade(config, declared_space(BARE))
    refuse_labels_that_teach_nothing(Objective(config, cascade), cascade, counts)


@pytest.mark.parametrize(("counts", "expected"), [
    ((0, 0), "the label 'click' is missing for every candidate of the training log; check the column"),
    ((1234, 0), r"the label 'click' is 0 for every candidate that has it in the training log \(1,234\)"),
    ((1234, 1234), r"the label 'click' is 1 for every candidate that has it in the training log \(1,234\)"),
])
def test_a_label_without_two_classes_is_refused_with_its_column_value_and_count(counts: Any, expected: str):
    with pytest.raises(ConfigError, match=expected) as error:
        judge({"click": counts, "like": (10, 5)})
    assert "stages ['ranker']" in one_line(error)


def test_a_label_that_no_loss_reads_may_hold_anything_and_every_task_is_looked_at():
    judge({"click": (10, 5), "like": (0, 0)})
    tasks = {"tasks": ["click", "like"], "fusion": {"sum": {"click": 1.0}}, "loss": {"name": "bce"}}
    judge({"click": (10, 5), "like": (2, 1)}, model={"name": "mmoe"}, **tasks)
    with pytest.raises(ConfigError, match="label 'like' is missing"):
        judge({"click": (10, 5), "like": (0, 0)}, model={"name": "mmoe"}, **tasks)


def test_positives_alone_do_for_a_loss_that_brings_negatives_and_no_positive_never_does():
    softmax = {"model": {"name": "two_tower"}, "loss": {"name": "softmax", "label": "click", "over": "catalogue"}}
    judge({"click": (10, 10)}, **softmax)
    with pytest.raises(ConfigError, match=r"is 0 for every candidate that has it in the training log \(10\)"):
        judge({"click": (10, 0)}, **softmax)


def test_trees_are_refused_like_losses(shards: str):
    stages = [STAGES[0], {"name": "ranker", "keep": 5, "model": {"name": "gbdt", "label": "click"}}]
    config = train_config(shards, stages=stages, loss={"name": "bce", "label": "click"})
    cascade = Cascade(config, Shards.open(shards).state.space)
    with pytest.raises(ConfigError, match="label 'click' is 1 for every candidate"):
        refuse_labels_that_teach_nothing(Objective(config, cascade), cascade, {"click": (3, 3)})


@pytest.mark.parametrize("how", ["add_requests", "add_impressions"])
def test_labels_are_counted_in_parts_merged_and_kept(tmp_path: Path, how: str):
    schema = BARE.model_copy(update={"features": ()})
    values = {"click": [1, 0, None, 1], "like": [None, None, None, None]}
    if how == "add_requests":
        kind = pa.list_(pa.int64())
        table = pa.table({"request_id": ["a", "b"], "user_id": [1, 2], "time_ms": [0, 1],
                          "candidates": [[1, 2], [3, 4]],
                          **{n: pa.array([v[:2], v[2:]], kind) for n, v in values.items()}})
    else:
        table = pa.table({"user_id": [1, 1, 2, 2], "item_id": [1, 2, 3, 4], "time_ms": [0, 1, 2, 3],
                          **{n: pa.array(v, pa.int64()) for n, v in values.items()}})
    parts = []
    for number, part in enumerate((table.slice(0, len(table) // 2), table.slice(len(table) // 2))):
        fit = FitPart(schema)
        getattr(fit, how)(part, where="test")
        fit.save(str(tmp_path / str(number)))
        parts.append(FitPart.load(str(tmp_path / str(number)), schema))
    parts[0].merge(parts[1])
    state = parts[0].finish(pa.table({"item_id": [1, 2, 3, 4]}), as_of_ms=9)
    assert state.label_counts == {"click": (3, 2), "like": (0, 0)}
    state.save(str(tmp_path / "state"))
    assert type(state).load(str(tmp_path / "state")).label_counts == state.label_counts


def test_a_pointwise_loss_over_lists_no_longer_than_k_is_told_to_name_a_label(shards: str):
    config = train_config(shards, loss={"name": "bce"}, changes={"lists": {"k": 50, "quotas": [5, 4, 3]}})
    with pytest.raises(ConfigError, match=r"lists.k = 50, but none of the first \d+ lists has more than \d+") as error:
        Run.build(config, Shards.open(shards), Place())
    assert "(click)" in one_line(error)
    Run.build(train_config(shards, loss={"name": "bce"}), Shards.open(shards), Place())  # k is 2


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("model", ["deepfm", "fat_deepffm", "lr", "wide_deep", "mmoe", "two_tower"])
def test_the_demand_found_with_a_few_rows_is_that_of_the_whole_tables(model: str):
    config = config_of({"name": model}, exclude=["pair"] if model in ("two_tower", "int_tower", "gesr") else [])
    space = resized(SPACE, {"user_id": 20_500, "item_id": 30_000})
    found = demand(config, space)["ranker"]
    assert set(found) == {"", "user_id", "item_id"}
    assert sum(found.values()) == 4 * sum(p.numel() for p in Cascade(config, space).parameters())


@pytest.mark.parametrize(("momentum", "needed", "free"), [(0.0, "27.2", 27), (0.9, "40.8", 40)])
def test_a_vocabulary_larger_than_memory_is_refused_with_its_numbers_and_what_helps(
    momentum: float, needed: str, free: int
):
    """200 million rows of a vector of 16 and a first-order weight: 17 x 4 bytes each, and a moment or two."""
    config, space = config_of({"name": "deepfm", "dim": 16}), resized(SPACE, {"user_id": 200_000_000})
    config = config.model_copy(update={"train": config.train.model_copy(update={"table_momentum": momentum})})
    with pytest.raises(ConfigError) as error:
        refuse_tables_beyond_memory(config, space, free=free * 10**9)
    text = one_line(error)
    assert "stage 'ranker': its embedding table of 'user_id' has 200,000,000 rows and takes 13.6 GB" in text
    assert f"training takes {needed} GB, but {free}.0 GB of memory are free" in text
    for way_out in ("buckets", "max_values", "min_count", "dim", "exclude"):
        assert way_out in text
    refuse_tables_beyond_memory(config, space, free=(free + 1) * 10**9)
    refuse_tables_beyond_memory(config, space, free=None)


def test_a_stage_that_does_not_read_the_vocabulary_needs_no_memory_for_it():
    space = resized(SPACE, {"user_id": 200_000_000})
    refuse_tables_beyond_memory(config_of(exclude=["user_id"]), space, free=1_000_000_000)


def test_training_stops_before_it_allocates(shards: str, monkeypatch: pytest.MonkeyPatch):
    opened = Shards.open(shards)
    monkeypatch.setattr(loop, "free_bytes", lambda device: 10_000_000)
    huge = replace(opened.state, vocabularies={
        **opened.state.vocabularies, "device": replace(opened.state.vocabularies["device"], buckets=3_000_000_000)})
    opened.__dict__["state"] = huge  # in place of the cached one
    with pytest.raises(ConfigError, match="'device' has 3,000,000,002 rows"):
        Run.build(train_config(shards), opened, Place())


MEMINFO = "MemTotal:  16000 kB\nMemFree:  500 kB\nMemAvailable:  9000 kB\n"


@pytest.mark.parametrize(("limit", "current", "stat", "expected"), [
    (None, None, None, 9000 * 1024), ("max\n", "5\n", "", 9000 * 1024),
    ("4000000\n", "3000000\n", "anon 5\ninactive_file 500000\n", 1_500_000), ("4000\n", "9000\n", "", 0),
])
def test_free_memory_is_the_lesser_of_the_machines_and_the_control_groups(
    limit: Any, current: Any, stat: Any, expected: int
):
    assert free_of(MEMINFO, limit=limit, current=current, stat=stat) == expected


def test_free_memory_is_not_guessed_where_the_system_does_not_say():
    assert free_bytes("mps") is None
    assert free_of("", limit=None, current=None, stat=None) is None


# ---------------------------------------------------------------- the command line
@pytest.mark.parametrize(("override", "expected"), [
    ("stages.ranker.model={name: din}", "din: the stage sees no history of items"),
    ("loss.label=clack", "loss.label: 'clack' is not a label of the log"),
])
def test_prepare_ends_with_one_line_and_status_two_before_it_reads_the_log(
    override: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raycascade.flows._cluster.connect", lambda address: None)  # no Ray is needed to refuse
    paths = [f"paths.{name}={tmp_path / name}" for name in ("raw", "shards", "bundles")]
    assert cli.run(["prepare", str(CONFIG), *paths, override]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]
    assert not (tmp_path / "shards").exists()
