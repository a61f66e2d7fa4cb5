"""Asking the HTTP interface in this process, and a gateway that answers whatever it was told to."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, cast

import httpx

from raycascade.bundle import Bundle
from raycascade.errors import DataError
from raycascade.serving.answers import Answer, Explanation, ItemView, Scored, StageFate
from raycascade.serving.api import build_api
from raycascade.serving.context import RequestContext
from raycascade.serving.gateway import Gateway
from raycascade.serving.options import ServeOptions
from raycascade.serving.requests import Query
from raycascade.serving.stages import LocalStage, StageServer
from raycascade.serving.telemetry import Telemetry
from raycascade.serving.users import NewEvent, Recorded

HERE = "http://localhost"


class ToldGateway:
    """Answers at once, or raises `error`; keeps what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[tuple[str, Any, RequestContext]] = []
        self.ready_stages = {"retriever": True, "ranker": True}
        self.telemetry = Telemetry()

    def _heard(self, verb: str, what: Any, context: RequestContext) -> None:
        self.asked.append((verb, what, context))
        if self.error is not None:
            raise self.error

    def _answer(self, query: Query, context: RequestContext) -> Answer:
        return Answer(request_id=context.request_id, user_id=query.user_id, items=[Scored(item_id=7, score=0.5)],
                      model="told", version="0" * 16, known_user=True, user_source="store")

    async def recommend(self, query: Query, context: RequestContext) -> Answer:
        self._heard("recommend", query, context)
        return self._answer(query, context)

    async def recommend_many(self, queries: Sequence[Query], context: RequestContext) -> list[Answer]:
        self._heard("recommend_many", queries, context)
        return [self._answer(query, context) for query in queries]

    async def record(self, events: Sequence[NewEvent], context: RequestContext) -> Recorded:
        self._heard("record", events, context)
        return Recorded(accepted=len(events), duplicates=0)

    async def explain(self, query: Query, item_id: int | str, context: RequestContext) -> Explanation:
        self._heard("explain", (query, item_id), context)
        fate = StageFate(stage="ranker", rank=3, score=0.1, keep=2, cut=0.4, survives=False)
        return Explanation(request_id=context.request_id, user_id=query.user_id, item_id=item_id, model="told",
                           version="0" * 16, known_user=True, user_source="store", lost_at="ranker", stages=[fate])

    def item(self, item_id: int | str) -> ItemView:
        if item_id != "7":
            raise DataError(f"item_id: {item_id!r} is not in the catalogue")
        return ItemView(item_id=7, model="told", version="0" * 16, features={"author": "ann"}, counts={"click": 2.0})

    def about(self) -> dict[str, Any]:
        return {"model": "told", "version": "0" * 16, "stages": [{"name": "ranker", "model": "din", "keep": 2}],
                "items": 9, "users": 3, "index": "exact", "fingerprint": "f", "versions": {"torch": "2"},
                "self_check": True}

    async def ready(self) -> dict[str, bool]:
        return self.ready_stages


def gateway_over(bundle: Bundle, options: ServeOptions | None = None) -> Gateway:
    """A gateway of a bundle with all stages in this process."""
    return Gateway(bundle, {name: LocalStage(StageServer(bundle, name)) for name in bundle.cascade.names}, options)


def api_over(gateway: ToldGateway | Gateway, options: ServeOptions | None = None) -> Any:
    """The application over a gateway."""
    return build_api(cast(Gateway, gateway), options)


class Caller:
    """Asks one application, request by request, in one event loop, as a gateway wants it."""

    def __init__(self, api: Any, *, client: str = "127.0.0.1", base_url: str = HERE, root_path: str = "") -> None:
        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(app=api, client=(client, 50_000), root_path=root_path)
        self._client = httpx.AsyncClient(transport=transport, base_url=base_url)

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request. `options` are those of httpx."""
        return self._runner.run(self._client.request(method, path, **options))

    def post(self, path: str, body: Any) -> httpx.Response:
        """One request with a JSON body."""
        return self.ask("POST", path, json=body)


def ask(
    api: Any, method: str, path: str, *, client: str = "127.0.0.1", base_url: str = HERE, root_path: str = "",
    **options: Any,
) -> httpx.Response:
    """One request to an application that nobody else asks."""
    with Caller(api, client=client, base_url=base_url, root_path=root_path) as caller:
        return caller.ask(method, path, **options)


def ask_all(api: Any, requests: Iterable[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
    """One request after the other."""
    with Caller(api) as caller:
        return [caller.ask(method, path, **options) for method, path, options in requests]


async def in_pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    """A body that comes bit by bit, without saying how long it will be."""
    for piece in pieces:
        yield piece


def detail_of(reply: httpx.Response, status: int) -> str:
    """The detail of a problem document that is as it should be."""
    assert reply.status_code == status, (reply.status_code, reply.text)
    assert reply.headers["content-type"] == "application/problem+json"
    body = reply.json()
    assert set(body) == {"type", "title", "status", "detail", "request_id"}
    assert body["type"].startswith("urn:raycascade:problem:")
    assert body["status"] == status
    assert body["request_id"] == reply.headers["x-request-id"]
    assert "Traceback" not in reply.text
    assert "\n" not in body["detail"]
    return body["detail"]
