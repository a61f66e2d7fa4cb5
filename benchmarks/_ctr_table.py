"""A made-up click log as a table (one candidate a request), as shards and, row for row, as arrays for other libraries.

Half of the id fields belong to the request and half to the item, and so do the numbers. Every id field is hashed into
a table of its own; values are uniform, which is the most distinct rows a batch can hold and so the hardest case for
sparse updates. With a history each request has so many past items, of which two fields are seen.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from _shards import publish_shards

from raycascade.batch import Batch, collate
from raycascade.schema import FeatureSchema
from raycascade.shards import ShardReader, Shards

SPLIT_IDS, SPLIT_DENSE = 13, 7  # fields of the request; the others are the item's
SEEN = ("i00", "i01")  # fields of a past item
ATTENTION = {"din": 36, "afm": 8}  # units of an attention network's hidden layer
LAYERS = 2  # of cross and self-attention layers


@dataclass(frozen=True)
class Table:
    """What the log looks like."""

    rows: int  # values of an id field
    requests: int
    items: int
    ids: int = 26
    dense: int = 13
    history: int = 0  # past items of a request

    @property
    def user_ids(self) -> list[str]:
        """Id fields of the request."""
        return [f"u{n:02}" for n in range(SPLIT_IDS)]

    @property
    def item_ids(self) -> list[str]:
        """Id fields of the item."""
        return [f"i{n:02}" for n in range(self.ids - SPLIT_IDS)]

    @property
    def user_dense(self) -> list[str]:
        """Numbers of the request."""
        return [f"x{n:02}" for n in range(SPLIT_DENSE)]

    @property
    def item_dense(self) -> list[str]:
        """Numbers of the item."""
        return [f"y{n:02}" for n in range(self.dense - SPLIT_DENSE)]

    def schema(self) -> FeatureSchema:
        """The features of the log."""
        features: list[dict[str, Any]] = []
        for side, ids, dense in (("user", self.user_ids, self.user_dense), ("item", self.item_ids, self.item_dense)):
            features += [{"kind": "id", "name": name, "side": side, "buckets": self.rows} for name in ids]
            features += [{"kind": "dense", "name": name, "side": side} for name in dense]
        if self.history:
            features.append({"kind": "history", "max_len": self.history, "fields": SEEN})
        return FeatureSchema.model_validate({"features": features, "labels": ["click"], "positive": "click"})

    def spec(self, *, dim: int, hidden: list[int], batch: int, model: str) -> dict[str, object]:
        """What a peer must know to build the same model."""
        return {"ids": [*self.user_ids, *self.item_ids], "dense": [*self.user_dense, *self.item_dense],
                "num_rows": self.rows + 2, "dim": dim, "hidden": hidden, "batch": batch, "layers": LAYERS,
                "history": list(SEEN), "history_len": self.history, "attention": ATTENTION.get(model, 0)}


def model_options(model: str, *, dim: int, hidden: list[int]) -> dict[str, object]:
    """Our model with the sizes of `Table.spec`."""
    options: dict[str, object] = {"name": model, "dim": dim}
    if model in ("dcn", "dcn_v2", "autoint"):
        options["num_layers"] = LAYERS
    if model == "afm":
        options["attention_dim"] = ATTENTION["afm"]
    elif model != "autoint":
        options["hidden"] = hidden
    return options


def write_table(root: str, table: Table, *, candidates: int = 1) -> Shards:
    """The log as shards; every request has the same number of candidates."""
    draw = np.random.default_rng(3)
    count, shown = table.requests, table.requests * candidates
    lists = np.arange(0, shown + 1, candidates, dtype=np.int32)
    requests: dict[str, object] = {"request_id": np.arange(count), "user_id": np.arange(count),
                                   "time_ms": np.arange(count, dtype=np.int64)}
    requests |= {name: draw.integers(0, 1 << 40, count) for name in table.user_ids}
    requests |= {name: draw.normal(size=count) for name in table.user_dense}
    items = {"item_id": np.arange(table.items)} | {n: draw.integers(0, 1 << 40, table.items) for n in table.item_ids}
    items |= {name: draw.normal(size=table.items) for name in table.item_dense}
    requests["candidates"] = pa.ListArray.from_arrays(lists, pa.array(draw.integers(0, table.items, shown)))
    requests["click"] = pa.ListArray.from_arrays(lists, pa.array(draw.integers(0, 2, shown)))
    if table.history:
        events = np.arange(0, count * table.history + 1, table.history, dtype=np.int32)
        past = pa.array(draw.integers(0, table.items, count * table.history))
        requests["history"] = pa.ListArray.from_arrays(events, past)
    return publish_shards(root, table.schema(), pa.table(requests), pa.table(items), as_of_ms=count)


def batches_of(shards: Shards, batch: int) -> list[Batch]:
    """The training split as tensors, in the files' order."""
    reader = ShardReader(shards, "train", batch, shuffle=False)
    return [collate(rows, shards.items, keep=(1,), k=1) for rows in reader.batches(0)]


def arrays_of(batches: list[Batch], table: Table) -> dict[str, np.ndarray]:
    """The same rows for a peer, one a candidate: the request's values stand beside every candidate's."""
    columns: dict[str, list[np.ndarray]] = {"ids": [], "dense": [], "label": [], "history": [], "length": []}
    for batch in batches:
        width = batch.mask_QC.shape[1]

        def own(names: list[str], batch: Batch = batch, width: int = width) -> list[np.ndarray]:
            return [batch.user[n].repeat_interleave(width).numpy() for n in names]

        def shown(names: list[str], batch: Batch = batch) -> list[np.ndarray]:
            return [batch.item[n].flatten().numpy() for n in names]

        columns["ids"].append(np.stack([*own(table.user_ids), *shown(table.item_ids)], 1))
        columns["dense"].append(np.stack([*own(table.user_dense), *shown(table.item_dense)], 1))
        assert batch.targets is not None
        columns["label"].append(batch.targets.labels["click"].flatten().numpy())
        if table.history:
            past = np.stack([batch.history[name].numpy() for name in SEEN], 2)
            columns["history"].append(past.repeat(width, 0))
            columns["length"].append(batch.history_mask_QL.sum(1).numpy().repeat(width, 0))
    return {name: np.concatenate(parts) for name, parts in columns.items() if parts}
