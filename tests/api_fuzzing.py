"""Requests that nobody would send, for an application over the bundle of tiny_world.py: made from the OpenAPI document
(schemathesis), from what the bundle knows (so that they get far), and from bytes."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, note, seed, settings, strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from raycascade.serving.answers import Answer
from tests.api_client import Caller, detail_of
from tests.tiny_world import KEEPS, NUM_ITEMS, START_MS, item_id

PROMISED = (status_code_conformance, content_type_conformance, response_headers_conformance,
            response_schema_conformance)
SHORT_MS = 1_000  # a deadline that may pass before anything is answered
REFUSALS = (401, 404, 405, 413, 415, 422)  # of a request that is not as it should be
EVERYTHING = st.text(st.characters(), max_size=20)  # halves of surrogate pairs too
Seen = Counter[tuple[str, int]]


def steady(examples: int, seed_: int) -> Any:
    """Hypothesis with a fixed seed, without a memory, and without shrinking by the clock."""
    def decorate(test: Any) -> Any:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        quiet = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=checks,
                         phases=(Phase.explicit, Phase.generate, Phase.shrink))
        return seed(seed_)(quiet(test))

    return decorate


# ---------------------------------------------------------------- from the document
def document_of(api: Any) -> Any:
    """The interface as an application in this process, or a URL, describes it."""
    if isinstance(api, str):
        return schemathesis.openapi.from_url(f"{api}/openapi.json")
    return schemathesis.openapi.from_asgi("/openapi.json", api)


def documented(document: Any) -> Iterator[tuple[str, GenerationMode, Any]]:
    """(operation, mode, strategy of its cases) of everything that the document describes; what takes nothing has no
    wrong cases."""
    for result in document.get_all_operations():
        operation = result.ok()
        raw = operation.definition.raw
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.POSITIVE or "requestBody" in raw or "parameters" in raw:
                yield operation.label, mode, operation.as_strategy(generation_mode=mode)


def fuzz_document(api: Any, *, examples: int, seed_: int, key: str = "") -> Seen:
    """So many cases for every operation and mode, with a key if there is one, and then without; raises where an answer
    is not what the document promises."""
    seen: Seen = Counter()
    for label, mode, strategy in documented(document_of(api)):
        steady(examples, seed_)(given(strategy)(_call(label, mode, key, seen)))()
    return seen


def _call(label: str, mode: GenerationMode, key: str, seen: Seen) -> Callable[[Any], None]:
    def one(case: Any) -> None:
        headers = {"x-api-key": key} if key else None
        reply = case.call(headers=headers)
        seen[label, reply.status_code] += 1
        assert "Traceback" not in reply.text, reply.text
        assert reply.status_code < 500 or (reply.status_code == 504 and _in_a_hurry(case.body)), reply.text
        # What is refused before it is read, or not answered in time, says nothing of the rest of it.
        judged = mode is GenerationMode.NEGATIVE and reply.status_code not in (413, 429, 504)
        checks: list[Any] = [*PROMISED, *([negative_data_rejection] if judged else [])]
        case.validate_response(reply, checks=checks, headers=headers)
        if key and "/v1/" in label:
            assert case.call(headers={"x-api-key": key[:-1]}).status_code == 401

    return one


def _in_a_hurry(body: Any) -> bool:
    """Whether a body, or a query in it, asks for an answer at once."""
    queries = [body, *body.get("queries", [])] if isinstance(body, dict) else []
    return any(query.get("deadline_ms", SHORT_MS) < SHORT_MS for query in queries)


# ---------------------------------------------------------------- from what the bundle knows
WHOLE = st.integers(-(1 << 63), (1 << 63) - 1)
KNOWN = st.integers(0, NUM_ITEMS - 1).map(item_id)
IDS = KNOWN | KNOWN.map(str) | WHOLE | st.text(max_size=8) | st.sampled_from([0, -1, 1 << 62, "", "0", "-1", "1e3"])
USERS = st.integers(95, 130) | st.integers(95, 130).map(str) | IDS
SCALARS = st.none() | st.booleans() | WHOLE | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | (
    st.text(max_size=8)) | st.sampled_from(["click", "city 1", "phone", 1e300, -1e300, 1e-320, 0.1])
VALUES = SCALARS | st.lists(SCALARS, max_size=4)
TIMES = st.integers(START_MS - 10**9, START_MS + 10**9) | st.integers(0, (1 << 53) - 1) | st.sampled_from(
    [0, 1, (1 << 53) - 1, 1 << 53, -1, None])


def features(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Values for some of these names, rarely one that nobody knows."""
    return st.dictionaries(st.sampled_from([*names] * 6 + ["unknown"]), VALUES, max_size=2)


EVENTS = IDS | st.fixed_dictionaries({"item_id": IDS}, optional={"time_ms": TIMES, "features": features("action")})
QUERIES = st.fixed_dictionaries({"user_id": USERS}, optional={
    "k": st.integers(1, KEEPS["ranker"]) | st.integers(-1, 12), "exclude": st.lists(IDS, max_size=130),
    "context": features("device"), "features": features("city", "income"), "history": st.lists(EVENTS, max_size=20),
    "time_ms": TIMES, "trace": st.booleans(), "deadline_ms": st.just(60_000)})
NEW_EVENTS = st.fixed_dictionaries({"event_id": st.text(min_size=1, max_size=3), "user_id": USERS, "item_id": IDS},
                                   optional={"time_ms": TIMES, "features": features("action")})
BODIES = st.one_of(
    st.tuples(st.just("/v1/recommend"), QUERIES),
    st.tuples(st.just("/v1/recommend:batch"), st.fixed_dictionaries({"queries": st.lists(QUERIES, max_size=5)})),
    st.tuples(st.just("/v1/events"), st.fixed_dictionaries({"events": st.lists(NEW_EVENTS, max_size=5)})),
    st.tuples(st.just("/v1/explain"), st.tuples(QUERIES, IDS).map(lambda pair: {**pair[0], "item_id": pair[1]})))


def fuzz_depth(api: Any, *, examples: int, seed_: int) -> Seen:
    """So many requests that come close to what the bundle has; raises unless each is answered as it should be, whole,
    or refused with a problem."""
    seen: Seen = Counter()
    with Caller(api) as caller:
        @steady(examples, seed_)
        @given(BODIES)
        def one(request: tuple[str, Any]) -> None:
            path, body = request
            note(f"POST {path} {json.dumps(body)}")
            reply = caller.ask("POST", path, content=json.dumps(body).encode(),
                               headers={"content-type": "application/json"})
            seen[path, reply.status_code] += 1
            if reply.status_code != 200:
                detail_of(reply, 422)
            elif path == "/v1/recommend":
                require_whole(reply.json(), body)
            elif path == "/v1/recommend:batch":
                for answer, query in zip(reply.json()["answers"], body["queries"], strict=True):
                    require_whole(answer, query)

        one()
    return seen


def require_whole(reply: dict[str, Any], query: dict[str, Any]) -> None:
    """An answer of the whole cascade: as many items as asked for, best first, none of them twice or excluded."""
    answer = Answer.model_validate(reply)
    assert not answer.degraded, reply
    items, scores = [item.item_id for item in answer.items], [item.score for item in answer.items]
    banned = {str(one) for one in query.get("exclude", [])}
    assert len(items) <= query.get("k", KEEPS["ranker"])
    assert len(set(items)) == len(items)
    assert not banned & {str(item) for item in items}
    assert scores == sorted(scores, reverse=True)
    if len(banned) <= NUM_ITEMS - KEEPS["retriever"] - 5:  # one user must not get five items
        assert len(items) == query.get("k", KEEPS["ranker"])


# ---------------------------------------------------------------- from bytes
HEADERS = st.dictionaries(
    st.sampled_from(["x-request-id", "authorization", "x-api-key", "content-encoding", "accept", "host", "x-y"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=20).map(
        lambda text: text.strip().encode("latin-1")), max_size=3)
KINDS = st.just("application/json") | st.sampled_from(["", "text/plain", "application/json; charset=\u00fc", "a/b/c"])
PLACES = st.sampled_from(["/v1/recommend", "/v1/recommend:batch", "/v1/events", "/v1/explain", "/v1/items/",
                          "/v1/model", "/healthz", "/readyz", "/", "/v1/", "/openapi.json"])
PIECES = st.lists(st.binary(max_size=30) | EVERYTHING.map(lambda text: json.dumps({"user_id": text}).encode()) | (
    st.sampled_from([b'{"user_id":', b"1", b"NaN", b"}", b"[" * 2_000, b'{"a":' * 2_000, b"9" * 5_000, b"\xff"])),
    max_size=4)


def fuzz_bytes(api: Any, *, examples: int, seed_: int) -> Seen:
    """So many requests of arbitrary paths, headers and bodies; raises for an answer that is no answer."""
    seen: Seen = Counter()
    with Caller(api) as caller:
        @steady(examples, seed_)
        @given(st.sampled_from(["POST", "POST", "GET", "PUT", "HEAD", "OPTIONS"]), PLACES, EVERYTHING, KINDS, HEADERS,
               PIECES)
        def one(method: str, place: str, more: str, kind: str, headers: dict[str, bytes], pieces: list[bytes]) -> None:
            rest = "".join(f"%{byte:02x}" for byte in more.encode("utf-8", "surrogatepass"))
            path = place + (rest if place.endswith("/") else "")
            note(f"{method} {path} {kind!r} {headers} {pieces}")
            reply = caller.ask(method, path, content=b"".join(pieces),
                               headers={**headers, "content-type": kind.encode("utf-8")})
            seen[place, reply.status_code] += 1
            require_answer(reply, method)

        one()
    return seen


def require_answer(reply: httpx.Response, method: str) -> None:
    """What the interface answers to anything: what was asked for, or a problem that is not the server's."""
    if reply.status_code == 200:
        is_page = reply.request.url.path == "/"
        assert reply.headers["content-type"] == ("text/html; charset=utf-8" if is_page else "application/json")
        assert is_page or method == "HEAD" or reply.json()
    else:
        assert reply.status_code in REFUSALS, (reply.status_code, reply.text)
        if method != "HEAD":
            detail_of(reply, reply.status_code)
