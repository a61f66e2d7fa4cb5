"""The folder is the registry: `loss: {name: lcron}` is the one public class of `losses/lcron.py`.

A file whose name starts with an underscore holds shared parts and is not a plug-in. Every plug-in file has one class
that is marked by an inner class `Config(PluginConfig)`; its options are the keys beside `name`. `preset: paper` stands
for the keys that the class lists under `presets`; keys beside it come before those of the preset.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from pydantic import ValidationError

from raycascade.errors import ConfigError
from raycascade.schema import Frozen, near_miss


class PluginConfig(Frozen):
    """Options of a plug-in: frozen, unknown keys are errors, all defaults live in the class. `presets`: settings by
    name, such as "paper", those of the publication."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}


@cache
def names(folder: str) -> tuple[str, ...]:
    """The plug-ins of a folder of the package ("models", "losses", ...), sorted."""
    package = importlib.import_module(f"raycascade.{folder}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


@cache
def find(folder: str, name: str) -> Any:
    """The plug-in class called `name`; ConfigError with the near miss if there is none."""
    if name not in names(folder):
        raise ConfigError(f"{folder}: there is no {name!r}{near_miss(name, names(folder))}")
    module = importlib.import_module(f"raycascade.{folder}.{name}")
    classes = [
        value for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and "Config" in vars(value)
    ]
    assert len(classes) == 1, f"{module.__name__} must define exactly one class with a Config, found {classes}"
    return classes[0]


def spelled_out(folder: str, spec: dict[str, Any], where: str) -> dict[str, Any]:
    """The spec with the keys that its preset stands for in place of `preset`, and so for a plug-in inside it: what is
    saved with a model does not change with a later release. ConfigError for a preset that is not there."""
    own = {key: spelled_out(folder, value, f"{where}.{key}") if isinstance(value, dict) else value
           for key, value in spec.items()}
    name = spec.get("name")
    if "preset" not in own or not isinstance(name, str) or name not in names(folder):
        return own
    presets, preset = find(folder, name).Config.presets, own.pop("preset")
    if preset not in presets:
        there = f"; {name} has {', '.join(presets)}" if presets else f"; {name} has none"
        raise ConfigError(f"{where}.preset: there is no {preset!r}{there}")
    return presets[preset] | own


def options(folder: str, spec: dict[str, Any], where: str) -> tuple[Any, PluginConfig]:
    """Class and validated options of a spec such as {"name": "din", "hidden": [64, 32]}; `where` names it in errors."""
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"{where}: expected a mapping with a name, such as {{name: {names(folder)[0]}}}; "
                          f"got {spec!r}")
    plugin = find(folder, spec["name"])
    rest = {key: value for key, value in spelled_out(folder, spec, where).items() if key != "name"}
    try:
        return plugin, plugin.Config.model_validate(rest)
    except ValidationError as error:
        raise ConfigError(f"{where}.{first_problem(error, plugin.Config)}") from None


def first_problem(error: ValidationError, model: type[Frozen]) -> str:
    """The first problem of a validation as 'path: what was wrong, got what', with the near miss of an unknown key."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = set(model.model_fields)
        return f"{path}: unknown key{near_miss(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{path}: missing; add it"
    return f"{path}: {problem['msg']}; got {problem['input']!r}"
