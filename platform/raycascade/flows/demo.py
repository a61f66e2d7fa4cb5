"""demo: the whole path on a simulated world, from a raw log to one request over HTTP."""

import json
import math
import sys
from importlib import resources
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raycascade import storage
from raycascade.bundle import load_bundle
from raycascade.config import Config, parse_config
from raycascade.explain import explain_item
from raycascade.flows.evaluate import evaluate
from raycascade.flows.prepare import prepare
from raycascade.flows.score import score
from raycascade.flows.train import train
from raycascade.serving.options import ServeOptions

NUM_REQUESTS = 200
TOLERANCE = 1e-5


def demo_config(folder: str) -> Config:
    """The packaged demo config with its outputs below `folder`."""
    tree = yaml.safe_load(resources.files("raycascade").joinpath("demo.yaml").read_text())
    tree["paths"] = {"shards": storage.join(folder, "shards"), "bundles": storage.join(folder, "bundles")}
    return parse_config(tree, where="demo.yaml")


def demo(folder: str) -> dict[str, Any]:
    """Runs every verb in turn below `folder`; returns their results by verb.

    The answers over HTTP, in batch and in process must be the same; AssertionError otherwise.
    """
    config = demo_config(storage.absolute(folder))
    results: dict[str, Any] = {"prepare": _say("prepare", prepare(config))}
    results["train"] = _say("train", train(config))
    uri = results["train"]["bundle"]
    results["evaluate"] = _say("evaluate", evaluate(uri))
    bundle = load_bundle(uri)
    users = bundle.users.table["user_key"].slice(0, NUM_REQUESTS)
    requests = storage.absolute(storage.join(folder, f"requests-{bundle.config.train.run}.parquet"))
    out = storage.join(folder, f"scores-{bundle.config.train.run}")
    pq.write_table(pa.table({"request_id": pa.array([f"r{i}" for i in range(len(users))]), "user_id": users}), requests)
    results["score"] = _say("score", score(uri, requests=requests, out=storage.absolute(out)))
    results["serve"] = _say("serve", _serve_once(uri, storage.absolute(out)))
    best = results["serve"]["items"][0]
    results["explain"] = explain_item(bundle, user=str(users[0].as_py()), item=str(best))
    return results


def _say(verb: str, result: dict[str, Any]) -> dict[str, Any]:
    """One line on standard error as each verb ends."""
    brief = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
    sys.stderr.write(f"{verb}: {json.dumps(brief)}\n")
    return result


def _serve_once(uri: str, scored: str) -> dict[str, Any]:
    """Serves the bundle, asks for every tenth user, and compares with the batch scores and the process."""
    import httpx

    from raycascade.flows import serving

    bundle = load_bundle(uri)
    rows = pq.read_table(scored).to_pylist()[::10]
    url = serving.start(uri, ServeOptions(port=0, deadline_ms=30_000))
    answer: dict[str, Any] = {}
    try:
        for row in rows:
            reply = httpx.post(f"{url}/v1/recommend", json={"user_id": row["user_id"]}, timeout=30.0)
            reply.raise_for_status()
            answer = reply.json()
            served = [(item["item_id"], item["score"]) for item in answer["items"]]
            check_same(served, list(zip(row["items"], row["scores"], strict=True)))
            final = bundle.recommend(bundle.encode(pa.table({"user_id": [row["user_id"]]}))).final
            kept, mask = final.kept()
            items, scores = bundle.items.ids_of(kept[0][mask[0]]), final.scores_QC[0, :final.keep][mask[0]].tolist()
            check_same(served, list(zip(items, scores, strict=True)))
    finally:
        serving.stop()
    return {"url": f"{url}/v1/recommend", "requests": len(rows), "same_in_batch_and_process": True,
            "user_id": answer["user_id"], "items": [item["item_id"] for item in answer["items"]]}


def check_same(left: list[tuple[Any, float]], right: list[tuple[Any, float]]) -> None:
    """The same items in the same order, scores within 1e-5."""
    assert [item for item, _ in left] == [item for item, _ in right], (left, right)
    same = (math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
            for (_, a), (_, b) in zip(left, right, strict=True))
    assert all(same), (left, right)
