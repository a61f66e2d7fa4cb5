"""Crosses of several values and of the history: which combinations there are, their rows, and which of them count."""

from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raycascade.batch import Batch, collate
from raycascade.errors import ConfigError
from raycascade.fitting import FitPart
from raycascade.items import ItemTable
from raycascade.keys import fold
from raycascade.schema import FeatureSchema, Field
from tests import tiny_world
from tests.tiny_world import DAY_MS, START_MS

BUCKETS = 1000
CROSSES: dict[str, dict[str, Any]] = {
    "city_tags": {"parts": ["city", "tags"]},
    "seen_item": {"parts": ["history.item_id", "item_id"], "max_events": 3},
    "seen_tags_author": {"parts": ["author", "history.tags", "history.action"], "max_events": 2},
    "city_seen": {"parts": ["city", "history.author"]},
}


def schema_with(crosses: dict[str, dict[str, Any]]) -> FeatureSchema:
    tree = tiny_world.SCHEMA.model_dump(mode="json")
    added = [{"kind": "cross", "name": name, "buckets": BUCKETS, **cross} for name, cross in crosses.items()]
    return FeatureSchema.model_validate({**tree, "features": [*tree["features"], *added]})


@pytest.fixture(scope="module")
def items() -> ItemTable:
    part = FitPart(schema_with(CROSSES))
    part.add_requests(tiny_world.raw_requests(), where="log")
    part.add_items(tiny_world.raw_items(), where="items")
    state = part.finish(tiny_world.raw_items(), as_of_ms=START_MS + 7 * DAY_MS)
    return ItemTable.from_encoded(state.encode_items(tiny_world.raw_items(), where="items"), state)


@pytest.fixture(scope="module")
def batch(items: ItemTable) -> Batch:
    return collate(items.state.encode_requests(tiny_world.raw_requests().slice(0, 40), where="log"), items)


def values_of(batch: Batch, part: str, q: int, c: int, max_events: int) -> list[int]:
    """All rows that a part has, the newest events of a history alone."""
    name = part.removeprefix("history.")
    if part != name:
        valid = batch.history[name][q][batch.history_mask_QL[q]]
        return valid[-max_events:].flatten().tolist()
    values = batch.item[name][q, c] if name in batch.item else batch.user[name][q]
    return values.view(-1).tolist()


@pytest.mark.parametrize("name", CROSSES)
def test_there_is_one_row_for_every_combination_of_known_values(batch: Batch, items: ItemTable, name: str):
    cross = CROSSES[name]
    seed = [feature.name for feature in items.state.schema.features].index(name)
    for q in range(batch.num_requests):
        for c in range(batch.mask_QC.shape[1]):
            seen = batch.item[name][q, c] if name in batch.item else batch.user[name][q]
            parts = [values_of(batch, part, q, c, cross.get("max_events", 10)) for part in cross["parts"]]
            known = [values for values in product(*parts) if min(values) >= 2]
            hashed = [2 + int(fold([np.array([v]) for v in values], seed=seed)[0]) % BUCKETS for values in known]
            assert sorted(row for row in seen.tolist() if row) == sorted(hashed)


def test_crosses_of_several_values_are_summed_lists_on_the_side_of_their_parts(items: ItemTable):
    def field(name: str, side: Any, width: int) -> Field:
        return Field(name=name, side=side, form="ids", table=name, num_rows=BUCKETS + 2, width=width, pool="sum")

    space = items.state.space
    assert space["city_tags"] == field("city_tags", "pair", 3)
    assert space["seen_item"] == field("seen_item", "pair", 3)
    assert space["seen_tags_author"] == field("seen_tags_author", "pair", 2 * 3 * 2)
    assert space["city_seen"] == field("city_seen", "request", 10)
    assert space["city_author"] == Field(name="city_author", side="pair", form="id", table="city_author", num_rows=66)


def test_no_history_and_no_candidates_give_no_combination(items: ItemTable):
    raw = tiny_world.raw_requests().slice(0, 3)
    empty = pa.array([[]] * 3, pa.list_(pa.int64()))
    for name, kind in (("history", pa.int64()), ("history_time_ms", pa.int64()), ("history_action", pa.string())):
        raw = raw.set_column(raw.column_names.index(name), name, empty.cast(pa.list_(kind)))
    bare = collate(items.state.encode_requests(raw, where="log"), items)
    assert not bare.item["seen_item"].any()
    assert not bare.user["city_seen"].any()
    assert bare.item["city_tags"].any()
    raw = raw.drop_columns(["candidates", "click"])
    without = collate(items.state.encode_requests(raw, where="log", strict=False), items)
    assert without.item["city_tags"].shape[:2] == (3, 0)


def test_survivors_keep_their_combinations(batch: Batch, items: ItemTable):
    kept = batch.with_candidates(batch.candidates_QC[:, [4, 1]], batch.mask_QC[:, [4, 1]], items)
    for name in ("city_tags", "seen_item", "seen_tags_author"):
        assert kept.item[name].tolist() == batch.item[name][:, [4, 1]].tolist()


@pytest.mark.parametrize(("parts", "words"), [
    (["city", "history.city"], "refers to 'history.city', which is not there"),
    (["city", "history.autor"], "did you mean 'history.author'"),
    (["city", "history.event_age"], "refers to 'history.event_age'"),
    (["city", "length"], "refers to 'length'"),
])
def test_a_part_that_events_do_not_carry_is_refused_in_one_line(parts: list[str], words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        schema_with({"x": {"parts": parts}})
    assert "\n" not in str(caught.value)


def test_a_history_that_carries_few_fields_offers_no_others():
    tree = tiny_world.SCHEMA.model_dump(mode="json")
    features = [f for f in tree["features"] if f["kind"] != "history"]
    history = {"kind": "history", "fields": ["item_id"]}
    cross = {"kind": "cross", "name": "x", "parts": ["city", "history.author"]}
    with pytest.raises(ConfigError, match=r"refers to 'history\.author'"):
        FeatureSchema.model_validate({**tree, "features": [*features, history, cross]})
