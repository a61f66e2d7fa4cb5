"""The comparison of early-stage rankers: arms that differ in one part, and tables that say what was measured."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raycascade.config import parse_config
from raycascade.datasets.kuairand import KuairandDataset
from raycascade.datasets.simulated import Simulated

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The scripts find one another in their folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield import_module("_early_arms"), import_module("_early_report")
    finally:
        sys.path.remove(str(BENCHMARKS))


Modules = tuple[ModuleType, ModuleType]


def test_every_arm_makes_a_valid_cascade_and_sees_nothing_of_an_item_that_a_moment_changes(modules: Modules):
    arms = modules[0]
    schemas = {"simulated": Simulated(Simulated.Config()).schema(),
               "kuairand": KuairandDataset(KuairandDataset.Config(), raw="").schema()}
    for data, schema in schemas.items():
        log = arms.LOGS[data]
        timed = arms.timed_features(schema)
        assert len(timed) >= 2
        for arm in arms.ARMS:
            stages = [arms.stage_of(name, log, schema) for name in ("retriever", arm, "ranker")]
            config = parse_config({"dataset": {"name": "simulated"}, "stages": stages}, where="test")
            assert tuple(stage.name for stage in config.stages) == arms.STAGES
            assert tuple(stage.keep for stage in config.stages) == arms.KEEPS
            assert {*timed, *log.left_out} < set(config.stages[1].exclude)
            assert {feature.name for feature in schema.features} >= {*log.left_out}


def test_a_gesr_without_a_part_differs_in_that_part_alone(modules: Modules):
    arms = modules[0]
    for part in arms.PARTS:
        assert {**arms.GESR, part: False} == arms.ARMS[f"gesr without {part}"]
    assert {k: v for k, v in arms.ARMS[arms.CACHED_BASE].items() if k not in arms.PARTS} == arms.GESR


def run(arm: str, seed: int, stage: float, whole: float) -> dict[str, Any]:
    return {"kind": "quality", "data": "toy", "arm": arm, "seed": seed, "positives": 1_234, "requests": 567,
            "recall@500": 0.9, "recall@100": stage, "recall@20": whole, "recall@100/retriever": 0.5,
            "ranker_agrees": 0.8, "parameters": 4_321, "train_seconds": 12.0}


def test_gains_are_means_of_the_differences_of_the_same_seeds(modules: Modules):
    runs = [run("two_tower", 1, 0.50, 0.20), run("two_tower", 2, 0.54, 0.22), run("gesr", 1, 0.53, 0.21),
            run("gesr", 2, 0.55, 0.25)]
    table = modules[1].quality_table(runs)
    assert "1,234 held-out positives of 567 requests; the retriever alone, cut to 100: 0.5000" in table
    assert "| gesr | 2 | 0.5400 ± 0.0141 | +0.0200 ± 0.0141 | 0.2300 ± 0.0283 | +0.0200 ± 0.0141 | 0.8000" in table


def test_speed_is_requests_a_second_of_the_stage_with_the_model_alone_beside_it(modules: Modules, tmp_path: Path):
    def times(stage: float, kernel: float) -> dict[str, float]:
        return {"stage_mean": stage, "stage_p50": stage, "stage_p95": 2 * stage, "stage_processor_p50": stage,
                "kernel_p50": kernel}

    line = {"kind": "speed", "data": "toy", "device": "cpu", "torch": "2", "requests": 64, "rounds": 9,
            "candidates": 500, "threads": 1, "cached": ["gesr", "gesr, towers alone"],
            "milliseconds": {"two_tower": times(4.0, 1.0), "gesr": times(5.0, 3.0),
                             "gesr, towers alone": times(2.0, 0.5)}}
    table = modules[1].speed_table(line)
    assert "| gesr | from the bundle | 200 | -20% | -60% | 5.00 | 10.00 | 5.00 | 3.00 | 3.00 | 6.00 |" in table
    assert "| two_tower | no | 250 | - | -50% |" in table
    page = tmp_path / "page.md"
    modules[1].write_report(page, [run("two_tower", 1, 0.5, 0.2), line])
    assert "### toy: what it costs (cpu)" in page.read_text()
    row = (tmp_path / "page.csv").read_text().splitlines()[1]
    assert row == "toy,two_tower,1,1234,0.900000,0.500000,0.200000,0.800000,0.500000"
