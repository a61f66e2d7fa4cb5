"""Minutes of mixed traffic on a Ray Serve that `raycascade serve` starts here: every answer as promised, flat memory.

    python benchmarks/serve_soak.py                                   two minutes
    python benchmarks/serve_soak.py --minutes 30 --out runs.jsonl --table docs/results/serving.md

Needs redis-server. Two gateways, users in Redis, and a traffic log; recommendations, batches, events, explanations,
items, the model, and bad requests at a fixed rate, half of what the machine bears at most. Exit status 1: a bar was
missed.

Bars: every status is the expected one, and users without events get the items that the bundle gives them in this
process. Memory: a line through the samples of the last two thirds, by process; no process that was there all the time
grows by more than 2% of its memory, or by more than 4 MiB if that is more. Memory is what a process has of its own
(RssAnon), of the server, the replicas, Ray's processes, HAProxy and Redis.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the world stands beside the tests

from _fault_report import finish
from _serve_deployment import REPLICA, Deployment, Redis, private_bytes, redis_server
from _serve_load import Body, Right, bearable, event, right_answers, session

from tests.served import checked_bundle
from tests.tiny_world import item_id

STILL, ACTIVE = tuple(range(100, 112)), tuple(range(112, 125))  # users without events, and with
SAMPLE_S, MOST_IN_FLIGHT = 2.0, 48
GROWTH, LEAST_GROWTH = 0.02, 4 << 20
HEADER = ("| set-up | minutes | requests (a second) | kinds | unexpected | memory, MiB | growth of all, MiB | of the "
          "worst process, MiB | allowed, MiB | bar |\n|---|---|---|---|---|---|---|---|---|---|")


@dataclass
class Memory:
    """Samples of every process: when, and bytes."""

    began_s: float = field(default_factory=time.monotonic)
    titles: dict[int, str] = field(default_factory=dict)
    samples: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def take(self, processes: dict[int, str]) -> None:
        """One more sample of each."""
        now = time.monotonic() - self.began_s
        for pid, title in processes.items():
            if size := private_bytes(pid):
                self.titles[pid] = title
                self.samples.setdefault(pid, []).append((now, size))

    def growth(self) -> list[dict[str, Any]]:
        """Of each process that was there in the last two thirds: bytes by a straight line, and what is allowed."""
        until = max(moment for taken in self.samples.values() for moment, _ in taken)
        found = []
        for pid, taken in self.samples.items():
            late = np.array([one for one in taken if one[0] >= until / 3])
            if taken[0][0] > until / 3 or taken[-1][0] < until - 3 * SAMPLE_S or len(late) < 5:
                continue
            grown = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * (late[-1, 0] - late[0, 0])
            mean = float(late[:, 1].mean())
            found.append({"process": short(self.titles[pid]), "bytes": round(mean), "grown": round(grown),
                          "allowed": round(max(GROWTH * mean, LEAST_GROWTH))})
        return sorted(found, key=lambda one: one["allowed"] - one["grown"])


def short(title: str) -> str:
    """A name for a process."""
    if title.startswith(REPLICA):
        return title.removeprefix(REPLICA).split("#")[0]
    words = [Path(word).name for word in title.split() if not word.startswith("-")]
    return " ".join(words[:2])[:40]


class Traffic:
    """Mixed requests, each with the statuses that it may have."""

    def __init__(self, url: str, right: Right, *, seed: int) -> None:
        self._url, self._right, self._draw = url, right, random.Random(seed)
        self._session, self._number = session(), 0
        self.counts: dict[str, int] = {}
        self.unexpected: list[str] = []
        self.held_back = 0
        kinds: list[tuple[float, Callable[[], tuple[str, str, Any, set[int]]]]] = [
            (60, self._recommend), (4, self._batch), (15, self._events), (2, self._explain), (8, self._item),
            (3, self._model), (8, self._bad)]
        self._shares, self._kinds = zip(*kinds, strict=True)

    async def go_on(self, seconds: float, *, rate: float) -> None:
        """At moments of a clock, so many on their way at most."""
        running: set[asyncio.Task[None]] = set()
        at = time.monotonic()
        until = at + seconds
        while at < until:
            at += 1 / rate
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            if len(running) >= MOST_IN_FLIGHT:
                self.held_back += 1
                continue
            (make,) = self._draw.choices(self._kinds, self._shares)
            task = asyncio.create_task(self._one(make.__name__.strip("_"), *make()))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        await self._session.close()

    async def _one(self, kind: str, method: str, path: str, body: Any, expected: set[int]) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        sent = {"data": body, "headers": {"content-type": "application/json"}} if isinstance(body, bytes) else (
            {} if body is None else {"json": body})
        try:
            async with self._session.request(method, self._url + path, **sent) as reply:
                status, text = reply.status, await reply.text()
                answer = await reply.json() if status == 200 and kind == "recommend" else None
        except Exception as error:
            status, text, answer = 0, repr(error), None
        if status not in expected or (answer is not None and not self._is_right(answer)):
            self.unexpected.append(f"{kind}: {status} {text[:300]}")

    def _is_right(self, answer: Body) -> bool:
        if answer["degraded"] or answer["user_id"] not in STILL:
            return True
        heard = answer["user_source"] != "unavailable"
        items = [one["item_id"] for one in answer["items"]]
        return items == self._right.items[answer["user_id"], heard][None]

    # ---- kinds of requests
    def _recommend(self) -> tuple[str, str, Any, set[int]]:
        user = self._draw.choice([*STILL, *ACTIVE])
        return "POST", "/v1/recommend", {"user_id": user, "trace": self._draw.random() < 0.1}, {200}

    def _batch(self) -> tuple[str, str, Any, set[int]]:
        queries = [{"user_id": self._draw.choice(ACTIVE), "k": 3} for _ in range(self._draw.randint(1, 8))]
        return "POST", "/v1/recommend:batch", {"queries": queries}, {200}

    def _events(self) -> tuple[str, str, Any, set[int]]:
        self._number += 1
        return "POST", "/v1/events", {"events": [event(self._draw.choice(ACTIVE), self._number)]}, {200}

    def _explain(self) -> tuple[str, str, Any, set[int]]:
        item = item_id(self._draw.randrange(120))
        return "POST", "/v1/explain", {"user_id": self._draw.choice(ACTIVE), "item_id": item}, {200}

    def _item(self) -> tuple[str, str, Any, set[int]]:
        known = self._draw.random() < 0.9
        return "GET", f"/v1/items/{item_id(self._draw.randrange(120)) if known else 1}", None, {200 if known else 404}

    def _model(self) -> tuple[str, str, Any, set[int]]:
        return "GET", "/v1/model", None, {200}

    def _bad(self) -> tuple[str, str, Any, set[int]]:
        return self._draw.choice([
            ("POST", "/v1/recommend", b"{", {422}), ("POST", "/v1/recommend", {"user_id": 100, "k": 10_000}, {422}),
            ("POST", "/v1/recommend", {"user_id": [1]}, {422}), ("POST", "/v1/recommend", b" " * 1_100_000, {413}),
            ("GET", "/v1/recommend", None, {405}), ("GET", "/v1/nothing", None, {404}),
            ("POST", "/v1/events", {"events": [{"event_id": "", "user_id": 1, "item_id": 1}]}, {422})])


# ---------------------------------------------------------------- the run
async def soaked(server: Deployment, redis: Redis, right: Right, options: argparse.Namespace) -> dict[str, Any]:
    """A line of JSON."""
    rate = await bearable(server.url, options.rate)
    traffic, memory = Traffic(server.url, right, seed=options.seed), Memory()

    async def watch() -> None:
        while True:
            memory.take({**await asyncio.to_thread(server.processes), redis.pid: "redis-server"})
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    await traffic.go_on(60.0 * options.minutes, rate=rate)
    watching.cancel()
    growth = memory.growth()
    met = not traffic.unexpected and bool(growth) and growth[0]["grown"] <= growth[0]["allowed"]
    return {"part": "soak", "set_up": f"{options.mode}, two gateways", "met": met, "minutes": options.minutes,
            "rate": round(rate, 1), "counts": traffic.counts, "held_back": traffic.held_back,
            "unexpected": len(traffic.unexpected), "first_unexpected": traffic.unexpected[:5],
            "bytes": sum(one["bytes"] for one in growth), "grown": sum(one["grown"] for one in growth),
            "worst": growth[:5]}


def row(line: dict[str, Any]) -> str:
    """A line of JSON as a row of the table."""
    worst = line["worst"][0]
    mib = [f"{size / (1 << 20):.1f}" for size in (line["bytes"], line["grown"], worst["grown"], worst["allowed"])]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(line["counts"].items()))
    cells = [line["set_up"], f"{line['minutes']:g}", f"{sum(line['counts'].values()):,} ({line['rate']:.0f})", kinds,
             line["unexpected"], mib[0], mib[1], f"{mib[2]} ({worst['process']})", mib[3],
             "met" if line["met"] else "MISSED"]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="A soak with mixed traffic.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--mode", default="composed", choices=["composed", "fused"])
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second, where the machine bears them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="", help="a file of JSON lines to add to")
    parser.add_argument("--table", default="", help="a page whose table of soaks is written anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rc") as folder, redis_server(Path(folder, "redis")) as redis:
        uri = checked_bundle(f"{folder}/one")
        right = asyncio.run(right_answers(uri, [], STILL))
        # Ids of events are forgotten after a minute, so that what a user has does not grow for a day.
        served = ["gateway.replicas=2", "users.store=redis", f"users.url={redis.url}", "users.dedup_s=60",
                  "users.timeout_ms=500", f"traffic.uri={folder}/traffic", "traffic.rotate_s=20", "deadline_ms=10000"]
        with Deployment(Path(folder, "s"), uri, mode=options.mode, options=served) as server:
            line = asyncio.run(soaked(server, redis, right, options))
    return finish([line], header=HEADER, as_row=row, out=options.out, table=options.table)


if __name__ == "__main__":
    sys.exit(main())
