"""The OpenAPI document of the interface: the problems that each endpoint may answer with, headers, and keys."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from raycascade.serving.problems import KINDS, MEDIA_TYPE, Problem

SUMMARY = "Recommendations from a cascade of stages, and where in it an item was lost."
OPEN = "x-open"  # marks an operation that needs no key, until the document is made
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
REQUEST_ID = {"x-request-id": {
    "description": "The id of the request: the caller's own where it sent one, else a new one.", "required": True,
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"}}}
RETRY_AFTER = {"retry-after": {
    "description": "Seconds to wait before the next try.", "required": True,
    "schema": {"type": "integer", "minimum": 1}}}
CHALLENGE = {"www-authenticate": {"description": "How to show a key.", "required": True, "schema": {"type": "string"}}}
MORE_HEADERS = {401: CHALLENGE, 429: RETRY_AFTER, 503: RETRY_AFTER}


def documented(name: str, *statuses: int, open_to_all: bool = False) -> dict[str, Any]:
    """What a route says of itself: its name for generated clients, the problems it answers with, whether it is open."""
    responses: dict[int, dict[str, Any]] = {200: {"headers": REQUEST_ID}}
    for status in statuses:
        schema = {"$ref": "#/components/schemas/Problem"}
        responses[status] = {"description": KINDS[status][1], "headers": REQUEST_ID | MORE_HEADERS.get(status, {}),
                             "content": {MEDIA_TYPE: {"schema": schema}}}
    return {"operation_id": name, "responses": responses, "openapi_extra": {OPEN: True} if open_to_all else None}


def describe(api: FastAPI, *, keyed: bool) -> None:
    """Completes the document that FastAPI makes of the routes. `keyed`: whether the server asks for keys."""

    def document() -> dict[str, Any]:
        if api.openapi_schema is None:
            made = get_openapi(title=api.title, version=api.version, summary=api.summary, routes=api.routes)
            api.openapi_schema = _completed(made, keyed=keyed)
        return api.openapi_schema

    api.openapi = document


def _completed(made: dict[str, Any], *, keyed: bool) -> dict[str, Any]:
    components = made["components"]
    for unused in ("HTTPValidationError", "ValidationError"):  # of the errors that FastAPI would answer with
        components["schemas"].pop(unused, None)
    components["schemas"]["Problem"] = Problem.model_json_schema()
    if keyed:
        components["securitySchemes"] = SCHEMES
    for operations in made["paths"].values():
        for operation in operations.values():
            if not operation.pop(OPEN, False) and keyed:
                operation["security"] = [{name: []} for name in SCHEMES]
    return made
