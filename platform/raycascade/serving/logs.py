"""Structured logs of a serving process: one JSON object a line, with the id of the request and the stage.

    {"time": "2026-01-02T03:04:05.678Z", "level": "INFO", "logger": "raycascade.serving.gateway", "message": "answered",
     "request_id": "34e0...", "stage": "", "outcome": "ok", "ms": 12.3}

The id is held in a context variable, so that every record of a request has it, in threads of `asyncio.to_thread` too.
Between processes it travels with the packed requests, in their metadata under REQUEST.
"""

import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

REQUEST = b"request"  # in the metadata of what travels between stages; ids of a batch are joined by commas
# What `extra` may bring: short facts. Bodies, headers and keys have no name here, so they cannot get into a line.
FACTS = ("method", "path", "status", "outcome", "ms", "items", "requests", "degraded_at", "reason", "user_source",
         "version", "bundle", "key_name", "mode")
MOST_CHARACTERS = 4_000  # of a message, and of a traceback
REMOVED = "[removed]"
_GIVES = r"[\"']?\s*[:=,]\s*(?:b?[\"'])?"  # between a name and its value, in headers, JSON and what Python prints
_VALUE = r"[^\s\"',;&}]+"
_SECRETS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (
    rf"(\b(?:proxy-)?authorization\b{_GIVES}(?:(?:bearer|basic)\s+)?){_VALUE}",
    rf"(\b(?:x-)?api[-_ ]?key\b{_GIVES}){_VALUE}",
    rf"(\b(?:password|secret|token)\b{_GIVES}){_VALUE}",
    r"(\bbearer\s+)[\w.~+/=-]{8,}",
    r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]+(?=@)",  # user and password in a URI
))

_request_id: ContextVar[str] = ContextVar("raycascade_request_id", default="")
_stage: ContextVar[str] = ContextVar("raycascade_stage", default="")


# ---------------------------------------------------------------- where a record belongs
@contextmanager
def within(request_id: str, *, stage: str = "") -> Iterator[None]:
    """Everything that is logged inside belongs to this request and stage."""
    before, stage_before = _request_id.set(request_id), _stage.set(stage)
    try:
        yield
    finally:
        _request_id.reset(before)
        _stage.reset(stage_before)


def request_id() -> str:
    """The request that is being worked on; empty outside of one."""
    return _request_id.get()


def request_metadata(*request_ids: str) -> dict[bytes, bytes]:
    """The metadata entry that takes the ids of one or several requests to another process."""
    return {REQUEST: ",".join(request_ids).encode()}


def request_in(metadata: Mapping[bytes, bytes] | None) -> str:
    """The inverse: the ids as they stand in a log line; empty where there are none."""
    return (metadata or {}).get(REQUEST, b"").decode(errors="replace")


# ---------------------------------------------------------------- how a record looks
class JsonLines(logging.Formatter):
    """A record as one JSON object without line breaks. What looks like a key or a password is taken out."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, request id and stage; then the FACTS there are, and what an error left."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": moment.replace("+00:00", "Z"), "level": record.levelname, "logger": record.name,
            "message": clean(record.getMessage()), "request_id": _request_id.get(), "stage": _stage.get(),
        }
        line |= {name: _fact(record.__dict__[name]) for name in FACTS if name in record.__dict__}
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__
            line["traceback"] = clean(self.formatException(record.exc_info))
        return json.dumps(line)


def clean(text: str) -> str:
    """The text without what looks like a secret, its end if it is long."""
    for secret in _SECRETS:
        text = secret.sub(rf"\1{REMOVED}", text)
    return text if len(text) <= MOST_CHARACTERS else "..." + text[-MOST_CHARACTERS:]


def _fact(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, int | None) else clean(str(value))


def log_json(level: int | str = logging.INFO, stream: TextIO | None = None) -> logging.Handler:
    """Sends the records of raycascade, and of nobody else, to a stream (standard error) as JSON lines. Calling it again
    replaces the handler. Returns the handler."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("raycascade")
    for old in [one for one in logger.handlers if isinstance(one.formatter, JsonLines)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return handler
