"""Errors as problem documents (RFC 9457): what was wrong, where, what to do, and the id of the request."""

import json
import logging
import reprlib
import types
from collections.abc import Mapping
from typing import Any, get_args

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Scope

from raycascade.errors import DataError, DeadlineExceeded, NotReady, Overloaded, RaycascadeError
from raycascade.serving.arrival import arrival_of

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
MOST_SHOWN = 80  # characters of a text that was refused; of a list, or a place in the body, twice as many
KINDS: Mapping[int, tuple[str, str]] = types.MappingProxyType({
    400: ("bad-request", "The request cannot be read"),
    401: ("unauthorized", "A valid API key is needed"),
    404: ("not-found", "There is no such thing"),
    405: ("method-not-allowed", "The method is not allowed here"),
    413: ("too-large", "The body is too large"),
    415: ("unsupported-media-type", "The body is not JSON"),
    422: ("invalid-request", "The request is not valid"),
    429: ("too-many-requests", "Too many requests"),
    500: ("internal", "Internal error"),
    503: ("unavailable", "Not available now"),
    504: ("deadline-exceeded", "The deadline has passed"),
})
INTERFACE = "the interface is described at /openapi.json"
SHOW = reprlib.Repr()
SHOW.maxstring = SHOW.maxother = SHOW.maxlong = MOST_SHOWN
SHOW.maxlevel = 3


class Problem(BaseModel):
    """An error. `type` is a name to compare with, `detail` says what was wrong, where, and what to do."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class BeyondLimit(DataError):
    """A request that brings or asks for more than the server's options allow."""


def problem(scope: Scope, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """A problem document for the request of a scope."""
    kind, title = KINDS.get(status, ("http", "The request failed"))
    body = Problem(type=f"urn:raycascade:problem:{kind}", title=title, status=status, detail=detail,
                   request_id=arrival_of(scope).request_id)
    # In ASCII, because a text that the caller sent may hold characters that UTF-8 cannot.
    content = json.dumps(body.model_dump(), ensure_ascii=True).encode()
    return Response(content, status_code=status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def invalid_body(scope: Scope, status: int, detail: str) -> Response:
    """A problem of a body that the gateway never sees."""
    arrival_of(scope).refused = "invalid"
    return problem(scope, status, detail)


def try_later(scope: Scope, status: int, detail: str, *, retry_after_s: float) -> Response:
    """A problem that time solves, with Retry-After in whole seconds, at least one."""
    return problem(scope, status, detail, headers={"retry-after": str(max(1, -int(-retry_after_s // 1)))})


def failed(scope: Scope, error: Exception) -> Response:
    """A mistake of ours: the log has all of it, under the id of the request, and the answer nothing."""
    logger.error("%s %r failed", scope["method"], scope["path"], exc_info=error)
    return problem(scope, 500, "the request could not be answered; the server's log says why, under the request id")


def explain_errors(api: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Makes the application answer with problems. `bodies`: the models of the bodies, by the path of the endpoint."""

    @api.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> Response:
        route = request.scope.get("route")
        return invalid_body(request.scope, 422, describe(error, bodies.get(getattr(route, "path", ""))))

    @api.exception_handler(RaycascadeError)
    async def refused(request: Request, error: RaycascadeError) -> Response:
        return refusal(request.scope, error)

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        more = f"; {INTERFACE}" if error.status_code in (404, 405) else ""
        detail = f"{request.method} {request.url.path}: {error.detail}{more}"
        return problem(request.scope, error.status_code, detail, headers=error.headers)


def refusal(scope: Scope, error: RaycascadeError) -> Response:
    """What an error of the gateway is to the caller."""
    if isinstance(error, BeyondLimit):
        return invalid_body(scope, 422, str(error))
    if isinstance(error, DataError):
        return problem(scope, 422, str(error))
    if isinstance(error, Overloaded):
        return try_later(scope, 429, str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, DeadlineExceeded):
        return problem(scope, 504, str(error))
    if isinstance(error, NotReady):
        return try_later(scope, 503, str(error), retry_after_s=1)
    # A bundle or a config that is broken while it serves is not the caller's to mend, nor to read about.
    logger.error("%s", error)
    return try_later(scope, 503, "the model cannot be used now; the server's log says why, under the request id",
                     retry_after_s=5)


# ---------------------------------------------------------------- bodies that do not fit
def describe(error: RequestValidationError, body: type[BaseModel] | None = None) -> str:
    """The first problem of a body: where, what, what was seen. `body`: the model that it should have fitted."""
    problems = [(*_place(error.body, problem), problem) for problem in error.errors()]
    where, seen, first = problems[0]
    others = len({tuple(place) for place, _, _ in problems} - {tuple(where)})
    shown = _cut(".".join(where) or "body")
    if first["type"] == "json_invalid":
        text = f"body: not valid JSON ({first['ctx']['error']}); send a JSON object"
    elif first["type"] == "missing":
        name = first["loc"][-1:] if len(first["loc"]) > 1 else ()
        text = f"{_cut('.'.join([*where, *map(str, name)]) or 'body')}: missing; add it"
    elif first["type"] == "extra_forbidden":
        known = _model_at(body, where[:-1]) if body else None
        text = f"{shown}: unknown field" + (f"; known: {', '.join(known.model_fields)}" if known else "; leave it out")
    elif first["loc"][-1] == "[key]":
        text = f"{_cut('.'.join(where[:-1]))}: the name {SHOW.repr(where[-1])} cannot be ({first['msg']})"
    else:
        # A value that may be of several types has one problem for each of them.
        wanted = dict.fromkeys(problem["msg"].removeprefix("Input should be ") for place, _, problem in problems
                               if place == where)
        text = f"{shown}: expected {' or '.join(wanted)}, got {_cut(SHOW.repr(seen))}"
    return text + (f" (and {others} more)" if others else "")


def _place(body: Any, problem: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Where in the body a problem lies, and the value there; names of types are left out. A part of the URL is its own
    place."""
    inside_of, *path = problem["loc"]
    if inside_of != "body":
        return list(map(str, path)), problem["input"]
    kept: list[str] = []
    for part in path:
        inside = (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body))
        if inside:
            kept.append(str(part))
            body = body[part]
    return kept, body


def _cut(text: str) -> str:
    return text if len(text) <= 2 * MOST_SHOWN else text[:2 * MOST_SHOWN] + "..."


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The model of what lies at a path, numbers of a list left out; None where that is none of ours."""
    for part in path:
        if part.isdecimal():
            continue
        inner = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
        if inner is None:
            return None
        model = inner
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as list[Query] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
