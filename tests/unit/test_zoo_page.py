"""docs/models.md says what the code says."""

import csv

from benchmarks import zoo_page
from raycascade import plugins


def test_the_page_of_all_models_is_what_the_benchmark_writes():
    """Parameters and operations are counted again; measured figures come from the result files."""
    assert zoo_page.PAGE.read_text() == zoo_page.page(), \
        "run: PYTHONPATH=platform python benchmarks/zoo_page.py"


def test_every_model_says_what_it_is_for_and_has_been_timed():
    assert set(zoo_page.PURPOSES) == set(plugins.names("models"))
    with zoo_page.SPEEDS.open(newline="") as file:
        timed = {row["model"]: (int(row["training"]), int(row["scoring"])) for row in csv.DictReader(file)}
    assert set(timed) == {name for name in plugins.names("models") if zoo_page.build(name) is not None}
    assert all(0 < training < scoring for training, scoring in timed.values())
