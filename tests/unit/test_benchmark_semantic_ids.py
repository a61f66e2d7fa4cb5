"""The comparison of what stands for an item: equal tables, nothing learned from new items, and tables that add up."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raycascade.metrics import grouped_auc
from raycascade.semantic_ids.artefact import ItemContent

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType, ModuleType]]:
    """The scripts find one another in their folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield import_module("_cold_tables"), import_module("_sid_arms"), import_module("_sid_report")
    finally:
        sys.path.remove(str(BENCHMARKS))


Modules = tuple[ModuleType, ModuleType, ModuleType]


@pytest.fixture(scope="module")
def maker(modules: Modules) -> Any:
    """300 items in clusters of content, of which the last 40 were never shown."""
    rng = np.random.default_rng(2)
    vectors = (rng.normal(size=(30, 8))[rng.integers(0, 30, 300)] + 0.1 * rng.normal(size=(300, 8))).astype(np.float32)
    shown = np.where(np.arange(300) < 260, rng.integers(1, 30, 300), 0)
    content = ItemContent(pa.array(np.arange(300)), vectors, shown)
    return modules[1].TokenMaker(content, 1_000, seed=1, steps=4)


@pytest.mark.parametrize("arm", ["hash", "unigram", "bigram", "pieces", "add"])
def test_tables_are_equal_and_every_token_is_a_row_of_them(modules: Modules, maker: Any, arm: str):
    tokens = maker.of(arm)
    rows = tokens.values.values.to_numpy()
    equal = tokens.rows == modules[1].ROWS
    assert equal or (arm in ("pieces", "add") and tokens.rows < modules[1].ROWS)  # a small log has few pieces
    assert len(tokens.values.lengths_Q) == 300
    assert tokens.values.lengths_Q.min() >= 1
    assert rows.min() >= 2
    assert rows.max() < tokens.rows


def test_a_sum_has_the_pieces_and_behind_their_rows_one_row_of_the_hash(modules: Modules, maker: Any):
    pieces, both = maker.semantic("pieces", modules[1].ROWS // 2), maker.of("add")
    hashed = maker.hashed(modules[1].ROWS - modules[1].ROWS // 2 + 2)
    ends = np.cumsum(both.values.lengths_Q)
    found = np.split(both.values.values.to_numpy(), ends[:-1])
    alone = np.split(pieces.values.values.to_numpy(), np.cumsum(pieces.values.lengths_Q)[:-1])
    for row, own, code in zip(found, alone, hashed.values.values.to_numpy(), strict=True):
        assert row[:-1].tolist() == own.tolist()
        assert row[-1] == code + pieces.rows - 2 >= pieces.rows
    assert both.rows == pieces.rows + hashed.rows - 2


def test_arms_without_a_table_have_no_tokens_and_the_larger_hash_has_more_rows(modules: Modules, maker: Any):
    assert maker.of("content") is maker.of("none") is None
    assert maker.of("hash x10").rows == 2 + 10 * (modules[1].ROWS - 2)


def test_content_of_a_movie_does_not_change_when_movies_come_that_nobody_rated_in_training(
    modules: Modules, monkeypatch: pytest.MonkeyPatch
):
    cold = modules[0]
    monkeypatch.setattr(cold, "TERM_BUCKETS", 256)
    monkeypatch.setattr(cold, "WIDTH", 12)
    movies = [(f"{name} {part}", [genre]) for name in ("alien", "batman", "casablanca", "dune")
              for part in ("returns", "forever", "two") for genre in ("Drama", "Horror")]
    counts = cold.term_counts(movies)
    trained = np.arange(len(movies)) % 4 != 3
    first = cold.reduced(counts, trained)
    more = np.concatenate([counts, cold.term_counts([("zardoz", ["Sci-Fi"])])])
    later = cold.reduced(more, np.append(trained, False))
    np.testing.assert_allclose(later[:-1] @ later[:-1].T, first @ first.T, atol=1e-4)
    near, far = movies.index(("batman two", ["Drama"])), movies.index(("dune forever", ["Horror"]))
    own = first[movies.index(("batman returns", ["Drama"]))]
    assert own @ first[near] > own @ first[far]


def test_only_shown_candidates_are_left_of_a_list(modules: Modules):
    lists = {"candidates": [[5, 6, 7], [8, 9, 5]], "reached": [[0, 3, 3], [3, 1, 0]], "rank": [[1, 2, 1], [1, 1, 1]],
             "exposed": [[False, True, True], [True, False, False]], "click": [[None, 1, 0], [0, None, None]],
             "long_view": [[None, 0, 0], [0, None, None]], "like": [[None, 0, 0], [0, None, None]]}
    shown = modules[0].shown(pa.table(lists))
    assert shown["candidates"].to_pylist() == [[6, 7], [8]]
    assert shown["click"].to_pylist() == [[1, 0], [0]]
    assert shown["reached"].to_pylist() == [[3, 3], [3]]


def test_the_page_compares_arms_on_the_same_requests(modules: Modules, tmp_path: Path):
    rng, runs = np.random.default_rng(4), []
    labels, requests = rng.random(2_000) < 0.3, np.repeat(np.arange(400), 5)
    impressions = np.where(np.arange(2_000) % 2, 0, 100)
    (tmp_path / "toy" / "logits").mkdir(parents=True)
    aucs = {}
    for arm, signal in (("hash", 0.2), ("pieces", 0.9)):
        logits = signal * labels + rng.normal(size=2_000)
        run = {"key": f"toy/ids/{arm}/1", "data": "toy", "inputs": "ids", "arm": arm, "seed": 1, "rows": 1_026,
               "dim": 4, "valid_losses": [0.5], "slices": {}}
        np.savez(tmp_path / "toy" / "logits" / f"toy-ids-{arm}-1.npz", logits=logits, labels=labels.astype(float),
                 impressions=impressions, requests=requests)
        for kind, mask in (("all", impressions >= 0), ("cold", impressions == 0)):
            auc, _ = grouped_auc(logits[mask], labels[mask], np.zeros(int(mask.sum()), np.int8))
            run["slices"][kind] = {"rows": int(mask.sum()), "positives": int(labels[mask].sum()), "auc": auc,
                                   "gauc": 0.5, "logloss": 0.6}
            aucs[arm, kind] = auc
        run["slices"]["tail"] = {"rows": 0, "positives": 0}
        runs.append(json.loads(json.dumps(run)))
    page = tmp_path / "page.md"
    page.write_text("# Kept\n\n<!-- tables: begin -->\nold\n<!-- tables: end -->\n\nKept too.\n")
    modules[2].write_report(page, tmp_path, runs, draws=50)
    text = page.read_text()
    assert "# Kept" in text
    assert "Kept too." in text
    assert "old\n" not in text
    gain = aucs["pieces", "cold"] - aucs["hash", "cold"]
    assert f"| {gain:+.4f} (+" in text
    assert f"| {aucs['pieces', 'all']:.4f} | {aucs['pieces', 'cold']:.4f} | too few |" in text
    assert len((tmp_path / "page.csv").read_text().splitlines()) == 3
