"""Servers for the tests of the page: uvicorn in a thread, and a made-up API with the shapes of the real one.

The made-up one serves what a hand-made bundle cannot: large funnels, degraded answers, items whose ids are markup.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

from raycascade.serving.page import mount_page


@contextlib.contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The URL of an application on a free loopback port, until the block ends."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the server has ended"
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@dataclass
class World:
    """A catalogue and a cascade that are made up. `seed` decides the scores, and `drift` how far they are from those of
    the same seed without it, as those of the next version of a model are."""

    num_items: int = 100_000
    keeps: dict[str, int] = field(default_factory=lambda: {"retriever": 500, "pre_ranker": 100, "ranker": 20})
    seed: int = 1
    drift: float = 0.0
    model: str = "2026-03-demo"
    degraded_at: str | None = None
    names: Sequence[str] = ()  # ids of the best items, instead of numbers
    problem: tuple[int, dict[str, Any]] | None = None  # what every request for recommendations gets
    key: str = ""
    silent: threading.Event = field(default_factory=threading.Event)  # while it is set, nobody hears what is served
    seen: list[dict[str, Any]] = field(default_factory=list)  # bodies that came in
    shown: list[str] = field(default_factory=list)  # what was shown as a key

    @property
    def version(self) -> str:
        """Sixteen digits."""
        return f"{self.seed:08x}{round(1000 * self.drift):08x}"

    def item_id(self, position: int) -> int | str:
        """The id of the item at a place of the catalogue."""
        return self.names[position] if position < len(self.names) else 1_000_000 + position

    def funnel(self, user: str) -> dict[str, list[tuple[int, float]]]:
        """Position and score of what every stage keeps, best first; each stage agrees with the one before by half."""
        draw = np.random.default_rng([self.seed, *user.encode()])
        alive, scores = np.arange(self.num_items), draw.normal(size=self.num_items)
        scores = scores + self.drift * np.random.default_rng(0).normal(size=self.num_items)
        kept: dict[str, list[tuple[int, float]]] = {}
        for stage, keep in self.keeps.items():
            best = np.argsort(-scores, kind="stable")[:keep]
            alive, scores = alive[best], scores[best]
            kept[stage] = [(int(p), float(s)) for p, s in zip(alive, scores, strict=True)]
            scores = 0.6 * scores + 0.5 * draw.normal(size=self.num_items)[alive]
        return kept

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """As POST /v1/recommend gives it."""
        kept, trace, final = self.funnel(str(body["user_id"])), [], []
        for stage, keep in self.keeps.items():
            if stage == self.degraded_at:
                break
            final = [{"item_id": self.item_id(p), "score": s} for p, s in kept[stage]]
            trace.append({"stage": stage, "keep": keep, "items": final})
        most = list(self.keeps.values())[-1]
        answer = {
            "request_id": f"{len(self.seen):032x}", "user_id": body["user_id"],
            "items": final[:body.get("k", most)], "model": self.model, "version": self.version, "known_user": True,
            "user_source": "store", "degraded": self.degraded_at is not None}
        if self.degraded_at:
            answer |= {"degraded_at": self.degraded_at, "reason": "deadline"}
        timings_ms = {"encode": 0.9, **{stage["stage"]: 2.31 * 2 ** at for at, stage in enumerate(trace)}}
        return answer | {"trace": trace, "timings_ms": timings_ms}

    def explanation(self, body: dict[str, Any]) -> dict[str, Any]:
        """As POST /v1/explain gives it; stages after the loss have the item in the middle."""
        kept, stages, lost = self.funnel(str(body["user_id"])), [], None
        for stage, keep in self.keeps.items():
            places = [str(self.item_id(p)) for p, _ in kept[stage]]
            survives, cut = str(body["item_id"]) in places, kept[stage][-1][1]
            at = places.index(str(body["item_id"])) if survives else keep + 7
            score = kept[stage][at][1] if survives else cut - 0.125
            if lost and not survives:
                at, score = keep // 2, kept[stage][keep // 2][1]
            stages.append({"stage": stage, "rank": at + 1, "score": score, "keep": keep, "cut": cut,
                           "survives": survives})
            lost = lost or (None if survives else stage)
        return {"request_id": "1", "user_id": body["user_id"], "item_id": body["item_id"], "model": self.model,
                "version": self.version, "known_user": True, "user_source": "store", "lost_at": lost, "stages": stages}


def world_api(world: World, *, peers: Sequence[str] = ()) -> FastAPI:
    """The API of a made-up world, with the page."""
    api = FastAPI()

    def refused(request: Request) -> Response | None:
        world.shown.append(request.headers.get("authorization", ""))
        if world.key and request.headers.get("authorization") != f"Bearer {world.key}":
            return _problem(401, {"title": "A valid API key is needed", "detail": "no API key; send it"})
        return None

    @api.get("/v1/model")
    def model(request: Request) -> Response:
        while world.silent.is_set():
            time.sleep(0.01)
        stages = [{"name": name, "model": "two_tower", "keep": keep} for name, keep in world.keeps.items()]
        return refused(request) or JSONResponse({"model": world.model, "version": world.version, "stages": stages,
                                                 "items": world.num_items, "users": 12_345, "index": "ivf"})

    @api.post("/v1/recommend")
    async def recommend(request: Request) -> Response:
        body = await request.json()
        world.seen.append(body)
        if world.problem:
            return _problem(*world.problem)
        return refused(request) or JSONResponse(world.answer(body))

    @api.post("/v1/explain")
    async def explain(request: Request) -> Response:
        body = await request.json()
        world.seen.append(body)
        return refused(request) or JSONResponse(world.explanation(body))

    @api.get("/v1/items/{item_id:path}")
    def item(item_id: str) -> dict[str, Any]:
        features = {"author": "author 7", "tags": ["news", "<b>local</b>"], "length": 183.25, "born_ms": None}
        return {"item_id": item_id, "model": world.model, "version": world.version, "features": features,
                "counts": {"exposures": 1234, "click": 87}}

    mount_page(api, peers=peers)
    return api


def _problem(status: int, body: dict[str, Any]) -> Response:
    headers = {"retry-after": "3"} if status == 429 else {}
    return JSONResponse({"type": "urn:raycascade:problem:x", "status": status, **body}, status_code=status,
                        headers=headers, media_type="application/problem+json")
