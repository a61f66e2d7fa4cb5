"""The catalogue beside a traffic log: Parquet or CSV files with the raw features of every item."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycascade import storage
from raycascade.datasets import _columns, _files
from raycascade.errors import DataError
from raycascade.schema import AgeFeature, ClockFeature, DenseFeature, FeatureSchema, IdsFeature, VectorFeature

SEPARATOR = ","  # of the values of a list in CSV


def read_items(raw: str, items: str, schema: FeatureSchema) -> pa.Table:
    """`item_id` and the features that the schema declares; moments are Unix milliseconds. DataError for a column that
    is missing and for an item with two rows."""
    place = items if "://" in items or items.startswith("/") else storage.join(raw, items)
    folder, _, pattern = place.rpartition("/")
    found = _files.required(folder or "/", pattern)
    moments = [f.source for f in schema.side("item") if isinstance(f, AgeFeature | ClockFeature)]
    features = [f for f in schema.side("item") if f.kind in ("id", "ids", "dense", "vector") and f.name != "item_id"]
    wanted = list(dict.fromkeys(["item_id", *moments, *(f.name for f in features)]))
    types: dict[str, pa.DataType] = dict.fromkeys(moments, pa.float64())
    types |= {f.name: pa.float64() for f in features if isinstance(f, DenseFeature)}
    types |= {f.name: pa.string() for f in features if isinstance(f, IdsFeature | VectorFeature)}
    for file in found:
        _columns.require(_files.column_names(folder, file), {name: name for name in wanted}, where=file)
    table, where = _files.read_all(folder, found, columns=wanted, types=types), found[0]
    ids = _columns.ids(table["item_id"].combine_chunks(), "item_id", where=where)
    columns = {"item_id": _columns.without_nulls(ids, "item_id", where=where)}
    for name in moments:
        values = table[name].combine_chunks()
        columns[name] = _columns.milliseconds(values, name, "ms", utc_offset_hours=0.0, where=where)
    for feature in features:
        raw_values = table[feature.name].combine_chunks()
        columns[feature.name] = _columns.feature_column(raw_values, feature, SEPARATOR, where=where)
    counts = pc.value_counts(columns["item_id"]).flatten()
    if len(counts[0]) < len(table):
        twice = counts[0][int(np.argmax(counts[1].to_numpy()))]
        raise DataError(f"{where}: item {twice} has {pc.max(counts[1])} rows; keep one row per item")
    return pa.table(columns)


def item_ids(raw: str, items: str) -> pa.Array:
    """The ids of the catalogue alone."""
    return read_items(raw, items, FeatureSchema(features=()))["item_id"].combine_chunks()
