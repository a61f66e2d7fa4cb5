"""Bundles of the hand-made log whose later stages encode items: two_tower -> int_tower -> gesr, with random weights."""

from typing import Any

import torch

from raycascade.bundle import save_bundle
from raycascade.cascade import Cascade
from raycascade.config import Config, parse_config
from raycascade.items import ItemTable
from tests.tiny_world import KEEPS, encoded_users, fitted, raw_items

CHANGING = ("age", "views")  # item fields that depend on the moment
SMALL = {"dim": 4, "width": 8, "vector_dim": 6, "key_dim": 4, "value_dim": 3, "seeds": 2, "gate_rank": 5,
         "match_dim": 3, "hidden": [8]}
MODELS = {"retriever": {"name": "two_tower", "dim": 8, "hidden": [16]},
          "pre_ranker": {"name": "int_tower", "dim": 8, "hidden": [16, 8], "heads": 2, "head_dim": 4},
          "ranker": {"name": "gesr", **SMALL}}


def config(*, exclude: tuple[str, ...] = CHANGING, models: dict[str, dict[str, Any]] | None = None,
           **options: Any) -> Config:
    """Three stages that see nothing of user and item together; `options` are of the later two."""
    stages = [{"name": name, "keep": keep, "model": (models or MODELS)[name], "exclude": ["pair", *exclude],
               **({} if name == "retriever" else options)} for name, keep in KEEPS.items()]
    return parse_config({"dataset": {"name": "simulated"}, "stages": stages}, where="early")


def cascade_of(chosen: Config, *, seed: int = 11) -> Cascade:
    """Weights so large that scores differ."""
    torch.manual_seed(seed)
    cascade = Cascade(chosen, fitted().space)
    with torch.no_grad():
        for parameter in cascade.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        for module in cascade.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight[0] = 0.0  # padding
    return cascade.eval()


def write_bundle(uri: str, chosen: Config, *, seed: int = 11) -> str:
    """The same seed gives the same weights, whatever the options of the stages."""
    state = fitted()
    encoded = state.encode_items(raw_items(), where="tiny")
    return save_bundle(uri, config=chosen, cascade=cascade_of(chosen, seed=seed), encoded_items=encoded,
                       items=ItemTable.from_encoded(encoded, state), users=encoded_users(state), metrics={})
