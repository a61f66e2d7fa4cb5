"""README and docs name only what exists (make words, verbs, configs, files), and their examples run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from raycascade import plugins
from raycascade.batch import Batch, Targets
from raycascade.config import parse_config
from raycascade.schema import FeatureSpace, Field

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = ROOT / "README.md"


def _code(page: Path) -> str:
    """The fenced blocks and the inline code of a page; prose such as "make sure" is left out."""
    text = page.read_text()
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", prose)])


def _verbs() -> set[str]:
    """The verbs of the command line."""
    from raycascade.cli import app

    command = typer.main.get_command(app)
    return set(command.commands)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_word_is_in_the_makefile(page: Path):
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"\bmake ([a-z]+)\b", _code(page))) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_verb_is_one_of_the_command_line(page: Path):
    assert set(re.findall(r"(?<!from )\braycascade ([a-z][a-z-]*)\b", _code(page))) <= _verbs()


def test_the_readme_explains_every_verb():
    assert _verbs() <= set(re.findall(r"^raycascade ([a-z][a-z-]*)\b", _code(README), flags=re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_and_source_file_that_is_named_exists(page: Path):
    folders = "configs|platform|tests|serve|jobs|benchmarks|docs"
    named = re.findall(rf"\b(?:{folders})/[\w./-]*\.(?:ya?ml|py|md)\b", _code(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_yaml_block_of_the_readme_is_valid():
    blocks = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), flags=re.M | re.S)
    trees = [yaml.safe_load(block) for block in blocks]
    assert sum("stages" in tree for tree in trees) == 1, "one example is a whole config"
    for tree in trees:
        if "stages" in tree:
            assert len(parse_config(tree, where="README.md").stages) == len(tree["stages"])
        else:
            _, options = plugins.options("datasets", tree["dataset"], "README.md: dataset")
            assert options.model_dump(include={"log", "time_unit"}) == {"log": "log_*.parquet", "time_unit": "s"}


def _example(page: str) -> dict[str, Any]:
    """What the one Python block of a page defines."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.M | re.S)
    defined: dict[str, Any] = {"__name__": "example"}
    exec(block, defined)
    return defined


def test_the_loss_of_the_guide_has_the_value_worked_out_by_hand():
    margin = _example("add-a-loss.md")["Margin"]
    scores_QC = torch.tensor([[2.0, 0.0, 1.5, 9.0]], requires_grad=True)
    targets = Targets(
        relevance_QC=torch.tensor([[3.0, 1.0, 2.0, 9.0]]), reached_QC=torch.ones(1, 4, dtype=torch.long),
        mask_QC=torch.tensor([[True, True, True, False]]), keep=(2,), k=1, labels={},
    )
    output = margin(margin.Config(margin=1.0), ("ranker",))({"ranker": scores_QC}, targets)
    assert output.total.item() == pytest.approx((0.0 + 0.5) / 2)  # 2.0 beats 0.0 by 2 and 1.5 by 0.5
    output.total.backward()
    assert scores_QC.grad is not None
    assert scores_QC.grad.tolist() == [[-0.5, 0.0, 0.5, 0.0]]


def test_the_model_of_the_guide_adds_up_its_weights():
    linear = _example("add-a-model.md")["Linear"]
    space = FeatureSpace(fields=(
        Field(name="author", side="item", form="id", table="author", num_rows=5),
        Field(name="age", side="item", form="dense"),
        Field(name="city", side="request", form="id", table="city", num_rows=9),
    ))
    model = linear(linear.Config(), space)
    rows_QC = torch.tensor([[2, 3], [4, 0]])
    batch = Batch(
        user={"city": torch.tensor([1, 2])}, history={}, history_mask_QL=torch.zeros(2, 0, dtype=torch.bool),
        item={"author": rows_QC, "age": torch.tensor([[0.5, -1.0], [2.0, 0.0]])},
        history_rows_QL=torch.zeros(2, 0, dtype=torch.long), candidates_QC=rows_QC, mask_QC=rows_QC > 0,
        time_ms_Q=torch.zeros(2, dtype=torch.long),
    )
    author_N = model.tables["author"].weight[:, 0]
    by_hand = author_N[4] + 2.0 * model.dense.weight[0, 0] + model.dense.bias[0]
    assert model(batch).shape == (2, 2, 1)
    assert model(batch)[1, 0, 0].item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_the_first_screen_has_the_two_commands():
    screen = "\n".join(README.read_text().splitlines()[:40])
    assert "make demo" in screen
    assert "make test" in screen
