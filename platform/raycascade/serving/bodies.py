"""Bodies: how large they may be, what JSON they may hold, and the models beside `Query` and `Answer`."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field as Option
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raycascade.serving.answers import Answer
from raycascade.serving.options import LimitsOptions
from raycascade.serving.problems import BeyondLimit, invalid_body
from raycascade.serving.requests import Id, Query
from raycascade.serving.users import NewEvent

MOST_QUERIES, MOST_EVENTS = 1_024, 1_000
JSON_TYPE = re.compile(r"application/(json|[\w.-]+\+json)\s*(;.*)?", re.IGNORECASE)
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # may be half of a surrogate pair


class Queries(BaseModel):
    """Several requests for recommendations at once."""

    model_config = ConfigDict(extra="forbid")
    queries: Annotated[list[Query], Option(min_length=1, max_length=MOST_QUERIES)]


class Answers(BaseModel):
    """The answers to several queries, in their order."""

    answers: list[Answer]


class ItemQuery(Query):
    """A query, and an item to look for in its answer."""

    item_id: Id


class NewEvents(BaseModel):
    """What users have done."""

    model_config = ConfigDict(extra="forbid")
    events: Annotated[list[NewEvent], Option(min_length=1, max_length=MOST_EVENTS)]


class StageView(BaseModel):
    """A stage that is served."""

    name: str
    model: str
    keep: int


class ModelView(BaseModel):
    """What is served. `version` changes with any byte of the bundle, `fingerprint` with its features; `self_check` says
    whether the bundle gave its recorded answers here."""

    model_config = ConfigDict(extra="allow")
    model: str
    version: str
    stages: list[StageView]
    items: int
    users: int
    index: str
    fingerprint: str
    versions: dict[str, str]
    self_check: bool


class Ready(BaseModel):
    """Which stages answer."""

    status: Literal["ready"]
    stages: dict[str, bool]


# ---------------------------------------------------------------- size and type, before anything is read
class BodyLimit:
    """Middleware that reads the body of a POST, counts it as it comes, and refuses it where it is too large (413), or
    is said to be something other than JSON (415)."""

    def __init__(self, app: ASGIApp, *, most_bytes: int) -> None:
        self.app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind, encoding = headers.get("content-type", ""), headers.get("content-encoding", "identity")
        if not JSON_TYPE.fullmatch(kind):
            got = f"got {kind[:80]!r}" if kind else "it is missing"
            await invalid_body(scope, 415, f"content-type: {got}; send application/json")(scope, receive, send)
            return
        if encoding.lower() != "identity":
            detail = f"content-encoding: got {encoding[:80]!r}; send the body as it is"
            await invalid_body(scope, 415, detail)(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared[:20]) > self._most_bytes
        last = None if too_large else await self._read(receive)
        if last is None:
            detail = f"body: more than {self._most_bytes} bytes; send less at once (the server's limits.body_bytes)"
            await invalid_body(scope, 413, detail)(scope, receive, send)
            return
        await self.app(scope, _first(last, receive), send)

    async def _read(self, receive: Receive) -> Message | None:
        """The whole body as one message, or the message that its sender is gone; None as soon as it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self._most_bytes:
                return None
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}


def _first(message: Message, receive: Receive) -> Receive:
    """Gives a message that was received already, then what comes behind it."""
    waiting = [message]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


# ---------------------------------------------------------------- JSON, strictly
class StrictRequest(Request):
    """A request whose JSON is JSON."""

    async def json(self) -> Any:
        """The body; json.JSONDecodeError for all that RFC 8259 does not allow."""
        return strict_json(await self.body())


class StrictRoute(APIRoute):
    """A route that reads its body strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, given such a request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def strict_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8. json.JSONDecodeError for NaN and infinity, numbers of thousands of digits,
    halves of surrogate pairs, and lists so deep that the parser gives up."""
    try:
        value = DECODER.decode(body.decode())
        if HALF_PAIR.search(body):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        _refuse(f"not UTF-8 at byte {error.start}")
    except UnicodeEncodeError:
        _refuse("half of a surrogate pair, which is no character")
    except RecursionError:
        _refuse("nested too deeply")
    except ValueError:
        _refuse("a number of thousands of digits")


def _refuse(reason: str) -> NoReturn:
    raise json.JSONDecodeError(reason, "", 0) from None


def _no_number(name: str) -> NoReturn:
    _refuse(f"{name} is no number in JSON")


DECODER = json.JSONDecoder(parse_constant=_no_number)


# ---------------------------------------------------------------- what the options limit
def require_within(query: Query, limits: LimitsOptions, *, where: str = "") -> None:
    """BeyondLimit where a query brings or asks for more than the server's options allow."""
    for name, found, most in (
        ("k", query.k or 0, limits.k),
        ("exclude", len(query.exclude), limits.exclude),
        ("history", len(query.history or []), limits.history),
    ):
        if found > most:
            raise BeyondLimit(f"{where}{name}: {found} is more than the server's limit of {most} (limits.{name}); "
                            "ask for less")


def require_batch_within(queries: list[Query], limits: LimitsOptions) -> None:
    """The same for every query of a batch, and for their number."""
    if len(queries) > limits.batch:
        raise BeyondLimit(f"queries: {len(queries)} are more than the server's limit of {limits.batch} (limits.batch); "
                        "send several batches")
    for position, query in enumerate(queries):
        require_within(query, limits, where=f"queries.{position}.")
