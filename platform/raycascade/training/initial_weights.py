"""The weights that stages start with where the config takes them from a bundle (`init_from`)."""

import safetensors.torch
import yaml

from raycascade import storage
from raycascade.bundle import WEIGHTS, verify
from raycascade.cascade import Cascade
from raycascade.config import Config, Stage, parse_config
from raycascade.errors import ConfigError
from raycascade.features import FeatureState
from raycascade.models.gesr import Gesr, with_towers_of
from raycascade.schema import FeatureSpace
from raycascade.semantic_ids.columns import seen_by

SOURCE = "two_tower"


def take_initial_weights(config: Config, cascade: Cascade, state: FeatureState) -> None:
    """Gives every stage with `init_from` the towers of the stage that it names; ConfigError where they do not fit."""
    for stage in config.stages:
        if stage.init_from:
            try:
                _take(stage, stage.init_from, cascade, state)
            except ConfigError as error:
                raise ConfigError(f"stage {stage.name!r}: {error}") from None


def _take(stage: Stage, source: str, cascade: Cascade, state: FeatureState) -> None:
    model = cascade.models[stage.name]
    if not isinstance(model, Gesr):
        raise ConfigError(f"init_from: {stage.model['name']} has no towers to start with; leave it out (gesr has)")
    uri, _, name = source.rstrip("/").rpartition("/")
    verify(uri)
    found = _stage_of(uri, name)
    if found.model["name"] != SOURCE:
        raise ConfigError(f"init_from: {source} is a {found.model['name']}; name a stage whose model is {SOURCE}")
    given = FeatureState.load(storage.join(uri, "features"), with_counters=False)
    _refuse_other_rows(source, state, given, seen_by(found, given.space))
    weights = safetensors.torch.load(storage.read_bytes(storage.join(uri, "stages", name, WEIGHTS)))
    weights.pop("prior_scale", None)
    model.load_state_dict(with_towers_of(model.state_dict(), weights))


def _stage_of(uri: str, name: str) -> Stage:
    path = storage.join(uri, "config.yaml")
    stages = {s.name: s for s in parse_config(yaml.safe_load(storage.read_bytes(path)), where=path).stages}
    if name not in stages:
        raise ConfigError(f"init_from: {uri} has no stage {name!r}, only {', '.join(stages)}; "
                          "expected <bundle>/<stage>")
    return stages[name]


def _refuse_other_rows(source: str, own: FeatureState, given: FeatureState, space: FeatureSpace) -> None:
    """Tables of one shape over other values would fit and mean nothing; so would numbers of another scale."""
    for field in space.fields:
        if field.table in given.vocabularies and given.vocabularies[field.table].given:
            raise ConfigError(f"init_from: {source} reads semantic ids ({field.name!r}), whose tokens may mean other "
                              "things here; name a stage that was trained without them")
        ours, theirs = own.vocabularies.get(field.table), given.vocabularies.get(field.table)
        same = (ours is None) == (theirs is None) and (
            ours is None or theirs is None or (ours.buckets == theirs.buckets and ours.values.equals(theirs.values)))
        base = field.name.removesuffix("_missing")
        if not same or own.dense.get(base) != given.dense.get(base):
            raise ConfigError(f"init_from: {source} was fitted on other values of {field.name!r} than these shards; "
                              "train both on the same shards")
