"""Every endpoint over a gateway that answers what it was told to: what goes in, what comes out, and every error."""

import json
import logging
import time
import uuid
from typing import Any

import pytest

from raycascade.errors import BundleError, DataError, DeadlineExceeded, NotReady, Overloaded
from raycascade.serving.api import build_api
from raycascade.serving.logs import JsonLines
from raycascade.serving.options import ServeOptions
from raycascade.serving.requests import Query
from raycascade.serving.users import StoreUnavailable
from tests.api_client import ToldGateway, api_over, ask, ask_all, detail_of, in_pieces

EVENT = {"event_id": "e-1", "user_id": "u", "item_id": 7, "time_ms": 5, "features": {"action": "click"}}
POSTS: dict[str, dict[str, Any]] = {
    "/v1/recommend": {"user_id": 1}, "/v1/recommend:batch": {"queries": [{"user_id": 1}, {"user_id": "b", "k": 2}]},
    "/v1/events": {"events": [EVENT]}, "/v1/explain": {"user_id": 1, "item_id": "x", "history": [3]},
}
GETS = ("/v1/items/7", "/v1/model", "/healthz", "/readyz", "/openapi.json")


def post(gateway: ToldGateway, place: str, *, request_id: str = "r") -> Any:
    return ask(api_over(gateway), "POST", place, json=POSTS[place], headers={"x-request-id": request_id})


# ---------------------------------------------------------------- what goes in and out
def test_what_was_sent_reaches_the_gateway_and_its_answer_the_caller():
    gateway = ToldGateway()
    api = api_over(gateway)
    replies = {place: ask(api, "POST", place, json=body).json() for place, body in POSTS.items()}
    (_, query, _), (_, queries, _), (_, events, _), (_, (explained, item_id), _) = gateway.asked
    assert query == Query(user_id=1)
    assert queries == [Query(user_id=1), Query(user_id="b", k=2)]
    assert [event.model_dump(exclude_unset=True) for event in events] == [EVENT]
    assert (explained, item_id) == (Query.model_validate({"user_id": 1, "history": [3]}), "x")
    assert replies["/v1/recommend"]["items"] == [{"item_id": 7, "score": 0.5}]
    assert [answer["user_id"] for answer in replies["/v1/recommend:batch"]["answers"]] == [1, "b"]
    assert replies["/v1/events"] == {"accepted": 1, "duplicates": 0}
    assert replies["/v1/explain"]["lost_at"] == "ranker"
    assert replies["/v1/explain"]["stages"][0]["cut"] == 0.4


def test_items_and_the_model_are_described():
    api = api_over(ToldGateway())
    assert ask(api, "GET", "/v1/items/7").json()["features"] == {"author": "ann"}
    about = ask(api, "GET", "/v1/model").json()
    assert (about["model"], about["stages"][0]["keep"], about["self_check"]) == ("told", 2, True)


@pytest.mark.parametrize("item_id", ["8", "7/", "a/b", "%2F", "..", "\u00e9\u4e2d", "a b", "%FF%00", "x" * 512])
def test_an_item_that_is_not_there_is_a_404_whatever_its_name(item_id: str):
    assert detail_of(ask(api_over(ToldGateway()), "GET", f"/v1/items/{item_id}"), 404)


@pytest.mark.parametrize("item_id", ["", "x" * 513])
def test_what_can_be_no_item_id_is_refused(item_id: str):
    assert "item_id: expected String" in detail_of(ask(api_over(ToldGateway()), "GET", f"/v1/items/{item_id}"), 422)


# ---------------------------------------------------------------- request ids and deadlines
@pytest.mark.parametrize("place", [*POSTS, *GETS, "/nowhere"])
@pytest.mark.parametrize(("given", "kept"), [
    ("trace-1.2:3_4", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("a\tb", False), ("", False)])
def test_every_answer_names_its_request(place: str, given: str, kept: bool):
    method = "POST" if place in POSTS else "GET"
    reply = ask(api_over(ToldGateway()), method, place, json=POSTS.get(place), headers={"x-request-id": given})
    (name,) = reply.headers.get_list("x-request-id")
    assert (name == given) == kept
    assert kept or uuid.UUID(hex=name).version == 4
    if "request_id" in reply.json():
        assert reply.json()["request_id"] == name


def test_behind_a_server_that_names_requests_the_header_is_left_to_it():
    gateway: Any = ToldGateway()
    reply = ask(build_api(gateway, names_answers=False), "POST", "/v1/recommend", json={"user_id": 1},
                headers={"x-request-id": "r-1"})
    assert "x-request-id" not in reply.headers
    assert reply.json()["request_id"] == "r-1"


def test_the_deadline_counts_from_the_arrival_of_the_request():
    gateway = ToldGateway()

    async def slow() -> Any:
        yield b'{"user_id": 1, '
        started = time.monotonic()
        while time.monotonic() < started + 0.05:
            pass
        yield b'"deadline_ms": 60000}'

    before = time.monotonic()
    ask(api_over(gateway), "POST", "/v1/recommend", content=slow(), headers={"content-type": "application/json"})
    ((_, _, context),) = gateway.asked
    assert before + 60 <= context.deadline <= time.monotonic() + 60 - 0.05


def test_without_a_deadline_that_of_the_options_holds_and_a_batch_has_its_shortest():
    gateway, options = ToldGateway(), ServeOptions(deadline_ms=7_000)
    api = api_over(gateway, options)
    bodies = [("/v1/recommend", {"user_id": 1}), ("/v1/explain", {"user_id": 1, "item_id": 2, "deadline_ms": 9_000}),
              ("/v1/recommend:batch", {"queries": [{"user_id": 1}, *(
                  {"user_id": 2, "deadline_ms": ms} for ms in (5_000, 3_000, 8_000))]})]
    started = time.monotonic()
    ask_all(api, [("POST", place, {"json": body}) for place, body in bodies])
    given_s = [round(context.deadline - started) for _, _, context in gateway.asked]
    assert given_s == [7, 9, 3]


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize("place", POSTS)
@pytest.mark.parametrize(("error", "status", "detail", "retry"), [
    (DataError("features.x: no such user feature"), 422, "features.x: no such user feature", None),
    (Overloaded("the queue is full", retry_after_s=3), 429, "the queue is full", "3"),
    (NotReady("ranker: no answer"), 503, "ranker: no answer", "1"),
    (StoreUnavailable("redis: no answer"), 503, "redis: no answer", "1"),
    (DeadlineExceeded("nothing in time"), 504, "nothing in time", None),
    (BundleError("/secret/place: damaged"), 503, "the model cannot be used now", "5"),
    (RuntimeError("secret"), 500, "the request could not be answered", None),
    (TimeoutError("secret"), 500, "the request could not be answered", None),
    (RecursionError("secret"), 500, "the request could not be answered", None),
])
def test_an_error_of_the_gateway_is_a_problem(
    place: str, error: Exception, status: int, detail: str, retry: str | None
):
    reply = post(ToldGateway(error), place)
    assert detail_of(reply, status).startswith(detail)
    assert reply.headers.get("retry-after") == retry
    assert "secret" not in reply.text


def test_a_mistake_of_ours_is_logged_under_the_id_of_its_request(caplog: pytest.LogCaptureFixture):
    lines: list[dict[str, Any]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(self.format(record)))

    handler = Kept()
    handler.setFormatter(JsonLines())
    caplog.set_level(logging.INFO, "raycascade")
    logging.getLogger("raycascade").addHandler(handler)
    try:
        post(ToldGateway(ValueError("a bug")), "/v1/recommend", request_id="r-7")
    finally:
        logging.getLogger("raycascade").removeHandler(handler)
    failed, refused = lines
    assert {line["request_id"] for line in lines} == {"r-7"}
    assert (failed["level"], failed["error"]) == ("ERROR", "ValueError")
    assert "a bug" in failed["traceback"]
    assert (refused["status"], refused["path"], refused["method"]) == (500, "/v1/recommend", "POST")


@pytest.mark.parametrize(("method", "place", "status"), [
    ("GET", "/v1/recommend", 405), ("DELETE", "/v1/model", 405), ("PUT", "/v1/events", 405), ("HEAD", "/healthz", 405),
    ("GET", "/v2", 404), ("GET", "/v1/recommend/", 404), ("GET", "/docs", 404), ("GET", "/metrics", 404)])
def test_a_wrong_path_or_method_is_a_problem(method: str, place: str, status: int):
    reply = ask(api_over(ToldGateway()), method, place)
    assert reply.status_code == status
    assert ("allow" in reply.headers) == (status == 405)
    if method != "HEAD":
        assert "/openapi.json" in detail_of(reply, status)


def test_readiness_names_the_stages_that_do_not_answer():
    gateway = ToldGateway()
    assert ask(api_over(gateway), "GET", "/readyz").json() == {"status": "ready", "stages": gateway.ready_stages}
    gateway.ready_stages["ranker"] = False
    reply = ask(api_over(gateway), "GET", "/readyz")
    assert "no answer from: ranker" in detail_of(reply, 503)
    assert ask(api_over(gateway), "GET", "/healthz").json() == {"status": "ok"}


def test_the_metrics_hear_of_what_the_gateway_never_does():
    gateway = ToldGateway()
    api = api_over(gateway, ServeOptions.model_validate({"limits": {"k": 3, "body_bytes": 500, "per_second": 6}}))
    kind = {"content-type": "application/json"}
    ask(api, "POST", "/v1/recommend", json={"user_id": 1}, client="10.0.0.1")
    ask_all(api, [("POST", "/v1/recommend", options) for options in (
        {"json": {"user_id": 1}}, {"json": {"user_id": 1, "k": 4}}, {"json": {}}, {"content": b"{}"},
        {"content": b" " * 501, "headers": kind}, {"content": in_pieces(b"[", b"]"), "headers": kind},
        {"json": {"user_id": 1}}, {"json": {"user_id": 1}})])
    totals = gateway.telemetry.totals()
    found = {key[1]: total for key, total in totals.items() if key[0] == "raycascade_requests_total" and total}
    assert found == {"unauthorised": 1.0, "invalid": 5.0, "limited": 2.0}
    assert len(gateway.asked) == 1


# ---------------------------------------------------------------- the document
def test_the_document_says_what_every_endpoint_may_answer():
    document = ask(api_over(ToldGateway()), "GET", "/openapi.json").json()
    found = {(method, path): set(operation["responses"]) for path, operations in document["paths"].items()
             for method, operation in operations.items()}
    asked, looked_up = {"200", "401", "413", "415", "422", "429", "503", "504"}, {"200", "401", "404", "422", "429"}
    assert found == {
        **{("post", path): asked for path in POSTS}, ("get", "/v1/items/{item_id}"): looked_up,
        ("get", "/v1/model"): {"200", "401", "429"}, ("get", "/healthz"): {"200"}, ("get", "/readyz"): {"200", "503"}}
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                kinds = ["application/json"] if status == "200" else ["application/problem+json"]
                assert list(response["content"]) == kinds
                assert "x-request-id" in response["headers"]
                assert ("retry-after" in response["headers"]) == (status in ("429", "503"))
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert set(document["components"]["schemas"]["Problem"]["required"]) == {
        "type", "title", "status", "detail", "request_id"}


def test_the_document_asks_for_a_key_where_the_server_does(tmp_path: Any):
    from raycascade.serving.keys import add_key

    path = str(tmp_path / "keys.json")
    add_key(path, "shop")
    bare = ask(api_over(ToldGateway()), "GET", "/openapi.json").json()
    keyed = ask(api_over(ToldGateway(), ServeOptions.model_validate({"keys": {"file": path}})), "GET",
                "/openapi.json").json()
    assert "securitySchemes" not in bare["components"]
    assert set(keyed["components"]["securitySchemes"]) == {"bearer", "key"}
    for document, guarded in ((bare, False), (keyed, True)):
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert ("security" in operation) == (guarded and path.startswith("/v1/")), path
                assert "x-open" not in operation
