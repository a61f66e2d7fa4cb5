"""Values that share a bucket, or are too rare for a row, are told apart where events are matched with candidates."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade.batch import Batch, collate
from raycascade.fitting import FitPart
from raycascade.items import ItemTable
from raycascade.keys import exact_ids
from raycascade.models._encoded_items import encode_catalogue
from raycascade.models.gesr import Gesr
from raycascade.schema import FIRST_ROW, FeatureSchema
from tests.early_stages import CHANGING, SMALL
from tests.tiny_world import SCHEMA, raw_items, raw_requests


def blurred(**options: Any) -> FeatureSchema:
    """The hand-made log with few rows for its authors and tags."""
    tree = SCHEMA.model_dump()
    for feature in tree["features"]:
        if feature["name"] in ("author", "tags"):
            feature.update(options)
    return FeatureSchema.model_validate(tree)


def items_of(schema: FeatureSchema) -> ItemTable:
    raw = raw_items()
    authors = raw["author"].to_pylist()
    raw = raw.set_column(raw.column_names.index("author"), "author", pa.array([None, *authors[1:]]))
    part = FitPart(schema)
    part.add_requests(raw_requests(), where="tiny")
    part.add_items(raw, where="tiny")
    state = part.finish(raw, as_of_ms=2_000_000_000_000)
    return ItemTable.from_encoded(state.encode_items(raw, where="tiny"), state)


def batch_of(items: ItemTable) -> Batch:
    return collate(items.state.encode_requests(raw_requests().slice(0, 40), where="tiny"), items)


def gesr(items: ItemTable) -> Gesr:
    pairs = [{"event": name, "candidate": name} for name in ("author", "tags")]
    config = Gesr.Config.model_validate({**SMALL, "pairs": pairs, "self": False, "nro": False, "ro": False})
    return Gesr(config, items.state.space.without((*CHANGING, "pair"))).eval()


def match_counts(items: ItemTable) -> torch.Tensor:
    batch, model = batch_of(items), gesr(items)
    assert model.parts.hma is not None
    encoded = model.encode_items(batch.item, batch.mask_QC.shape)
    return model.parts.hma.counts(model.encode_request(batch).parts.match, encoded, batch)


def raw_counts(batch: Batch, items: ItemTable) -> np.ndarray:
    """Of equal raw authors and of equal raw tags, by a plain loop."""
    raw = {row["item_id"]: row for row in raw_items().to_pylist()}
    first = raw_items()["item_id"][0].as_py()
    values = {item: ([] if item == first else [row["author"]], row["tags"]) for item, row in raw.items()}
    counts = np.zeros((*batch.mask_QC.shape, 2), int)
    for q, c in product(*map(range, batch.mask_QC.shape)):
        past = items.ids_of(batch.history_rows_QL[q][batch.history_mask_QL[q]].numpy())
        candidate = values[items.ids_of(batch.candidates_QC[q, c:c + 1].numpy())[0]]
        for p in range(2):
            counts[q, c, p] = sum((np.array(values[event][p], object) == one).sum() if values[event][p] else 0
                                  for event in past for one in candidate[p])
    return counts


@pytest.mark.parametrize("options", [{"buckets": 3}, {"min_count": 1000}, {"max_values": 2}, {}])
def test_counts_are_those_of_equal_raw_values(options: dict[str, Any]):
    items = items_of(blurred(**options))
    assert ("author_key" in items.static) == bool(options)
    batch, counts = batch_of(items), match_counts(items)
    expected = raw_counts(batch, items)
    assert counts.tolist() == expected.tolist()
    assert expected.max() > 1


def test_without_exact_ids_values_of_one_bucket_match():
    """Bundles written before there were any are read as they were."""
    items = items_of(blurred(buckets=3))
    for name in ("author_key", "tags_key"):
        del items.static[name]  # type: ignore[attr-defined]
    batch, counts = batch_of(items), match_counts(items)
    assert counts.sum() > raw_counts(batch, items).sum()


def test_what_is_encoded_of_the_catalogue_has_the_exact_ids():
    items = items_of(blurred(buckets=3))
    model = gesr(items)
    names = tuple(field.name for field in items.state.space.without((*CHANGING, "pair")).of("item"))
    cached = {name: torch.cat(parts) for name, *parts in _columns(encode_catalogue(model, items, names, chunk=50))}
    assert cached["ids.author"][:, 0].tolist() == items.static["author_key"].tolist()
    assert cached["ids.tags"].tolist() == items.static["tags_key"].tolist()


def _columns(pieces: Any) -> list[tuple[Any, ...]]:
    listed = list(pieces)
    return [(name, *(piece[name] for piece in listed)) for name in listed[0]]


def test_new_items_behind_the_catalogue_have_the_ids_of_the_same_values(tmp_path: Path):
    items = items_of(blurred(buckets=3))
    raw = raw_items().slice(5, 2)
    fresh = raw.set_column(0, "item_id", pa.array([1, 2], pa.int64()))
    more = items.with_items(items.state.encode_items(fresh, where="new"))
    assert more.static["author_key"][-2:].tolist() == items.static["author_key"][FIRST_ROW + 5:FIRST_ROW + 7].tolist()


def test_exact_ids_differ_for_different_values_and_are_zero_for_null():
    values = pa.array([None, *range(-500, 500), (1 << 63) - 1, -(1 << 63)], pa.int64())
    ids = exact_ids(values)
    assert ids[0] == 0
    assert len(set(ids.tolist())) == len(values)
    assert ids[1:].min() >= FIRST_ROW
    assert exact_ids(pa.array(["a", "b", "a", None])).tolist()[::2] == [exact_ids(pa.array(["a"]))[0]] * 2
