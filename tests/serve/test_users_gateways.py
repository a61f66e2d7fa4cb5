"""Gateways that share the users of one Redis server, in this process, asked over HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("redis", reason="the package redis is not installed; install raycascade[redis]")

from raycascade.bundle import Bundle, load_bundle
from raycascade.serving.api import build_api
from raycascade.serving.gateway import Gateway
from raycascade.serving.options import ServeOptions
from raycascade.serving.stages import LocalStage, StageServer
from tests.naive_users import run
from tests.redis_process import RedisProcess, needs_redis
from tests.tiny_world import DAY_MS, START_MS, item_id, write_bundle

pytestmark = needs_redis
END_MS = START_MS + 7 * DAY_MS
SOON_S = 60.0
EVENTS = [{"event_id": f"e{n}", "user_id": user, "item_id": item_id(7 * n), "time_ms": END_MS + n,
           "features": {"action": "click"}} for user in (105, 999) for n in range(6)]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path)
    yield process
    process.kill()


@asynccontextmanager
async def gateway(bundle: Bundle, *, url: str = "") -> AsyncIterator[httpx.AsyncClient]:
    """A gateway's client; without a URL, of one that keeps users itself."""
    users = {"store": "redis", "url": url, "timeout_ms": 60_000} if url else {}
    options = ServeOptions.model_validate({"users": users, "deadline_ms": 60_000})
    stages = {name: LocalStage(StageServer(bundle, name)) for name in bundle.cascade.names}
    served = Gateway(bundle, stages, options)
    transport = httpx.ASGITransport(app=build_api(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await served.users.close()


async def recommend(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await client.post("/v1/recommend", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_what_one_gateway_records_the_others_know_whatever_bundle_they_serve(
    server: RedisProcess, bundle: Bundle, tmp_path: Path
):
    swapped = load_bundle(write_bundle(str(tmp_path / "swapped"), seed=12))

    async def ask() -> None:
        async with (gateway(bundle, url=server.url) as first, gateway(bundle, url=server.url) as second,
                    gateway(swapped, url=server.url) as third, gateway(bundle) as alone):
            await compare(first, second, third, alone)

    async def compare(
        first: httpx.AsyncClient, second: httpx.AsyncClient, third: httpx.AsyncClient, alone: httpx.AsyncClient
    ) -> None:
        twice = await asyncio.gather(*(one.post("/v1/events", json={"events": EVENTS}) for one in (first, second)))
        assert sum(reply.json()["accepted"] for reply in twice) == len(EVENTS)
        await alone.post("/v1/events", json={"events": EVENTS})
        for user in (105, 999, 110, 31):
            answers = [await recommend(client, user_id=user) for client in (first, second, alone, third)]
            assert [one["items"] for one in answers[:3]] == [answers[0]["items"]] * 3
            assert {one["user_source"] for one in answers} == {"unknown" if user == 31 else "store"}
            assert answers[3]["version"] == swapped.version
        inline = [{key: event[key] for key in ("item_id", "time_ms", "features")} for event in EVENTS[6:]]
        for client in (first, third):
            brought = await recommend(client, user_id=31, history=inline)
            assert (await recommend(client, user_id=999))["items"] == brought["items"]

    run(ask())


def test_without_redis_requests_are_answered_with_an_empty_history_and_events_are_refused(
    server: RedisProcess, bundle: Bundle
):
    async def ask() -> None:
        async with gateway(bundle, url=server.url) as client:
            await lose_and_find(client)

    async def lose_and_find(client: httpx.AsyncClient) -> None:
        await client.post("/v1/events", json={"events": EVENTS})
        before = await recommend(client, user_id=105)
        server.kill()
        for _ in range(6):
            answer = await recommend(client, user_id=105)
            assert (answer["user_source"], answer["degraded"]) == ("unavailable", False)
            assert answer["items"] == (await recommend(client, user_id=105, history=[]))["items"] != before["items"]
            refused = await client.post("/v1/events", json={"events": EVENTS})
            assert refused.status_code == 503
            assert refused.headers["content-type"] == "application/problem+json"
        server.start()
        deadline = time.monotonic() + SOON_S
        while (again := await client.post("/v1/events", json={"events": EVENTS})).status_code == 503:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert again.json() == {"accepted": len(EVENTS), "duplicates": 0}
        assert (await recommend(client, user_id=105))["items"] == before["items"]

    run(ask())
