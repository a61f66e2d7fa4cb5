"""`preset: paper` stands for the keys of a publication, in a stage's model and in a tower inside it."""

from typing import Any

import pytest

from raycascade import plugins
from raycascade.errors import ConfigError
from tests.model_cases import build, random_batch
from tests.tiny_shards import STAGES, train_config

PRESETS = [(model, preset) for model in plugins.names("models")
           for preset in plugins.find("models", model).Config.presets]
SMALL_ENOUGH = [(model, preset) for model, preset in PRESETS if model not in ("deepffm", "fat_deepffm")]


def model_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The model of the last stage of a config as it will be saved."""
    stages = [*STAGES[:-1], {**STAGES[-1], "model": spec}]
    return train_config("shards", stages=stages).stages[-1].model


@pytest.mark.parametrize(("model", "preset"), PRESETS)
def test_the_keys_of_a_preset_are_options_that_differ_from_the_defaults(model: str, preset: str):
    config = plugins.find("models", model).Config
    filled = plugins.options("models", {"name": model, "preset": preset}, "model")[1]
    assert filled == config(**config.presets[preset])
    assert filled != config()


@pytest.mark.parametrize(("model", "preset"), SMALL_ENOUGH)
def test_a_model_of_the_papers_size_scores(model: str, preset: str):
    options = dict(plugins.find("models", model).Config.presets[preset])
    logits = build(model, options, generic=False)(random_batch())
    assert logits.isfinite().all()


def test_keys_beside_a_preset_come_first_and_the_saved_config_names_all_of_them():
    assert model_of({"name": "deepfm", "preset": "paper", "dropout": 0.1}) == {
        "name": "deepfm", "dim": 10, "hidden": (400, 400, 400), "dropout": 0.1}


def test_a_tower_has_its_own_preset():
    spec = {"name": "mmoe", "preset": "paper", "tower": {"name": "dlrm", "preset": "code", "dim": 8}}
    assert model_of(spec) == {"name": "mmoe", "experts": 8, "tower": {
        "name": "dlrm", "dim": 8, "bottom_hidden": (512, 256, 64), "hidden": (512, 256)}}


@pytest.mark.parametrize(("model", "there"), [("deepfm", "deepfm has paper"), ("lr", "lr has none")])
def test_a_preset_that_is_not_there_is_refused_with_those_that_are(model: str, there: str):
    with pytest.raises(ConfigError, match=f"preset: there is no 'papper'; {there}"):
        model_of({"name": model, "preset": "papper"})
