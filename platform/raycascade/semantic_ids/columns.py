"""Semantic ids as features: what a config declares, the columns of the encoded items, and what of them a stage sees.

The tokens of the semantic ids `main` are rows of the table `semantic_ids/main`. A sum with ids is a feature of its own
with the table `semantic_ids/main+item_id`: first all rows of tokens, then those of the ids, so that adding up a bag of
rows is all that a model has to do. Nothing here is known to models.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from raycascade.config import Config, Stage
from raycascade.errors import BundleError, ConfigError
from raycascade.features import FeatureState
from raycascade.ragged import Ragged
from raycascade.schema import FIRST_ROW, FeatureSchema, FeatureSpace, Field, IdsFeature, VectorFeature, near_miss
from raycascade.semantic_ids.artefact import SemanticIds, vectors_of

TABLES = "semantic_ids/"
VERSION = b"sid_version"  # metadata of a column of tokens: the version of the semantic ids that it was made with


# ---------------------------------------------------------------- declared
def given_features(config: Config, name: str, *, max_tokens: int) -> tuple[IdsFeature, ...]:
    """The feature of some semantic ids' tokens, and one for every sum with ids that a stage asks for."""
    spec = config.semantic_ids[name]
    tokens = IdsFeature(name=spec.feature, side="item", vocabulary=TABLES + name, max_len=max_tokens, pool="sum",
                        given=True, content=spec.content)
    wanted = [stage.semantic_ids for stage in config.stages if stage.semantic_ids and stage.semantic_ids.ids == name]
    sums = dict.fromkeys(option.features for option in wanted if option.mode == "add")
    return (tokens, *(tokens.model_copy(update={
        "name": _sum(spec.feature, added), "vocabulary": _sum(TABLES + name, added), "added": added,
        "max_len": max_tokens + len(added)}) for added in sums))


def _sum(name: str, added: Sequence[str]) -> str:
    return "+".join((name, *added))


def declared_features(config: Config, schema: FeatureSchema) -> tuple[IdsFeature, ...]:
    """The features that `prepare` will add, before anything is learned; ConfigError where there is no such content."""
    if made := [feature.name for feature in schema.features if isinstance(feature, IdsFeature) and feature.given]:
        raise ConfigError(f"schema: {made[0]!r} is given, but no log holds given rows; leave `given` out")
    vectors = {feature.name for feature in schema.side("item") if isinstance(feature, VectorFeature)}
    for name, spec in config.semantic_ids.items():
        if spec.content not in vectors:
            raise ConfigError(f"semantic_ids.{name}.content: {spec.content!r} is not a vector feature of the items"
                              f"{near_miss(spec.content, vectors)}")
    names = [name for name in config.semantic_ids for _ in given_features(config, name, max_tokens=1)]
    features = [feature for name in config.semantic_ids for feature in given_features(config, name, max_tokens=1)]
    taken = {feature.name for feature in schema.features}
    for name, feature in zip(names, features, strict=True):
        if feature.name in taken:
            raise ConfigError(f"semantic_ids.{name}.feature: {feature.name!r} is a feature already; choose "
                              "another name")
        taken.add(feature.name)
    return tuple(features)


def with_features(state: FeatureState, config: Config, name: str, ids: SemanticIds) -> FeatureState:
    """The fitted state with the features of some semantic ids; `with_tokens` makes their columns."""
    for feature in given_features(config, name, max_tokens=ids.tokenizer.max_tokens):
        behind = sum(state.space[other].num_rows - FIRST_ROW for other in feature.added)
        state = state.with_given(feature, ids.num_rows + behind)
    return state


# ---------------------------------------------------------------- columns
def with_tokens(encoded: pa.Table, state: FeatureState, ids: Mapping[str, SemanticIds]) -> pa.Table:
    """Encoded items (`FeatureState.encode_items`) with the columns of all given features behind the others.

    A row depends on nothing but the item itself, so that new items get theirs from the same frozen semantic ids.
    """
    found: dict[str, Ragged] = {}
    for feature in _given(state.schema):
        name = feature.vocabulary.removeprefix(TABLES).partition("+")[0]
        if name not in found:
            found[name] = ids[name].tokens(vectors_of(encoded, feature.content))
        tokens = _with_ids(found[name], encoded, state, feature, first=ids[name].num_rows)
        column = pa.field(feature.name, pa.list_(pa.int32()), metadata={VERSION: ids[name].version.encode()})
        encoded = encoded.append_column(column, tokens.to_arrow().cast(column.type))
    return encoded


def require_versions(encoded: pa.Table, state: FeatureState, ids: Mapping[str, SemanticIds], *, where: str) -> None:
    """BundleError where the columns of tokens were made with other semantic ids than these, or these are missing."""
    for feature in _given(state.schema):
        name = feature.vocabulary.removeprefix(TABLES).partition("+")[0]
        if name not in ids:
            raise BundleError(f"{where}: {feature.name!r} needs the semantic ids {name!r}, which are not there; "
                              "train again")
        made_with = (encoded.schema.field(feature.name).metadata or {}).get(VERSION, b"none").decode()
        ids[name].require_version(made_with, where=f"{where}: {feature.name}")


def _given(schema: FeatureSchema) -> list[IdsFeature]:
    return [feature for feature in schema.side("item") if isinstance(feature, IdsFeature) and feature.given]


def _with_ids(tokens: Ragged, encoded: pa.Table, state: FeatureState, feature: IdsFeature, *, first: int) -> Ragged:
    """Each item's tokens, and behind them the rows of its `added` ids, from row `first` on; unknown ids add none."""
    parts = [tokens]
    for name in feature.added:
        rows = encoded[name].to_numpy().astype(np.int64)
        known = rows >= FIRST_ROW
        shifted = (rows[known] - FIRST_ROW + first).astype(np.int32)
        parts.append(Ragged(pa.array(shifted), known.astype(np.int64)))
        first += state.space[name].num_rows - FIRST_ROW
    owner = np.concatenate([np.repeat(np.arange(len(part.lengths_Q)), part.lengths_Q) for part in parts])
    values = pa.concat_arrays([part.values.cast(pa.int32()) for part in parts])
    return Ragged(values.take(pa.array(np.argsort(owner, kind="stable"))),
                  np.sum([part.lengths_Q for part in parts], axis=0))


# ---------------------------------------------------------------- a stage
def seen_by(stage: Stage, space: FeatureSpace) -> FeatureSpace:
    """The fields that a stage's model sees: without what it excludes, and tokens only as its `semantic_ids` says."""
    seen = space.without(stage.exclude)
    hidden = {name for field in seen.fields if field.table.startswith(TABLES)
              for name in (field.name, f"{field.name}_missing")}
    if stage.semantic_ids:
        mode, features = stage.semantic_ids.mode, stage.semantic_ids.features
        tokens = _tokens_of(stage.semantic_ids.ids, seen)
        shown = tokens
        if mode != "concat":
            _refuse_what_cannot_go(features, seen, mode=mode)
            hidden |= set(features)
        if mode == "add":
            shown = _of_table(_sum(tokens.table, features), seen)
            if shown is None:
                raise ConfigError(f"semantic_ids: the shards have no sum of {tokens.name!r} with {list(features)}; run "
                                  "prepare with this config")
        hidden -= {shown.name, f"{tokens.name}_missing"}
    return seen.without(tuple(field.name for field in seen.fields if field.name in hidden))


def _of_table(table: str, space: FeatureSpace) -> Field | None:
    return next((field for field in space.fields if field.table == table), None)


def _tokens_of(ids: str, space: FeatureSpace) -> Field:
    known = {field.table.removeprefix(TABLES) for field in space.fields if field.table.startswith(TABLES)}
    if (field := _of_table(TABLES + ids, space)) is None:
        raise ConfigError(f"semantic_ids: there are no tokens of {ids!r}{near_miss(ids, known)}; declare them in the "
                          "section semantic_ids, do not exclude them, and run prepare")
    return field


def _refuse_what_cannot_go(features: Sequence[str], space: FeatureSpace, *, mode: str) -> None:
    """Ids of the items alone can be replaced or added up, and one that is replaced must not stay anywhere else: the
    gain needs history and candidate to speak of items in the same way."""
    own = {field.name: field for field in space.of("item") if field.form == "id"}
    for name in features:
        if name not in own:
            raise ConfigError(f"semantic_ids: {name!r} is not an id of the items that the stage sees"
                              f"{near_miss(name, set(own))}")
    tables = {own[name].table for name in features}
    for field in space.fields:
        if mode == "replace" and field.table in tables and field.name not in features:
            raise ConfigError(f"semantic_ids: {field.name!r} shares the table {field.table!r} and would keep the ids "
                              "that tokens replace elsewhere; exclude it from the stage, or choose add or concat")
