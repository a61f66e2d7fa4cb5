"""The sections of a config about semantic ids: how they are learned, and what a stage makes of their tokens."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field as Option, model_validator

from raycascade import plugins
from raycascade.errors import ConfigError
from raycascade.plugins import PluginConfig
from raycascade.schema import Frozen, near_miss

NAME = r"^[a-z][a-z0-9_]*$"


class SemanticIdsOptions(Frozen):
    """Semantic ids of the items, learned by `prepare` from `content`, a vector feature of the items.

    `feature` names the field of their tokens. `rqvae` and `tokenizer` hold the options of their classes; `workers` are
    those that train. `reuse`: URI of semantic ids that are there already, which then are taken as they are.
    """

    content: str
    feature: str = Option(default="sid", pattern=NAME)
    rqvae: dict[str, Any] = {}
    tokenizer: dict[str, Any] = {}
    reuse: str = ""
    workers: int = Option(default=1, ge=1)

    def rqvae_config(self, where: str = "semantic_ids") -> PluginConfig:
        """The validated options of the model; ConfigError otherwise."""
        return plugins.options("semantic_ids", {"name": "rqvae", **self.rqvae}, f"{where}.rqvae")[1]

    def tokenizer_config(self, where: str = "semantic_ids") -> PluginConfig:
        """The validated options of the tokenizer; ConfigError otherwise."""
        return plugins.options("semantic_ids", {"name": "tokenizers", **self.tokenizer}, f"{where}.tokenizer")[1]


class StageSemanticIds(Frozen):
    """What a stage's model sees of the tokens of the semantic ids `ids`, for candidates and history alike.

    `replace`: tokens in place of the id `features`; `add`: one field whose vector is the sum of the embeddings of the
    tokens and of the `features`; `concat`: tokens beside everything else.
    """

    mode: Literal["replace", "add", "concat"] = "replace"
    features: tuple[str, ...] = ("item_id",)
    ids: str = "main"

    @model_validator(mode="after")
    def _named(self) -> "StageSemanticIds":
        if self.mode != "concat" and not self.features:
            raise ConfigError(f"semantic_ids: mode {self.mode} needs features, such as [item_id]; name them or choose "
                              "concat")
        if len(set(self.features)) < len(self.features):
            raise ConfigError(f"semantic_ids: features must differ, got {list(self.features)}")
        return self


def check_semantic_ids(
    declared: Mapping[str, SemanticIdsOptions], stages: Mapping[str, StageSemanticIds | None]
) -> None:
    """ConfigError for options that no model or tokenizer has, and for stages that name ids nobody declares."""
    for name, spec in declared.items():
        if not re.match(NAME, name):
            raise ConfigError(f"semantic_ids: {name!r} is a folder's name, too; use lower-case letters, digits and _")
        spec.rqvae_config(f"semantic_ids.{name}")
        spec.tokenizer_config(f"semantic_ids.{name}")
    features = [spec.feature for spec in declared.values()]
    if len(set(features)) < len(features):
        raise ConfigError(f"semantic_ids: the tokens of each need a feature of their own, got {features}; set feature")
    for name, option in stages.items():
        if option is not None and option.ids not in declared:
            raise ConfigError(f"stage {name!r}: semantic_ids: {option.ids!r} is not declared in the section "
                              f"semantic_ids{near_miss(option.ids, set(declared))}")
