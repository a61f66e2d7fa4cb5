"""The rules of the source tree that neither ruff nor pyright nor import-linter can express."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from raycascade import plugins

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "raycascade"
PLUGIN_FOLDERS = ("datasets", "models", "losses", "indexes")
FOLDERS = {*PLUGIN_FOLDERS, "semantic_ids", "training", "serving", "flows"}
SOURCES = sorted(path for folder in ("platform", "serve", "jobs") for path in (ROOT / folder).rglob("*.py"))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in SOURCES}
VAGUE = {"util", "utils", "helper", "helpers", "common", "manager"}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.save", "torch.load", "pd.read_pickle", "pandas.read_pickle", "ray.cloudpickle"}


def _layers() -> set[str]:
    """Every module that the layers contract of import-linter knows; it is the one list of what may exist."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {name for layer in contracts[0]["layers"] for name in re.findall(r"\w+", layer)}


def _imports(tree: ast.AST) -> Iterator[str]:
    """The module of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def _python(code: str) -> str:
    """What a fresh interpreter at the root of the repository prints, with the source root on its path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_tree_is_found():
    assert "platform/raycascade/config.py" in TREES
    assert {"config", "flows", "errors"} <= _layers()


def test_the_source_root_does_not_shadow_the_platform_module_of_the_standard_library():
    assert not (ROOT / "platform" / "__init__.py").exists()
    seen = _python("import platform, raycascade; print(platform.python_version(), raycascade.__file__)")
    version, package = seen.split()
    assert version == ".".join(map(str, sys.version_info[:3]))
    assert Path(package) == PACKAGE / "__init__.py"


def test_serve_and_jobs_are_folders_and_not_packages():
    assert not (ROOT / "serve" / "__init__.py").exists()
    assert not (ROOT / "jobs" / "__init__.py").exists()


def test_every_file_of_the_package_stands_in_a_known_place():
    known = _layers()
    for path in PACKAGE.rglob("*.py"):
        *folders, _ = place = path.relative_to(PACKAGE).parts
        assert len(folders) <= 1, f"{path}: the package is one folder deep"
        if folders:
            assert folders[0] in FOLDERS, f"{path}: no such folder in the plan"
        else:
            assert path.stem in known | {"__init__", "__main__"}, f"{path}: give the module a layer in pyproject.toml"
        assert re.fullmatch(r"[a-z0-9_]+\.py", place[-1]), f"{path}: file names are lower case"


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_every_plug_in_file_has_one_class_with_a_config(folder: str):
    for name in plugins.names(folder):
        plugin = plugins.find(folder, name)
        assert issubclass(plugin.Config, plugins.PluginConfig), f"{folder}/{name}.py"
        assert plugin.__doc__, f"{folder}/{name}.py: say what {plugin.__name__} promises"


def test_files_and_functions_fit_their_limits():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, f"{path}: split the file"
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert num_lines <= 60, f"{name}:{node.lineno} {node.name} has {num_lines} lines"


def test_no_file_class_or_function_has_a_name_that_says_nothing():
    for name, tree in TREES.items():
        functions = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        defined = functions + [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        for word in [*Path(name).with_suffix("").parts, *defined]:
            parts = re.findall(r"[A-Z]?[a-z]+", word)
            assert not {part.lower() for part in parts} & VAGUE, f"{name}: {word} does not say what it is"


def test_nothing_is_pickled():
    for name, tree in TREES.items():
        seen = {module.split(".")[0] for module in _imports(tree)} & PICKLES
        assert not seen, f"{name} imports {seen}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in PICKLING_CALLS, f"{name}:{node.lineno} {ast.unparse(node)}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", f"{name}:{node.value.lineno} allow_pickle"


def test_only_flows_serve_and_jobs_import_ray():
    for name, tree in TREES.items():
        if not name.startswith(("platform/raycascade/flows/", "serve/", "jobs/")):
            assert not [module for module in _imports(tree) if module.split(".")[0] == "ray"], name


def test_the_package_never_imports_serve_or_jobs():
    for name, tree in TREES.items():
        if name.startswith("platform/"):
            assert not {module.split(".")[0] for module in _imports(tree)} & {"serve", "jobs"}, name
    for name, tree in TREES.items():
        other = {"serve/": "jobs", "jobs/": "serve"}.get(name.partition("/")[0] + "/")
        assert other not in {module.split(".")[0] for module in _imports(tree)}, name


def test_nothing_is_left_open_in_the_code():
    for path in SOURCES:
        found = re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text())
        assert not found, f"{path}: {found}"


def test_reading_a_config_imports_neither_ray_nor_torch():
    heavy = {"ray", "torch", "faiss", "fastapi", "rich"}
    assert _python(f"import sys, raycascade.config; print({heavy} & set(sys.modules) or 'none')") == "none"


def test_importing_the_package_starts_nothing():
    code = "import sys, threading, raycascade.bundle; print('ray' in sys.modules, len(threading.enumerate()))"
    assert _python(code) == "False 1"


def test_training_loads_xgboost_for_trees_alone():
    code = "import sys, raycascade.flows.train, raycascade.flows.serving; print('xgboost' in sys.modules)"
    assert _python(code) == "False"
