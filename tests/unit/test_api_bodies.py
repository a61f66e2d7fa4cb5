"""What may be sent: bytes, JSON, lists and values, each refused with a problem that says where and what to do."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from raycascade.serving.bodies import strict_json
from raycascade.serving.options import ServeOptions
from tests.api_client import ToldGateway, api_over, ask, detail_of, in_pieces

JSON: dict[str, Any] = {"headers": {"content-type": "application/json"}}


def post(body: Any, *, place: str = "/v1/recommend", gateway: ToldGateway | None = None, **limits: Any) -> Any:
    options = ServeOptions.model_validate({"limits": limits})
    content = body if not isinstance(body, dict | list) else json.dumps(body).encode()
    return ask(api_over(gateway or ToldGateway(), options), "POST", place, content=content, **JSON)


# ---------------------------------------------------------------- size
def test_a_body_that_says_it_is_too_large_is_refused_unread():
    read = []

    async def body() -> Any:
        read.append(1)
        yield b"{}"

    gateway = ToldGateway()
    headers = {**JSON["headers"], "content-length": "1001"}
    api = api_over(gateway, ServeOptions.model_validate({"limits": {"body_bytes": 1000}}))
    reply = ask(api, "POST", "/v1/recommend", content=body(), headers=headers)
    assert "more than 1000 bytes" in detail_of(reply, 413)
    assert (read, gateway.asked) == ([], [])


def test_a_body_that_says_nothing_is_counted_as_it_comes_and_the_rest_is_left():
    sent = []

    async def endless() -> Any:
        while True:
            sent.append(1)
            yield b" " * 100

    assert "limits.body_bytes" in detail_of(post(endless(), body_bytes=1000), 413)
    assert len(sent) <= 12


def test_a_body_of_exactly_the_limit_passes_in_one_piece_or_many():
    body = json.dumps({"user_id": 1}).encode().ljust(100)
    for content in (body, in_pieces(*(bytes([byte]) for byte in body)), in_pieces(b"", body[:7], b"", body[7:], b"")):
        assert post(content, body_bytes=100).status_code == 200
    for content in (body + b" ", in_pieces(body, b" ")):
        detail_of(post(content, body_bytes=100), 413)


# ---------------------------------------------------------------- type
@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/ld+json"])
def test_json_by_any_of_its_names_is_read(kind: str):
    reply = ask(api_over(ToldGateway()), "POST", "/v1/recommend", content=b'{"user_id": 1}',
                headers={"content-type": kind})
    assert reply.status_code == 200


@pytest.mark.parametrize("headers", [
    {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "json"},
    {"content-type": "multipart/form-data; boundary=x"}, {"content-type": "application/jsonx"}, {"content-type": ""},
    {"content-type": "application/json", "content-encoding": "gzip"}, {},
])
@pytest.mark.parametrize("place", ["/v1/recommend", "/v1/recommend:batch", "/v1/events", "/v1/explain"])
def test_what_says_it_is_something_else_is_not_read(place: str, headers: dict[str, str]):
    reply = ask(api_over(ToldGateway()), "POST", place, content=b'{"user_id": 1}', headers=headers)
    assert detail_of(reply, 415).startswith("content-encoding" if "content-encoding" in headers else "content-type")


# ---------------------------------------------------------------- JSON
DEEP = 100_000
NOT_JSON = {
    "nothing": (b"", "body: missing"), "a brace": (b"{", "not valid JSON"), "text behind it": (b"{} x", "not valid"),
    "NaN": (b'{"user_id": NaN}', "NaN is no number"), "infinity": (b'{"user_id": -Infinity}', "-Infinity is no number"),
    "invalid UTF-8": (b'{"user_id": "\xff"}', "not UTF-8 at byte 13"),
    "a surrogate in UTF-8": (b'{"user_id": "\xed\xa0\x80"}', "not UTF-8"),
    "UTF-16": ('{"user_id": 1}'.encode("utf-16"), "not UTF-8"), "a byte order mark": (b"\xef\xbb\xbf{}", "not valid"),
    "half a pair": (b'{"user_id": "\\ud800"}', "half of a surrogate pair"),
    "half a pair as a name": (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
    "deep lists": (b"[" * DEEP + b"]" * DEEP, "nested too deeply"),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested too deeply"),
    "deep and cut off": (b"[" * DEEP, "nested too deeply"),
    "a number of 5,000 digits": (b'{"user_id": ' + b"9" * 5000 + b"}", "thousands of digits"),
    "a control character": (b'{"user_id": "a\x00"}', "not valid JSON"),
}


@pytest.mark.parametrize(("body", "message"), NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("place", ["/v1/recommend", "/v1/events"])
def test_what_is_no_json_is_a_problem(place: str, body: bytes, message: str):
    gateway = ToldGateway()
    assert message in detail_of(post(body, place=place, gateway=gateway), 422)
    assert gateway.asked == []


def test_every_character_that_is_one_arrives_as_it_was_sent():
    text = "\u00e9\u4e2d\U0001f600\u0000\n\"\\\ufffd"
    for ascii_only in (True, False):
        gateway = ToldGateway()
        body = json.dumps({"user_id": text}, ensure_ascii=ascii_only).encode()
        assert post(body, gateway=gateway).json()["user_id"] == text
        ((_, query, _),) = gateway.asked
        assert query.user_id == text


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
        st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=4), inner, max_size=4), max_leaves=12))
def test_strict_json_reads_what_json_writes(value: Any):
    for ascii_only in (True, False):
        assert strict_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0123456789eE+-.\\ud8NaInfity \n\u00e9', max_size=40).map(
    lambda text: text.encode()))
def test_strict_json_gives_a_value_that_can_be_written_again_or_says_why_not(body: bytes):
    try:
        value = strict_json(body)
    except json.JSONDecodeError:
        return
    assert strict_json(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value


# ---------------------------------------------------------------- values
@pytest.mark.parametrize(("place", "body", "detail"), [
    ("/v1/recommend", [], "^body: expected a valid dictionary"),
    ("/v1/recommend", {}, "^user_id: missing; add it$"),
    ("/v1/recommend", {"user_id": 1, "deadline_ms": 0}, "^deadline_ms: .*, got 0$"),
    ("/v1/recommend", {"user_id": 1, "deadline_ms": 60_001}, "^deadline_ms: .*, got 60001$"),
    ("/v1/recommend", {"user_id": 1 << 63}, "^user_id: .*, got 9223372036854775808$"),
    ("/v1/recommend", {"user_id": 1, "features": {"a": 10**400}}, r"^features\.a: .*, got 1000.*000$"),
    ("/v1/recommend", {"user_id": 1, "features": {"": 1}}, "^features: the name '' cannot be .*at least 1 character"),
    ("/v1/recommend", {"user_id": 1, "features": {"a": [1, [2]]}}, r"^features\.a"),
    ("/v1/recommend", {"user_id": 1, "exclude": [1] * 10_001}, "^exclude: "),
    ("/v1/recommend", {"user_id": "x" * 513}, "^user_id: .*512 characters.*"),
    ("/v1/recommend:batch", {"queries": []}, "^queries: "),
    ("/v1/recommend:batch", {"queries": [{"user_id": 1}, {"user_id": 2, "kk": 3}]},
     r"^queries\.1\.kk: unknown field; known: user_id, k, "),
    ("/v1/recommend:batch", {"queries": [{"user_id": 1}, {"user_id": 2, "history": [7, {"item_id": 3, "x": 1}]}]},
     r"^queries\.1\.history\.1\.x: unknown field; known: item_id, time_ms, features$"),
    ("/v1/recommend:batch", [{"user_id": 1}], "^body: "),
    ("/v1/explain", {"user_id": 1}, "^item_id: missing; add it$"),
    ("/v1/explain", {"user_id": 1, "item_id": 2, "x": 1}, "^x: unknown field; known: user_id, .*, item_id$"),
    ("/v1/events", {"events": [{"user_id": 1, "item_id": 2}]}, r"^events\.0\.event_id: missing; add it$"),
    ("/v1/events", {"events": [{"event_id": "e", "user_id": 1, "item_id": 2, "x": 1}]},
     r"^events\.0\.x: unknown field; known: event_id, "),
    ("/v1/events", {"events": []}, "^events: "),
])
def test_a_value_that_does_not_fit_is_named_with_its_place(place: str, body: Any, detail: str):
    seen = detail_of(post(body, place=place), 422)
    assert re.search(detail, seen), seen


def test_numbers_too_large_for_a_float_are_refused():
    detail = detail_of(post(b'{"user_id": 1, "features": {"income": 1e400}}'), 422)
    assert detail.startswith("features.income: "), detail


@pytest.mark.parametrize("body", [
    {"user_id": "x" * 200_000}, {"user_id": [["x" * 1000] * 100] * 10}, {"x" * 200_000: 1, "user_id": 1},
    {"user_id": 1, "history": [{"nothing": "x" * 50}] * 5000}, {"user_id": 1, "features": {"y" * 100_000: 1}},
])
def test_a_problem_is_short_however_much_was_wrong(body: Any):
    assert len(detail_of(post(body), 422)) < 1000


@pytest.mark.parametrize("depth", [50, 300, 900])
def test_deep_values_that_python_can_read_are_a_problem_too(depth: int):
    for value in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
        detail_of(post(b'{"user_id": ' + value + b"}"), 422)
        detail_of(post(b'{"user_id": 1, "features": {"a": ' + value + b"}}"), 422)


# ---------------------------------------------------------------- what the options limit
@pytest.mark.parametrize(("limits", "body", "detail"), [
    ({"k": 5}, {"k": 6}, "k: 6 is more than the server's limit of 5 (limits.k)"),
    ({"history": 2}, {"history": [1, 2, 3]}, "history: 3 is more than the server's limit of 2 (limits.history)"),
    ({"exclude": 2}, {"exclude": [1, 2, 3]}, "exclude: 3 is more than the server's limit of 2 (limits.exclude)"),
])
def test_lists_are_as_long_as_the_options_say_and_no_longer(limits: dict, body: dict, detail: str):
    short = {name: value[:-1] if isinstance(value, list) else value - 1 for name, value in body.items()}
    assert post({"user_id": 1, **short}, **limits).status_code == 200
    assert detail in detail_of(post({"user_id": 1, **body}, **limits), 422)
    assert detail in detail_of(post({"user_id": 1, "item_id": 1, **body}, place="/v1/explain", **limits), 422)
    batch = {"queries": [{"user_id": 1}, {"user_id": 1, **body}]}
    assert f"queries.1.{detail}" in detail_of(post(batch, place="/v1/recommend:batch", **limits), 422)


def test_a_batch_is_as_long_as_the_options_say_and_no_longer():
    gateway = ToldGateway()
    three = {"queries": [{"user_id": i} for i in range(3)]}
    assert post(three, place="/v1/recommend:batch", batch=3).status_code == 200
    assert "queries: 3 are more" in detail_of(post(three, place="/v1/recommend:batch", gateway=gateway, batch=2), 422)
    assert gateway.asked == []
