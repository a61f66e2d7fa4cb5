"""The simulated world in RecFlow's protocol: lists, relevance and features, and the configs that compare on them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade.config import Config, load_config
from raycascade.datasets.simulated import Simulated
from raycascade.errors import ConfigError
from raycascade.flows import prepare as flow
from raycascade.shards import Shards
from raycascade.training.loop import Place
from raycascade.trial import run_once

CONFIGS = {"two": "compare_two_stage.yaml", "three": "compare_three_stage.yaml"}
SMALL = {"num_users": 128, "num_items": 400, "num_days": 2}
TINY = ["dataset.num_users=100", "dataset.num_items=400", "dataset.num_days=2", "dataset.history_len=6",
        "dataset.requests_per_user_day=1", "splits.test_from=2024-01-02", "train.batch_size=64", "train.max_steps=2",
        "loss.name=bce"]


def read(**options: object) -> tuple[pa.Table, dict[str, np.ndarray]]:
    log = Simulated(Simulated.Config.model_validate({**SMALL, **options}))
    table = pa.concat_tables([part for piece in log.slices() for part in log.read(piece)]).combine_chunks()
    names = ("candidates", "reached", "rank", "exposed", *(["relevance"] if "relevance" in table.column_names else []))
    lists = {name: table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
             for name in names}
    return table, lists


@pytest.mark.parametrize(("levels", "width", "negatives"), [(4, 40, [5, 6, 7]), (5, 50, [5, 6, 7, 8])])
def test_lists_in_the_protocol_rank_the_top_group_and_tie_every_other(levels: int, width: int, negatives: list[int]):
    _, lists = read(levels=levels, relevance="recflow")
    assert lists["relevance"].shape[1] == width
    top_QC = lists["reached"] == levels - 1
    assert (top_QC.sum(1) == 10).all()
    for level, relevance in enumerate(negatives):
        below_QC = lists["reached"] == level
        assert (below_QC.sum(1) == 10).all()
        assert (lists["relevance"][below_QC] == relevance).all()
        assert (lists["rank"][below_QC] == 0).all(), "an unranked group must not tell a rank"
    ranked = np.sort(lists["relevance"][top_QC].reshape(-1, 10), axis=1)
    assert (ranked == np.arange(20, 30)).all()
    assert (lists["relevance"] == 30 - lists["rank"])[top_QC].all()


def test_the_protocol_changes_what_is_said_of_a_list_and_nothing_that_happened():
    for levels in (4, 5):
        plain, before = read(levels=levels)
        graded, after = read(levels=levels, relevance="recflow")
        same = [name for name in plain.column_names if name != "rank"]
        assert plain.select(same).equals(graded.select(same))
        top_QC = before["reached"] == levels - 1
        ranks_agree = (before["rank"] == after["rank"])[top_QC].mean()
        # Re-ranking orders the page. Of five levels it also chooses the top one, of four ranking does.
        assert ranks_agree == 1 if levels == 5 else 0.1 < ranks_agree < 0.9


def test_features_of_recflow_are_ids_times_and_the_history_alone():
    every, few = (Simulated(Simulated.Config.model_validate({"features": name})).schema() for name in
                  ("every", "recflow"))
    assert {f.kind for f in few.features} == {"id", "ids", "clock", "age", "history"}
    assert [f for f in every.features if f in few.features] == list(few.features)
    assert (few.labels, few.positive) == (every.labels, every.positive)


def test_more_ranked_candidates_than_the_codes_leave_room_for_are_refused():
    wide = {"per_level": 21, "pool": 900, "funnel": (100, 70, 50), "num_items": 2000}
    assert Simulated.Config.model_validate(wide).per_level == 21
    with pytest.raises(ConfigError, match="at most 20 candidates above the tied levels, got per_level 21"):
        Simulated.Config.model_validate({**wide, "relevance": "recflow"})


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Config]:
    """A reference config with a tiny world, and its shards."""
    folder = tmp_path_factory.mktemp(request.param)
    path = Path(__file__).parents[2] / "configs" / CONFIGS[request.param]
    config = load_config(str(path), [*TINY, f"paths.shards={folder}"])
    patch = pytest.MonkeyPatch()
    with patch.context() as changed:
        changed.setattr(flow, "each", lambda function, elements, notes: [function(element) for element in elements])
        flow.prepare(config)
    return request.param, config


def test_reference_configs_hold_the_protocol_and_every_objective_to_compare(tiny: tuple[str, Config]):
    depth, config = tiny
    widths = {"two": (30, 20), "three": (40, 30, 20)}[depth]
    assert (config.lists.k, config.quotas) == (10, widths)
    assert config.train.order == "time"
    assert config.compare.seeds == 5
    assert {spec["name"] for spec in config.compare.objectives.values()} == {
        "bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron",
        "fs_plackett_luce"}
    assert {stage.model["dim"] for stage in config.stages} == {8}


def test_every_objective_of_a_reference_config_trains_a_tiny_version_of_it(tiny: tuple[str, Config]):
    _, config = tiny
    torch.manual_seed(0)
    shards = Shards.open(config.paths.shards)
    groups = list(shards.groups("test"))
    for label, spec in config.compare.objectives.items():
        result = run_once(config.model_copy(update={"loss": spec}), shards, Place(), groups=groups)
        assert 0.3 < result["metrics"]["joint_recall@10@20"] < 1, label
        assert result["metrics"]["lost/ranker"] > 0, label
        assert result["requests"] > 30
