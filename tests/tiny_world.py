"""A hand-made log of every feature kind, small enough to fit and bundle in a second, without Ray and training."""

import numpy as np
import pyarrow as pa
import torch

from raycascade.bundle import save_bundle
from raycascade.cascade import Cascade
from raycascade.config import Config, parse_config
from raycascade.features import FeatureState
from raycascade.fitting import FitPart
from raycascade.items import ItemTable
from raycascade.schema import FeatureSchema

NUM_ITEMS, NUM_USERS, DAY_MS = 120, 25, 86_400_000
START_MS = 1_704_067_200_000  # 2024-01-01
KEEPS = {"retriever": 40, "pre_ranker": 15, "ranker": 5}
SCHEMA = FeatureSchema.model_validate({
    "features": [
        {"kind": "id", "name": "city", "side": "user"},
        {"kind": "dense", "name": "income", "side": "user"},
        {"kind": "id", "name": "device", "side": "context", "buckets": 16},
        {"kind": "clock", "name": "hour", "part": "hour"},
        {"kind": "id", "name": "item_id", "side": "item"},
        {"kind": "id", "name": "author", "side": "item"},
        {"kind": "ids", "name": "tags", "side": "item", "max_len": 3},
        {"kind": "dense", "name": "length", "side": "item", "normalise": "log"},
        {"kind": "vector", "name": "content", "side": "item", "dim": 4},
        {"kind": "age", "name": "age", "side": "item", "source": "born_ms"},
        {"kind": "count", "name": "views"},
        {"kind": "match", "name": "same_author", "field": "author"},
        {"kind": "cross", "name": "city_author", "parts": ["city", "author"], "buckets": 64},
        {"kind": "id", "name": "action", "side": "event"},
        {"kind": "age", "name": "event_age", "side": "event"},
        {"kind": "history", "max_len": 10},
    ],
    "labels": ["click"], "positive": "click",
})


def config(*, keeps: dict[str, int] | None = None) -> Config:
    """Three stages; the data set is never read."""
    keeps = keeps or KEEPS
    models = {"retriever": "two_tower", "pre_ranker": "mlp", "ranker": "din"}
    pairs = {"retriever": ["same_author", "city_author"]}
    stages = [{"name": name, "keep": keep, "model": {"name": models[name], "dim": 8, "hidden": [16]},
               "exclude": pairs.get(name, []), "prior": name == "ranker"} for name, keep in keeps.items()]
    tree = {"dataset": {"name": "simulated"}, "splits": {"test_from": "2024-01-08"}, "stages": stages}
    return parse_config(tree, where="tiny")


def item_id(position: int) -> int:
    """Raw ids that are not the rows."""
    return 5000 + 7 * position


def raw_items() -> pa.Table:
    draw = np.random.default_rng(1)
    tags = [draw.integers(0, 9, draw.integers(0, 4)).tolist() for _ in range(NUM_ITEMS)]
    content = draw.normal(size=(NUM_ITEMS, 4)).astype(np.float32).tolist()
    return pa.table({
        "item_id": pa.array([item_id(p) for p in range(NUM_ITEMS)], pa.int64()),
        "author": pa.array([f"author {a}" for a in draw.integers(0, 12, NUM_ITEMS)]),
        "tags": pa.array(tags, pa.list_(pa.int64())),
        "length": draw.lognormal(2.0, 1.0, NUM_ITEMS),
        "content": pa.array(content, pa.list_(pa.float32())),
        "born_ms": pa.array(START_MS - draw.integers(0, 30 * DAY_MS, NUM_ITEMS), pa.int64()),
    })


def raw_requests() -> pa.Table:
    """Eight requests of every user in the first week, candidates drawn at random. User 3 must not get five items."""
    draw = np.random.default_rng(2)
    count = 8 * NUM_USERS
    users = np.repeat(np.arange(NUM_USERS), 8)
    moments = START_MS + np.tile(np.arange(8) * 20, NUM_USERS) * 3_600_000
    past = [[item_id(p) for p in draw.integers(0, NUM_ITEMS, draw.integers(0, 14))] for _ in range(count)]
    actions = [["click" if one % 2 else "skip" for one in row] for row in past]
    times = [[int(moment) - 60_000 * (len(row) - i) for i in range(len(row))]
             for row, moment in zip(past, moments, strict=True)]
    candidates = [[item_id(p) for p in draw.choice(NUM_ITEMS, 6, replace=False)] for _ in range(count)]
    exclude = [[item_id(p) for p in range(5)] if user == 3 else [] for user in users]
    return pa.table({
        "request_id": pa.array([f"q{i}" for i in range(count)]), "user_id": pa.array(100 + users, pa.int64()),
        "time_ms": pa.array(moments, pa.int64()), "city": pa.array([f"city {u % 4}" for u in users]),
        "income": pa.array([None if u % 5 == 0 else float(u) for u in users], pa.float64()),
        "device": pa.array([["phone", "desk"][d] for d in draw.integers(0, 2, count)]),
        "history": pa.array(past, pa.list_(pa.int64())), "history_time_ms": pa.array(times, pa.list_(pa.int64())),
        "history_action": pa.array(actions, pa.list_(pa.string())),
        "exclude": pa.array(exclude, pa.list_(pa.int64())),
        "candidates": pa.array(candidates, pa.list_(pa.int64())),
        "click": pa.array([draw.integers(0, 2, 6).tolist() for _ in range(count)], pa.list_(pa.int64())),
    })


def fitted() -> FeatureState:
    part = FitPart(SCHEMA)
    part.add_requests(raw_requests(), where="tiny")
    part.add_items(raw_items(), where="tiny")
    return part.finish(raw_items(), as_of_ms=START_MS + 7 * DAY_MS)


def encoded_users(state: FeatureState) -> pa.Table:
    """Each user's last request as the state at the end of the log, as `prepare` writes it."""
    last = raw_requests().take(np.arange(7, 8 * NUM_USERS, 8)).drop_columns(["candidates", "click"])
    return state.encode_requests(last, where="tiny", strict=False)


def write_bundle(uri: str, *, keeps: dict[str, int] | None = None, seed: int = 11) -> str:
    """A bundle with random weights, large enough that scores differ."""
    state, encoded = fitted(), fitted().encode_items(raw_items(), where="tiny")
    torch.manual_seed(seed)
    chosen = config(keeps=keeps)
    cascade = Cascade(chosen, state.space)
    with torch.no_grad():
        for parameter in cascade.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        for module in cascade.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight[0] = 0.0  # padding
    return save_bundle(uri, config=chosen, cascade=cascade, items=ItemTable.from_encoded(encoded, state),
                       encoded_items=encoded, users=encoded_users(state), metrics={})
