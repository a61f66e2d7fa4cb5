"""Cascades two_tower -> mlp -> any model of the registry over a small simulated world, and the ways to ask them.

An answer is the raw ids of the recommended items, best first, and the last stage's scores.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycascade import plugins
from raycascade.bundle import Bundle
from raycascade.config import Config, parse_config
from raycascade.errors import ConfigError
from raycascade.flows import score as flow
from raycascade.flows.prepare import prepare
from raycascade.schema import FeatureSpace
from raycascade.serving.api import build_api
from raycascade.serving.gateway import Gateway
from raycascade.serving.stages import LocalStage, StageServer
from raycascade.shards import Shards
from tests.served import patient

MODELS = plugins.names("models")
CASES = [(name, tasks) for name in MODELS for tasks in (False, True)]  # one logit, or two tasks and a fusion
FITTED = tuple(name for name in MODELS if hasattr(plugins.find("models", name), "to_files"))
KEEPS = {"retriever": 60, "pre_ranker": 25, "ranker": 8}
LAST = tuple(KEEPS)[-1]
TASKS = ("click", "long_view")
NUM_ITEMS, NUM_USERS, UNKNOWN_USER = 400, 64, 10_000_000
WORLD = {"name": "simulated", "num_users": NUM_USERS, "num_items": NUM_ITEMS, "num_days": 3, "pool": 90,
         "funnel": [25, 18, 12], "per_level": 5, "shown": 4, "history_len": 20}
FEW_TREES = {"rounds": 8, "depth": 3}
# Few steps on a tiny world must be enough for scores that differ. Over some thirty fields the gates of edcn let through
# a thirtieth at every level, and nothing is left of the differences between items.
# The maxima of int_tower's small heads start within a thousandth of one another; wider embeddings set them apart.
OPTIONS: dict[str, dict[str, Any]] = {**dict.fromkeys(FITTED, FEW_TREES), "int_tower": {"embedding_std": 1.0}}
Answer = tuple[list[Any], list[float]]


# ---------------------------------------------------------------- the cascade
def world(folder: Path) -> str:
    """Shards of the simulated world, made by the real verb."""
    return prepare(_config(str(folder / "shards"), [_stage("retriever", "two_tower", exclude=["pair"])]))["shards"]


def config_of(shards: str, model: str, *, tasks: bool, run: str = "", space: FeatureSpace | None = None) -> Config:
    """Three stages, the last of them the model without the features that it refuses by name."""
    space = space or Shards.open(shards).state.space
    last = _stage(LAST, model, exclude=_refused(model, space, num_tasks=len(TASKS) if tasks else 1))
    if tasks:
        last |= {"tasks": list(TASKS), "fusion": {"product": {"click": 0.5, "long_view": 1.0}}}
    if tasks and model not in FITTED:
        last["loss"] = {"name": "bce"}
    first = [_stage("retriever", "two_tower", exclude=["pair"]), _stage("pre_ranker", "mlp")]
    return _config(shards, [*first, last], run=run or case_name(model, tasks=tasks))


def case_name(model: str, *, tasks: bool) -> str:
    return f"{model}-two-tasks" if tasks else model


def _config(shards: str, stages: list[dict[str, Any]], *, run: str | None = None) -> Config:
    return parse_config({
        "paths": {"shards": shards, "bundles": f"{shards}-bundles"}, "dataset": WORLD,
        "splits": {"test_from": "2024-01-03"}, "stages": stages, "loss": {"name": "bce", "label": "long_view"},
        "lists": {"k": 3, "quotas": [10, 8, 6][:len(stages)]},
        "train": {"batch_size": 16, "lr": 0.01, "gpu": False, "max_steps": 6, "run": run},
    }, where="three stages")


def _stage(name: str, model: str, *, exclude: Iterable[str] = ()) -> dict[str, Any]:
    options = {"name": model, **OPTIONS.get(model, {})}
    return {"name": name, "keep": KEEPS[name], "model": options, "exclude": list(exclude)}


def _refused(model: str, space: FeatureSpace, *, num_tasks: int) -> list[str]:
    """The features that the model names in its errors, one after the other."""
    plugin, refused = plugins.find("models", model), []
    while True:
        try:
            plugin(plugin.Config(), space.without(tuple(refused)), num_tasks=num_tasks)
        except ConfigError as error:
            named = [f.name for f in space.fields if f.name not in refused and repr(f.name) in str(error)]
            if not named:
                raise
            refused += named
        else:
            return refused


# ---------------------------------------------------------------- what is asked
def queries(bundle: Bundle) -> list[dict[str, Any]]:
    """Users of the log, nobody, and two who bring a history; bodies of HTTP requests."""
    known: list[Any] = bundle.users.table["user_key"].to_pylist()[:4]
    items = bundle.items.ids_of(bundle.items.all_rows[:NUM_ITEMS:60])
    return [*({"user_id": user} for user in known), {"user_id": UNKNOWN_USER},
            {"user_id": known[0], "history": items[:4]}, {"user_id": UNKNOWN_USER, "history": items[1:]}]


def requests_of(asked: list[dict[str, Any]]) -> pa.Table:
    """The queries as the rows of a table of requests."""
    return pa.table({
        "request_id": [f"r{number}" for number in range(len(asked))],
        "user_id": pa.array([query["user_id"] for query in asked], pa.int64()),
        "history": pa.array([query.get("history") for query in asked], pa.list_(pa.int64())),
    })


# ---------------------------------------------------------------- ways to an answer
def answers_of(bundle: Bundle, requests: pa.Table) -> list[Answer]:
    """In this process: the cascade of the bundle over its index."""
    final = bundle.recommend(bundle.encode(requests)).final
    kept = zip(*final.kept(), final.scores_QC, strict=True)
    return [(bundle.items.ids_of(rows[mask]), scores[:final.keep][mask].tolist()) for rows, mask, scores in kept]


def read_answers(out: str | Path) -> list[Answer]:
    """Results of `score`, in the order of the requests."""
    rows = sorted(pq.read_table(out).to_pylist(), key=lambda row: int(row["request_id"][1:]))
    return [(row["items"], row["scores"]) for row in rows]


def scored_by_actor(uri: str, requests: str, out: Path) -> list[Answer]:
    """What the actor of `score` writes for the pieces of a Parquet file, without Ray Data around it."""
    actor = flow.Scorer(uri, requests, str(out))
    for piece in flow.pieces({"": [pq.read_metadata(requests).num_rows]}, num_actors=1):
        done = actor({name: np.array([value]) for name, value in asdict(piece).items()})
        assert not done["error"][0], done["message"][0]
    return read_answers(out)


def served_in_process(gateway_bundle: Bundle, asked: list[dict[str, Any]]) -> list[Answer]:
    """The real gateway and HTTP interface, every stage with a bundle that it loads itself; no Ray and no socket."""
    uri = gateway_bundle.uri
    gateway = Gateway(gateway_bundle, {name: LocalStage(StageServer(uri, name)) for name in KEEPS}, patient())

    async def all_replies() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=build_api(gateway), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.post("/v1/recommend", json=query) for query in asked]

    return [read_reply(reply) for reply in asyncio.run(all_replies())]


def served_over_http(url: str, asked: list[dict[str, Any]]) -> list[Answer]:
    """What a deployment answers."""
    return [read_reply(httpx.post(f"{url}/v1/recommend", json=query, timeout=60.0)) for query in asked]


def read_reply(reply: httpx.Response) -> Answer:
    assert reply.status_code == 200, reply.text
    items = reply.json()["items"]
    return [item["item_id"] for item in items], [item["score"] for item in items]


def greatest_difference(left: list[Answer], right: list[Answer]) -> float:
    """Between scores; AssertionError where there are other items or another order."""
    assert len(left) == len(right)
    for (one, _), (other, _) in zip(left, right, strict=True):
        assert one == other
    return max(abs(a - b) for (_, one), (_, other) in zip(left, right, strict=True)
               for a, b in zip(one, other, strict=True))
