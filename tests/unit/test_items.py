"""The catalogue in memory: what stands in its two special rows, and gathering by rows of any shape."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade.errors import DataError
from raycascade.fitting import FitPart
from raycascade.items import ItemTable
from raycascade.schema import CountFeature, FeatureSchema
from tests import tiny_world
from tests.tiny_world import DAY_MS, NUM_ITEMS, START_MS

END_MS = START_MS + 7 * DAY_MS


@pytest.fixture(scope="module")
def items() -> ItemTable:
    state = tiny_world.fitted()
    return ItemTable.from_encoded(state.encode_items(tiny_world.raw_items(), where="items"), state)


def test_rows_and_raw_ids_are_each_others_inverse(items: ItemTable):
    assert items.num_items == NUM_ITEMS
    assert items.all_rows.tolist() == list(range(2, NUM_ITEMS + 2))
    raw = items.ids_of(items.all_rows)
    assert raw == tiny_world.raw_items()["item_id"].to_pylist()
    assert items.state.item_ids.lookup(pa.array(raw)).tolist() == items.all_rows.tolist()
    assert items.ids_of(np.array([[0, 1], [2, 3]])) == [None, None, tiny_world.item_id(0), tiny_world.item_id(1)]
    assert items.ids_of(np.array([])) == []


def test_padding_is_zero_and_an_unknown_item_has_unknown_values(items: ItemTable):
    fields = items.fields(np.array([0, 1]), END_MS)
    for field in items.state.space.of("item"):
        if field.name != "views":
            padding, unknown = fields[field.name]
            assert not padding.any(), field.name
            assert unknown.eq(1 if field.form == "id" else 0).all(), field.name
    nobody = fields["views"]
    mean, std = items.count_stats["views"]
    np.testing.assert_allclose(nobody.numpy(), (0 - mean) / std, rtol=1e-6)


def test_rows_of_any_shape_give_the_rows_one_by_one(items: ItemTable):
    rows = np.random.default_rng(1).integers(0, NUM_ITEMS + 2, (3, 4))
    times = START_MS + np.arange(3)[:, None] * 2 * DAY_MS
    together = items.fields(torch.from_numpy(rows), times)
    for q in range(3):
        for c in range(4):
            alone = items.fields(rows[q, c:c + 1], int(times[q, 0]))
            for name, tensor in together.items():
                assert torch.equal(tensor[q, c], alone[name][0]), name


def test_names_restrict_to_static_fields(items: ItemTable):
    assert set(items.fields(np.array([2]), END_MS, names=("author", "tags"))) == {"author", "tags"}
    assert set(items.fields(np.array([2]), END_MS)) == {field.name for field in items.state.space.of("item")}


def test_an_item_that_is_not_born_yet_is_new_and_one_without_a_birth_is_unknown():
    raw = tiny_world.raw_items().slice(0, 3)
    raw = raw.set_column(raw.column_names.index("born_ms"), "born_ms", pa.array([END_MS + 5, None, END_MS - 7_000]))
    state = tiny_world.fitted()
    table = ItemTable.from_encoded(state.encode_items(raw, where="items"), state)
    assert table.fields(table.all_rows, END_MS)["age"].tolist() == [2, 1, 2 + 3]


def test_counts_are_standardised_over_the_catalogue_at_the_end_of_the_training_log(items: ItemTable):
    values = items.fields(items.all_rows, items.state.as_of_ms)["views"].numpy()
    assert values.mean() == pytest.approx(0.0, abs=1e-5)
    assert values.std() == pytest.approx(1.0, abs=1e-5)
    shown = np.zeros(NUM_ITEMS)
    for row in tiny_world.raw_requests().to_pylist():
        for item in row["candidates"]:
            shown[(item - 5000) // 7] += 1
    raw = items.count(CountFeature(name="views"), items.all_rows, items.state.as_of_ms)
    np.testing.assert_allclose(raw, np.log1p(shown), rtol=1e-6)


def test_a_missing_number_has_an_indicator_which_the_unknown_item_has_too():
    schema = FeatureSchema.model_validate({"features": [{"kind": "dense", "name": "price", "side": "item"}]})
    raw, part = pa.table({"item_id": ["a", "b", "c"], "price": [1.0, None, 3.0]}), FitPart(schema)
    part.add_items(raw, where="items")
    state = part.finish(raw, as_of_ms=0)
    table = ItemTable.from_encoded(state.encode_items(raw, where="items"), state)
    fields = table.fields(np.arange(5), 0)
    assert fields["price"].tolist() == [0, 0, -1, 0, 1]
    assert fields["price_missing"].tolist() == [0, 1, 0, 1, 0]


def test_an_items_table_without_a_declared_column_is_refused():
    state = tiny_world.fitted()
    for name in ("author", "born_ms", "content"):
        with pytest.raises(DataError, match=f"items: column '{name}' is missing"):
            state.encode_items(tiny_world.raw_items().drop_columns([name]), where="items")
