"""A funnel that the data cannot fill is refused before anything is trained."""

from pathlib import Path

import pytest

from raycascade.config import load_config
from raycascade.errors import ConfigError
from raycascade.flows.train import check_funnel

CONFIG = load_config(str(Path(__file__).parents[2] / "configs" / "demo.yaml"))


def test_a_first_stage_that_keeps_more_than_the_catalogue_is_refused():
    keep = CONFIG.stages[0].keep
    check_funnel(CONFIG, keep)
    with pytest.raises(ConfigError, match=rf"'retriever' keeps {keep}, but the catalogue has {keep - 1} items"):
        check_funnel(CONFIG, keep - 1)
