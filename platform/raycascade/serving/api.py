"""The HTTP interface of a gateway. Errors are problem documents (RFC 9457) that say what was wrong and where."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from raycascade import __version__
from raycascade.errors import RaycascadeError
from raycascade.serving.gateway import Answer, Gateway
from raycascade.serving.requests import Event, Query

logger = logging.getLogger(__name__)
MORE = {404: "the interface is described at /openapi.json", 405: "the interface is described at /openapi.json"}


def build_api(gateway: Gateway) -> FastAPI:
    """The application: POST /v1/recommend, GET /v1/model, /healthz and /readyz."""
    api = FastAPI(title="raycascade", version=__version__)

    @api.post("/v1/recommend", response_model_exclude_none=True)
    async def recommend(query: Query) -> Answer:
        """The best items of the catalogue for a user."""
        return await gateway.recommend(query)

    @api.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What is served."""
        return gateway.about()

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> JSONResponse:
        """Every stage answers; 503 with the stages that do not."""
        stages = await gateway.ready()
        if all(stages.values()):
            return JSONResponse({"status": "ready", "stages": stages})
        missing = ", ".join(name for name, ready in stages.items() if not ready)
        return problem(503, "not-ready", "Not ready", f"no answer from: {missing}; try again in a few seconds")

    _explain_errors(api)
    return api


def problem(status: int, kind: str, title: str, detail: str) -> JSONResponse:
    """A problem document."""
    body = {"type": f"urn:raycascade:problem:{kind}", "title": title, "status": status, "detail": detail}
    return JSONResponse(body, status_code=status, media_type="application/problem+json")


def _explain_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        del request
        return problem(422, "invalid-request", "The request is not valid", describe(error))

    @api.exception_handler(RaycascadeError)
    async def refused(request: Request, error: RaycascadeError) -> JSONResponse:
        del request
        return problem(422, "invalid-request", "The request is not valid", str(error))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        more = MORE.get(error.status_code)
        detail = f"{request.method} {request.url.path}: {error.detail}" + (f"; {more}" if more else "")
        return problem(error.status_code, "http", str(error.detail), detail)

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(500, "internal", "Internal error", "the request could not be answered; the server log says why")


def describe(error: RequestValidationError) -> str:
    """The first problem of a body: where, what, what was seen."""
    problems = [(*_place(error.body, problem["loc"][1:]), problem) for problem in error.errors()]
    where, seen, first = problems[0]
    others = len({place for place, _, _ in problems} - {where})
    if first["type"] == "json_invalid":
        text = f"body: not valid JSON ({first['ctx']['error']}); send a JSON object"
    elif first["type"] == "missing":
        text = f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: missing; add it"
    elif first["type"] == "extra_forbidden":
        known = Event.model_fields if where.startswith("history.") else Query.model_fields
        text = f"{where}: unknown field; known: {', '.join(known)}"
    else:
        # A value that may be of several types has one problem for each of them.
        wanted = dict.fromkeys(problem["msg"].removeprefix("Input should be ") for place, _, problem in problems
                               if place == where)
        shown = repr(seen)
        text = f"{where}: expected {' or '.join(wanted)}, got {shown if len(shown) <= 80 else shown[:80] + '...'}"
    return text + (f" (and {others} more)" if others else "")


def _place(body: Any, path: tuple[Any, ...]) -> tuple[str, Any]:
    """Where in the body a problem lies, and the value there; names of types in the path are left out."""
    kept: list[str] = []
    for part in path:
        inside = (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body))
        if inside:
            kept.append(str(part))
            body = body[part]
    return ".".join(kept) or "body", body
