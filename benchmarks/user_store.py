"""The user store in Redis: what a request waits for it, with the server and without, and how fast users are loaded.

    python benchmarks/user_store.py [--users 50000] [--events 50]

Needs redis-server. Ratios: a fetch beside a bare PING of the same client, a fetch of a dead server beside one of a
server that answers.
"""

import argparse
import asyncio
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from raycascade import storage
from raycascade.fitting import FitPart
from raycascade.flows import users as flow
from raycascade.schema import FeatureSchema
from raycascade.serving.users import IdKinds, NewEvent, StoreUnavailable
from raycascade.serving.users_redis import RedisUserStore

NUM_ITEMS, CALLS, DEAD_CALLS = 100_000, 2_000, 20_000
SCHEMA = FeatureSchema.model_validate({"features": [
    {"kind": "id", "name": "city", "side": "user"}, {"kind": "dense", "name": "income", "side": "user"},
    {"kind": "id", "name": "item_id", "side": "item"}, {"kind": "history", "max_len": 50},
    {"kind": "id", "name": "action", "side": "event"}], "labels": ["click"], "positive": "click"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--events", type=int, default=50)
    options = parser.parse_args()
    server = shutil.which("redis-server")
    if server is None:
        sys.exit("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder],
                                   stdout=subprocess.DEVNULL)
        try:
            url = f"redis://127.0.0.1:{port}/0"
            asyncio.run(answering(url))
            table = source(folder, options.users, options.events)
            print("users load:", flow.load(table, to=url, bundle=bundle(folder)))
            print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
            asyncio.run(measure(url, options.users, process))
        finally:
            process.kill()
            process.wait()


async def answering(url: str) -> None:
    """Waits for the server."""
    client = Redis.from_url(url)
    for _ in range(500):
        try:
            await client.ping()
            break
        except RedisConnectionError:
            await asyncio.sleep(0.02)
    await client.aclose()


def bundle(folder: str) -> str:
    """As much of a bundle as `users load` reads."""
    uri = f"{folder}/bundle"
    part = FitPart(SCHEMA)
    items = pa.table({"item_id": np.arange(NUM_ITEMS)})
    part.add_items(items, where="bench")
    part.finish(items, as_of_ms=1).save(f"{uri}/features")
    Path(uri, "users").mkdir()
    pq.write_table(pa.table({"user_key": pa.array([], pa.int64())}), f"{uri}/users/users.parquet")
    storage.write_json(f"{uri}/manifest.json", {})
    return uri


def source(folder: str, users: int, events: int) -> str:
    """Users with `events` events each."""
    draw = np.random.default_rng(1)
    offsets = pa.array(np.arange(users + 1) * events, pa.int32())
    times = np.sort(draw.integers(1_700_000_000_000, 1_710_000_000_000, (users, events)), axis=1).reshape(-1)

    def lists(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values if isinstance(values, pa.Array) else pa.array(values))

    table = pa.table({
        "user_id": np.arange(users), "city": draw.integers(0, 100, users).astype(str),
        "income": draw.normal(size=users),
        "history": lists(draw.integers(0, NUM_ITEMS, users * events)), "history_time_ms": lists(times),
        "history_action": lists(pa.array(["click", "skip"]).take(pa.array(draw.integers(0, 2, users * events))))})
    pq.write_table(table, f"{folder}/users.parquet", row_group_size=20_000)
    return f"{folder}/users.parquet"


async def measure(url: str, users: int, process: "subprocess.Popen[bytes]") -> None:
    store = RedisUserStore(url, IdKinds("int", "int"), namespace="raycascade", history_len=200, exclude_len=0,
                           dedup_s=86_400, timeout_s=1.0)
    client, draw = Redis.from_url(url, protocol=2), np.random.default_rng(2)
    await client.ping()
    waits: dict[str, list[float]] = {"PING": [], "fetch 1 user": [], "fetch 16 users": [], "append 1 event": []}
    for call in range(CALLS):
        drawn = draw.integers(0, users, 16).tolist()
        event = NewEvent(event_id=str(call), user_id=drawn[0], item_id=5, features={"action": "click"})
        for name, work in (("PING", client.ping()), ("fetch 1 user", store.fetch(drawn[:1], timeout_s=1.0)),
                           ("fetch 16 users", store.fetch(drawn, timeout_s=1.0)),
                           ("append 1 event", store.append([event], timeout_s=1.0))):
            began = time.perf_counter()
            await work
            waits[name].append(time.perf_counter() - began)
    process.kill()
    process.wait()
    dead = []
    for _ in range(DEAD_CALLS):
        began = time.perf_counter()
        try:
            await store.fetch([1], timeout_s=1.0)
        except StoreUnavailable:
            dead.append(time.perf_counter() - began)
    assert len(dead) == DEAD_CALLS
    waits["fetch, server dead"] = dead
    await client.aclose()
    await store.close()
    bare = float(np.median(waits["PING"]))
    for name, seconds in waits.items():
        p50, p99, most = np.percentile(seconds, [50, 99, 100]) * 1000
        print(f"{name:>18}: p50 {p50:7.3f} ms   p99 {p99:7.3f} ms   max {most:7.3f} ms   "
              f"{p50 / bare / 1000:.2f} x PING")


if __name__ == "__main__":
    main()
