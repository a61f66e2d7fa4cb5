"""Who gets in: keys, rates, and this machine alone where there are no keys. And no key in any log."""

import logging
from pathlib import Path
from typing import Any

import pytest

from raycascade.errors import ConfigError, DataError
from raycascade.serving.keys import add_key, remove_key
from raycascade.serving.options import ServeOptions
from tests.api_client import ToldGateway, api_over, ask, ask_all, detail_of, in_pieces

QUERY: dict[str, Any] = {"json": {"user_id": 1}}
GUARDED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/recommend", QUERY), ("POST", "/v1/recommend:batch", {"json": {"queries": [{"user_id": 1}]}}),
    ("POST", "/v1/events", {"json": {"events": [{"event_id": "e", "user_id": 1, "item_id": 2}]}}),
    ("POST", "/v1/explain", {"json": {"user_id": 1, "item_id": 2}}), ("GET", "/v1/items/7", {}),
    ("GET", "/v1/model", {})]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def keyed(path: str, **limits: Any) -> ServeOptions:
    return ServeOptions.model_validate({"keys": {"file": path}, "limits": limits})


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}"}}


# ---------------------------------------------------------------- keys
@pytest.mark.parametrize(("method", "place", "options"), GUARDED, ids=[place for _, place, _ in GUARDED])
def test_every_endpoint_asks_for_a_key_and_takes_it_in_either_header(
    path: str, method: str, place: str, options: dict[str, Any]
):
    key = add_key(path, "shop")
    api = api_over(ToldGateway(), keyed(path))
    for headers in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"x-api-key": key}):
        assert ask(api, method, place, **options, headers=headers).status_code == 200, headers
    for headers in ({}, {"authorization": key}, {"authorization": f"Basic {key}"}, {"authorization": "Bearer "},
                    {"x-api-key": key[:-1]}, {"x-api-key": "shop"}):
        reply = ask(api, method, place, **options, headers=headers)
        assert "`Authorization: Bearer KEY`" in detail_of(reply, 401)
        assert reply.headers["www-authenticate"] == "Bearer"


def test_the_gateway_is_told_whose_key_it_was_and_nobody_else_is(path: str):
    key = add_key(path, "shop")
    gateway = ToldGateway()
    assert ask(api_over(gateway, keyed(path)), "POST", "/v1/recommend", **QUERY, **bearer(key)).status_code == 200
    ((_, _, context),) = gateway.asked
    assert context.key_name == "shop"


def test_a_refused_request_reaches_neither_the_gateway_nor_its_own_body(path: str):
    add_key(path, "shop")
    gateway, read = ToldGateway(), []

    async def body() -> Any:
        read.append(1)
        yield b"{}"

    reply = ask(api_over(gateway, keyed(path)), "POST", "/v1/recommend", content=body(), **bearer("wrong"))
    detail_of(reply, 401)
    assert (gateway.asked, read) == ([], [])


def test_health_and_what_shows_how_to_ask_need_no_key(path: str):
    add_key(path, "shop")
    api = api_over(ToldGateway(), keyed(path))
    for place in ("/healthz", "/readyz", "/openapi.json", "/", "/page/page.js"):
        assert ask(api, "GET", place).status_code == 200, place
    for place in ("/healthz/", "/readyz/x", "/healthz/../v1/model", "/page", "/docs", "/metrics"):
        detail_of(ask(api, "GET", place), 401)


def test_behind_a_prefix_the_same_places_are_open(path: str):
    key = add_key(path, "shop")
    api = api_over(ToldGateway(), keyed(path))
    for place, status in (("/app/healthz", 200), ("/app/v1/model", 401), ("/app/", 200), ("/healthz", 200)):
        assert ask(api, "GET", place, root_path="/app").status_code == status, place
    assert ask(api, "GET", "/app/v1/model", root_path="/app", **bearer(key)).status_code == 200


def test_keys_change_without_a_restart(path: str, monkeypatch: pytest.MonkeyPatch):
    from raycascade.serving import keys

    moments = iter(range(0, 10_000, 10))
    monkeypatch.setattr(keys.KeyRing.__init__, "__kwdefaults__", {"check_s": 1.0, "clock_s": lambda: next(moments)})
    first = add_key(path, "first")
    api = api_over(ToldGateway(), keyed(path))
    second = add_key(path, "second")
    assert ask(api, "GET", "/v1/model", **bearer(second)).status_code == 200
    remove_key(path, "first")
    detail_of(ask(api, "GET", "/v1/model", **bearer(first)), 401)


def test_a_server_does_not_start_with_a_file_of_keys_that_is_broken(path: str):
    with pytest.raises(ConfigError, match="no such file of keys"):
        api_over(ToldGateway(), keyed(path))


# ---------------------------------------------------------------- without keys
@pytest.mark.parametrize(("client", "host", "status"), [
    ("127.0.0.1", "127.0.0.1:8000", 200), ("127.0.0.1", "localhost:8000", 200), ("::1", "[::1]:8000", 200),
    ("127.0.0.1", "gateway", 200), ("", "localhost", 200), ("testclient", "testserver", 200),
    ("10.0.0.9", "localhost", 401), ("2001:db8::1", "localhost", 401), ("127.0.0.1", "10.0.0.5:8000", 401),
    ("127.0.0.1", "evil.example:8000", 401), ("127.0.0.1", "[2001:db8::1]:8000", 401),
    ("127.0.0.1", "127.0.0.1.evil.example", 401),
])
def test_without_keys_only_this_machine_is_answered(client: str, host: str, status: int):
    api = api_over(ToldGateway())
    for method, place, options in GUARDED:
        reply = ask(api, method, place, client=client, headers={"host": host}, **options)
        assert reply.status_code == status, (place, reply.text)
    assert ask(api, "GET", "/healthz", client=client, headers={"host": host}).status_code == 200


# ---------------------------------------------------------------- rates
def test_who_asks_too_often_is_told_when_to_come_again_and_the_others_are_not(path: str):
    slow, fast = add_key(path, "slow", per_second=0.25, burst=2), add_key(path, "fast")
    api = api_over(ToldGateway(), keyed(path))
    replies = ask_all(api, [("GET", "/v1/model", bearer(slow))] * 3 + [("GET", "/v1/model", bearer(fast))] * 9)
    assert [reply.status_code for reply in replies] == [200, 200, 429] + [200] * 9
    assert "more than 0.25 requests per second" in detail_of(replies[2], 429)
    assert replies[2].headers["retry-after"] == "4"


def test_a_key_without_a_rate_of_its_own_has_that_of_the_options(path: str):
    key = add_key(path, "shop")
    api = api_over(ToldGateway(), keyed(path, per_second=2))
    replies = ask_all(api, [("GET", "/v1/model", bearer(key))] * 3)
    assert [reply.status_code for reply in replies] == [200, 200, 429]


def test_without_keys_the_rate_of_the_options_holds_for_everybody_together():
    api = api_over(ToldGateway(), ServeOptions.model_validate({"limits": {"per_second": 2}}))
    others = ("/healthz", "/readyz", "/", "/page/page.js", "/page/page.css", "/openapi.json")
    replies = ask_all(api, [("POST", "/v1/recommend", QUERY)] * 3 + [("GET", place, {}) for place in others])
    assert [reply.status_code for reply in replies] == [200, 200, 429] + [200] * len(others)


def test_every_query_of_a_batch_counts(path: str):
    key = add_key(path, "shop", per_second=1, burst=10)
    batch = ("POST", "/v1/recommend:batch", {"json": {"queries": [{"user_id": 1}] * 20}, **bearer(key)})
    replies = ask_all(api_over(ToldGateway(), keyed(path)), [batch, batch])
    assert [reply.status_code for reply in replies] == [200, 429]
    assert 10 <= int(replies[1].headers["retry-after"]) <= 11  # 20 were asked for, 10 were there, one more is needed


# ---------------------------------------------------------------- logs
def test_no_key_appears_in_any_log_record(path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    from raycascade.serving import keys

    moments = iter(range(0, 10_000, 10))
    monkeypatch.setattr(keys.KeyRing.__init__, "__kwdefaults__", {"check_s": 1.0, "clock_s": lambda: next(moments)})
    caplog.set_level(logging.DEBUG)
    valid, wrong = add_key(path, "shop", per_second=1000, burst=9), "rck_wrong-but-somebody-may-use-it-elsewhere"
    options = keyed(path, body_bytes=100)
    for error in (None, DataError("k: too much"), RuntimeError("a bug"), ConfigError("broken")):
        api = api_over(ToldGateway(error), options)
        for key in (valid, wrong):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"authorization": f"Basic {key}"}):
                bodies: list[dict[str, Any]] = [
                    QUERY, {"json": {"user": 1}}, {"content": in_pieces(b"x" * 200)}]
                for body in bodies:
                    ask(api, "POST", "/v1/recommend", headers={"content-type": "application/json", **headers}, **body)
        Path(path).write_text(f'{{"{valid}": ')  # broken in a way that shows the key
        ask(api, "GET", "/v1/model", **bearer(valid))
        Path(path).unlink()
        valid = add_key(path, "shop", per_second=1000, burst=9)
    said = {record.getMessage() for record in caplog.records}
    assert "refused" in said
    assert any("stay valid" in message for message in said)
    for record in caplog.records:
        everything = logging.Formatter().format(record) + repr(record.__dict__)
        assert "rck_" not in everything, everything
