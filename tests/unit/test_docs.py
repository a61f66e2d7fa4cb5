"""The pages say what the code says: every key and default of a config, every kind of feature; their examples run."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from pydantic import BaseModel

from raycascade import config, plugins
from raycascade.batch import collate
from raycascade.cascade import Cascade
from raycascade.config import parse_config
from raycascade.datasets._impressions import to_requests
from raycascade.fitting import FitPart, required_columns
from raycascade.items import ItemTable
from raycascade.schema import Feature, FeatureSchema
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.semantic_ids.tokenizers import Tokenizer
from raycascade.semantic_ids_config import SemanticIdsOptions, StageSemanticIds
from raycascade.serving.gateway import Answer
from raycascade.serving.problems import Problem
from raycascade.serving.requests import Query

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"dataset": "datasets", "model": "models", "loss": "losses", "index": "indexes"}
SECTIONS = {
    "Whole config": config.Config, "`paths`": config.Paths, "`splits`": config.Splits, "`stages`": config.Stage,
    "`stages.fusion`": config.Fusion, "`stages.semantic_ids`": StageSemanticIds,
    "`semantic_ids`": SemanticIdsOptions, "`semantic_ids.rqvae`": RQVAE.Config,
    "`semantic_ids.tokenizer`": Tokenizer.Config,
    "`lists`": config.Lists, "`train`": config.Train, "`train.negatives`": config.Negatives,
    "`evaluate`": config.Evaluate, "`compare`": config.Compare, "`guard`": config.Guard,
    **{f"`{word}: {{name: {name}}}`": plugins.find(folder, name).Config
       for word, folder in FOLDERS.items() for name in plugins.names(folder)},
}
DAY_MS, START_MS = 86_400_000, 1_704_067_200_000  # 2024-01-01


def _page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def _blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", _page(page), flags=re.M | re.S)


def _sections(page: str) -> dict[str, str]:
    heading, *rest = re.split(r"^## (.*)$", _page(page), flags=re.M)
    assert heading.startswith("# ")
    return dict(zip(rest[::2], rest[1::2], strict=True))


# ---------------------------------------------------------------- config.md
def test_config_md_has_a_section_for_every_part_of_a_config_and_every_plug_in():
    assert set(_sections("config.md")) == set(SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_config_md_names_every_key_with_its_default(title: str):
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", _sections("config.md").get(title, ""), flags=re.M)
    fields = SECTIONS[title].model_fields
    assert [key for key, _, _ in rows] == list(fields)
    for key, shown, _ in rows:
        if fields[key].is_required():
            assert shown == "required", key
            continue
        default: Any = fields[key].get_default(call_default_factory=True)
        seen = yaml.safe_load(shown.strip("`"))
        if isinstance(default, BaseModel):
            assert type(default).model_validate(seen) == default, key
        else:
            assert seen == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize("title", SECTIONS)
def test_config_md_says_what_every_preset_stands_for(title: str):
    shown = re.findall(r"^`preset: (\w+)`[^`]* is `(.+?)`", _sections("config.md").get(title, ""), flags=re.M)
    presets = {name: {key: list(value) if isinstance(value, tuple) else value for key, value in preset.items()}
               for name, preset in getattr(SECTIONS[title], "presets", {}).items()}
    assert {name: yaml.safe_load(text) for name, text in shown} == presets


# ---------------------------------------------------------------- features.md
def test_features_md_has_an_example_of_every_kind_and_every_example_is_a_valid_schema():
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(Feature)[0])}
    examples: dict[str, FeatureSchema] = {}
    for title, text in _sections("features.md").items():
        for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.M | re.S):
            features = yaml.safe_load(block)["features"]
            examples[title] = FeatureSchema.model_validate({"features": features, "labels": ["click"]})
    assert set(examples) == kinds
    for kind, schema in examples.items():
        assert kind in {feature.kind for feature in schema.features}


def test_features_md_names_every_option_of_a_kind_that_is_not_obvious():
    for kind in get_args(get_args(Feature)[0]):
        name = get_args(kind.model_fields["kind"].annotation)[0]
        section = _sections("features.md")[name] + (_sections("features.md")["id"] if name == "ids" else "")
        for option in set(kind.model_fields) - {"kind", "name", "side"}:
            assert re.search(rf"\b{option}\b", section), f"{name}: {option}"


# ---------------------------------------------------------------- operations.md
def test_the_example_request_and_answer_are_those_of_the_interface():
    request, answer, problem = (json.loads(block) for block in _blocks("operations.md", "json"))
    assert len(Query.model_validate(request).history or []) == 2
    only_sometimes = ("degraded_at", "reason", "trace", "timings_ms")
    assert list(answer) == [name for name in Answer.model_fields if name not in only_sometimes]
    assert len(Answer.model_validate(answer).items) == request["k"]
    assert not set(request["exclude"]) & {item["item_id"] for item in answer["items"]}
    assert list(problem) == list(Problem.model_fields)


# ---------------------------------------------------------------- add-a-dataset.md, README
def test_the_yaml_of_the_data_set_guide_is_valid():
    (block,) = _blocks("add-a-dataset.md", "yaml")
    _, options = plugins.options("datasets", yaml.safe_load(block)["dataset"], "add-a-dataset.md")
    assert options.model_dump(include={"positive"}) == {"positive": "long_view"}


def test_the_data_set_of_the_guide_becomes_the_tensors_worked_out_by_hand(tmp_path: Path):
    (block,) = _blocks("add-a-dataset.md", "python")
    defined: dict[str, Any] = {"__name__": "example"}
    exec(block, defined)
    (tmp_path / "items.json").write_text(json.dumps({"a": "ann", "b": "bob", "c": "ann"}))
    views = [
        {"id": "v1", "user": 7, "country": "at", "ms": START_MS, "shown": {"a": 1, "b": 0}},
        {"id": "v2", "user": 7, "country": "at", "ms": START_MS + DAY_MS, "shown": {"c": 1}},
        {"id": "v3", "user": 8, "country": "ch", "ms": START_MS + DAY_MS, "shown": {"a": 1}},
    ]
    (tmp_path / "day.jsonl").write_text("\n".join(map(json.dumps, views)))
    page_views = defined["PageViews"]
    log = page_views(page_views.Config(), raw=str(tmp_path))
    assert log.slices() == ["day.jsonl"]
    (rows,) = log.read("day.jsonl")
    schema = log.schema()
    assert set(required_columns(schema, log.form)) <= set(rows.column_names)
    part = FitPart(schema)
    part.add_impressions(rows, where="example")
    part.add_items(log.items(), where="example")
    state = part.finish(log.items(), as_of_ms=START_MS + 2 * DAY_MS)
    (raw,) = to_requests(rows, schema, history_len=50, exclude_seen=log.exclude_seen)
    items = ItemTable.from_encoded(state.encode_items(log.items(), where="example"), state)
    batch = collate(state.encode_requests(raw, where="example"), items)
    assert batch.request_ids == ("v1", "v2", "v3")
    assert batch.candidates_QC.tolist() == [[2, 3], [4, 0], [2, 0]]
    assert batch.history_rows_QL.tolist() == [[0, 0], [2, 3], [0, 0]]
    assert batch.targets is not None
    assert batch.targets.labels["click"].tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    # Each item's clicks of all days: 2, 0, 1; on the second day, those of the first day count: 1 for a, 0 for c.
    logs = np.log1p(np.array([2.0, 0.0, 1.0]))
    by_hand = (np.log1p([0.0, 1.0]) - logs.mean()) / logs.std()
    torch.testing.assert_close(batch.item["clicks"][1:, 0], torch.tensor(by_hand, dtype=torch.float32))


def test_the_config_of_the_readme_fits_the_data_set_it_names():
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    (tree,) = (tree for tree in map(yaml.safe_load, blocks) if "stages" in tree)
    parsed = parse_config(tree, where="README.md")
    plugin, options = plugins.options("datasets", parsed.dataset, "dataset")
    state = FitPart(plugin(options, raw="").schema()).finish(pa.table({"item_id": [1]}), as_of_ms=0)
    assert list(Cascade(parsed, state.space).models) == [stage.name for stage in parsed.stages]
