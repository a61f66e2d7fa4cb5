"""Log lines: one JSON object each, with the request that they belong to, and without anything secret."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from raycascade.serving.logs import (
    FACTS,
    MOST_CHARACTERS,
    JsonLines,
    log_json,
    request_id,
    request_in,
    request_metadata,
    within,
)

logger = logging.getLogger("raycascade.serving.gateway")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger("raycascade")
    before = (root.level, root.propagate)
    stream = io.StringIO()
    handler = log_json(stream=stream)
    yield stream
    root.removeHandler(handler)
    root.setLevel(before[0])
    root.propagate = before[1]


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_line_with_the_moment_and_where_it_comes_from(stream: io.StringIO):
    logger.info("answered in %d ms", 12)
    (line,) = lines(stream)
    assert list(line) == ["time", "level", "logger", "message", "request_id", "stage"]
    assert (line["level"], line["logger"]) == ("INFO", "raycascade.serving.gateway")
    assert line["message"] == "answered in 12 ms"
    assert len(line["time"]) == len("2026-01-02T03:04:05.678Z")
    assert line["time"].endswith("Z")


def test_line_breaks_and_other_characters_stay_inside_the_line():
    message = "one\ntwo\u2028three \ud800 \"four\" \x00"  # not logged: pytest could not pass it on
    line = JsonLines().format(logging.LogRecord("raycascade", logging.INFO, "here.py", 1, message, None, None))
    assert "\n" not in line
    assert line.isascii()
    assert json.loads(line)["message"] == message


def test_everything_inside_a_request_has_its_id_in_threads_too(stream: io.StringIO):
    async def one(name: str) -> None:
        with within(name):
            logger.info("begins")
            await asyncio.sleep(0)
            with within(name, stage="ranker"):
                await asyncio.to_thread(logger.info, "ranks")
            logger.info("ends")

    async def both() -> None:
        await asyncio.gather(one("a"), one("b"))

    asyncio.run(both())
    logger.info("later")
    seen = [(line["request_id"], line["stage"], line["message"]) for line in lines(stream)]
    for name in ("a", "b"):
        assert [one for one in seen if one[0] == name] == [
            (name, "", "begins"), (name, "ranker", "ranks"), (name, "", "ends")]
    assert seen[-1] == ("", "", "later")
    assert request_id() == ""


def test_the_id_travels_in_the_metadata_of_what_is_packed(stream: io.StringIO):
    table = pa.table({"user": [1, 2]}).replace_schema_metadata({b"bundle": b"v"} | request_metadata("a", "b"))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    arrived = pa.ipc.open_stream(sink.getvalue()).read_all()
    with within(request_in(arrived.schema.metadata), stage="ranker"):
        logger.warning("slow")
    assert [(line["request_id"], line["stage"]) for line in lines(stream)] == [("a,b", "ranker")]
    assert request_in(None) == request_in({}) == ""


def test_only_known_facts_come_from_extra(stream: io.StringIO):
    logger.info("answered", extra={"outcome": "ok", "ms": 1.5, "body": {"user_id": 7}, "headers": "x", "status": 200})
    (line,) = lines(stream)
    assert (line["outcome"], line["ms"], line["status"]) == ("ok", 1.5, 200)
    assert not {"body", "headers"} & set(line)
    assert not {"body", "headers", "query", "key", "history"} & set(FACTS)


def test_a_fact_that_is_no_number_of_json_is_text(stream: io.StringIO):
    logger.info("x", extra={"ms": float("nan"), "items": float("inf"), "reason": None})
    (line,) = lines(stream)
    assert (line["ms"], line["items"], line["reason"]) == ("nan", "inf", None)


@pytest.mark.parametrize("text", [
    "Authorization: Bearer s3cr3t-value", "authorization=s3cr3t-value", "{'authorization': 'Basic s3cr3t-value'}",
    "x-api-key: s3cr3t-value", "[(b'x-api-key', b's3cr3t-value')]", '{"api_key": "s3cr3t-value", "user": 1}',
    "redis://admin:s3cr3t-value@host:6379/0 refused", "got bearer s3cr3t-value", "password=s3cr3t-value&x=1",
])
def test_what_looks_like_a_secret_is_taken_out_of_messages_facts_and_tracebacks(stream: io.StringIO, text: str):
    logger.info("%s", text, extra={"reason": text})
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("failed")
    assert "s3cr3t" not in stream.getvalue()
    assert stream.getvalue().count("[removed]") >= 3


def test_ordinary_words_stay(stream: io.StringIO):
    text = "stage ranker: 12 tokens of http://host:8000/v1/recommend?k=3, key analytics, keys reloaded, mail a@b.c"
    logger.info(text)
    assert lines(stream)[0]["message"] == text


def test_an_error_brings_its_type_and_the_end_of_a_long_traceback(stream: io.StringIO):
    try:
        raise RuntimeError("x" * 10_000 + " the end")
    except RuntimeError:
        logger.exception("failed")
    (line,) = lines(stream)
    assert line["error"] == "RuntimeError"
    assert line["traceback"].endswith("the end")
    assert len(line["traceback"]) <= MOST_CHARACTERS + 3


def test_other_loggers_are_left_alone_and_calling_it_twice_writes_once(stream: io.StringIO):
    again = io.StringIO()
    handler = log_json(logging.WARNING, stream=again)
    logging.getLogger("somebody").warning("else")
    logger.info("too low")
    logger.warning("once")
    assert [line["message"] for line in lines(again)] == ["once"]
    assert stream.getvalue() == ""
    logging.getLogger("raycascade").removeHandler(handler)
