"""The page as files: what may be in them, and how they are served."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI

from raycascade.errors import ConfigError
from raycascade.serving.options import ServeOptions, parse_options
from raycascade.serving.origins import origin_of
from raycascade.serving.page import content_security_policy, mount_page, page_files
from tests.api_client import HERE, ToldGateway, api_over, ask, ask_all

PAGE = Path(__file__).resolve().parents[2] / "platform" / "raycascade" / "serving" / "page"
PEER = "https://candidate.example:8000"
NAMES = sorted(path.name for path in PAGE.iterdir())
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def api() -> FastAPI:
    return api_over(ToldGateway())


# ---------------------------------------------------------------- what is in the files
def test_the_whole_page_is_smaller_than_sixty_kilobytes():
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_host(name: str):
    named = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", (PAGE / name).read_text())
    assert set(named) <= {"http://www.w3.org/2000/svg"}  # the name of a vocabulary, which nobody asks for


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_no_script_makes_markup_or_code_from_text(name: str):
    found = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser",
                       (PAGE / name).read_text())
    assert found == []


def test_the_index_has_no_inline_script_and_no_inline_style():
    text = (PAGE / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", text) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", text) == []


def test_every_file_that_is_named_is_there_and_every_script_is_fetched_with_the_page():
    text = (PAGE / "index.html").read_text()
    named = set(re.findall(r'(?:href|src)="page/([^"]+)"', text))
    assert named == set(NAMES) - {"index.html"}
    for path in PAGE.glob("*.js"):
        assert {part.removeprefix("./") for part in re.findall(r'from "([^"]+)"', path.read_text())} <= named, path


def test_every_element_that_the_scripts_look_for_is_in_the_index():
    ids = re.findall(r'\bid="([^"]+)"', (PAGE / "index.html").read_text())
    assert len(ids) == len(set(ids))
    for path in PAGE.glob("*.js"):
        assert set(re.findall(r'byId\("([^"]+)"\)', path.read_text())) <= set(ids), path


def test_files_of_the_page_fit_the_limits_of_the_house():
    for path in PAGE.iterdir():
        lines = path.read_text().splitlines()
        assert len(lines) <= 250, path
        assert max(map(len, lines)) <= (140 if path.suffix == ".svg" else 120), path


# ---------------------------------------------------------------- how they are served
def test_the_index_and_every_part_of_it_are_served_with_their_types(api: FastAPI):
    index = ask(api, "GET", "/")
    assert (index.status_code, index.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert index.content == (PAGE / "index.html").read_bytes()
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    for name in NAMES:
        reply = ask(api, "GET", f"/page/{name}")
        assert (reply.status_code, reply.content) == (200, (PAGE / name).read_bytes())
        assert reply.headers["content-type"].startswith(kinds[Path(name).suffix])
        assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/page/none.js", "/page/../api.py", "/page/%2e%2e/api.py", "/page/..%2fapi.py",
                                  "/page/"])
def test_nothing_else_is_served(api: FastAPI, path: str):
    assert ask(api, "GET", path).status_code == 404


def test_a_part_that_the_browser_has_is_not_sent_again(api: FastAPI):
    first = ask(api, "GET", "/page/page.js")
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for held in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = ask(api, "GET", "/page/page.js", headers={"if-none-match": held})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    other = ask(api, "GET", "/page/page.css", headers={"if-none-match": tag})
    assert (other.status_code, len(other.content)) == (200, (PAGE / "page.css").stat().st_size)


def test_the_tag_follows_the_content():
    tags = [file.etag for file in page_files().values()]
    assert len(set(tags)) == len(NAMES)
    assert tags == [file.etag for file in page_files().values()]


def test_head_says_what_get_says(api: FastAPI):
    got, head = ask(api, "GET", "/"), ask(api, "HEAD", "/")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "content-security-policy"):
        assert head.headers[name] == got.headers[name]


def test_the_policy_allows_the_own_scripts_and_nothing_inline(api: FastAPI):
    policy = ask(api, "GET", "/").headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert {rules[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert {rules[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy


def test_behind_a_prefix_the_page_leads_to_the_address_its_parts_are_relative_to():
    reply = ask(api_over(ToldGateway()), "GET", "/candidate", root_path="/candidate")
    assert (reply.status_code, reply.headers["location"]) == (307, "candidate/")
    assert reply.url.join(reply.headers["location"]).path == "/candidate/"


def test_the_page_is_no_part_of_the_described_interface(api: FastAPI):
    described = set(ask(api, "GET", "/openapi.json").json()["paths"])
    assert not described & {"/", "/page/{name}"}
    assert "/v1/recommend" in described


def test_only_get_and_head_are_answered(api: FastAPI):
    assert ask(api, "POST", "/", content=b"{}", headers=JSON).status_code == 405


# ---------------------------------------------------------------- pages of other endpoints
def test_without_peers_no_other_page_may_ask(api: FastAPI):
    reply = ask(api, "POST", "/v1/recommend", json={"user_id": 1}, headers={"origin": PEER})
    assert "access-control-allow-origin" not in reply.headers
    preflight = ask(api, "OPTIONS", "/v1/recommend", headers={"origin": PEER, "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers


def test_a_peer_may_ask_with_a_key_and_a_stranger_may_not(tmp_path: Path):
    from raycascade.serving.keys import add_key

    path = str(tmp_path / "keys.json")
    shown = {"authorization": f"Bearer {add_key(path, 'oncall')}"}
    options = ServeOptions.model_validate({"keys": {"file": path}, "page": {"peers": [PEER]}})
    api = api_over(ToldGateway(), options)
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    allowed, refused, answer, stranger, nobody = ask_all(api, [
        ("OPTIONS", "/v1/recommend", {"headers": {"origin": PEER, **asked}}),
        ("OPTIONS", "/v1/recommend", {"headers": {"origin": "https://evil.example", **asked}}),
        ("POST", "/v1/recommend", {"json": {"user_id": 1}, "headers": {"origin": PEER, **shown}}),
        ("POST", "/v1/recommend", {"json": {"user_id": 1}, "headers": {"origin": "https://evil.example", **shown}}),
        ("POST", "/v1/recommend", {"json": {"user_id": 1}, "headers": {"origin": PEER}}),
    ])
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PEER)
    assert refused.status_code == 400
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PEER)
    assert "access-control-allow-origin" not in stranger.headers
    # The page there can read why it was refused.
    assert (nobody.status_code, nobody.headers["access-control-allow-origin"]) == (401, PEER)
    assert PEER in ask(api, "GET", "/").headers["content-security-policy"]


def test_the_page_itself_needs_no_key(tmp_path: Path):
    from raycascade.serving.keys import add_key

    path = str(tmp_path / "keys.json")
    add_key(path, "oncall")
    api = api_over(ToldGateway(), ServeOptions.model_validate({"keys": {"file": path}}))
    assert [ask(api, "GET", one).status_code for one in ("/", "/page/page.js", "/v1/model")] == [200, 200, 401]


@pytest.mark.parametrize(("given", "origin"), [
    ("http://127.0.0.1:8001", "http://127.0.0.1:8001"), ("HTTPS://Ranker.Example:443/", "https://ranker.example"),
    ("http://ranker:80", "http://ranker"), ("http://[::1]:8000", "http://[::1]:8000"),
])
def test_an_origin_is_written_as_browsers_send_it(given: str, origin: str):
    assert origin_of(given) == origin


@pytest.mark.parametrize("given", ["", "*", "ranker:8000", "http://", "http://a/b", "http://a?b", "http://u@a", "ftp://a",
                                   "http://a; script-src *", "http://a:x", "'self'", "http://*.example"])
def test_what_is_no_origin_is_refused(given: str):
    with pytest.raises(ConfigError, match=r"page\.peers: .* is no origin; give scheme, host and port"):
        parse_options({"page": {"peers": [given]}}, where="serve.yaml")


def test_peers_stand_in_the_policy_beside_the_own_server():
    assert f"connect-src 'self' {PEER};" in content_security_policy([PEER])


def test_an_application_of_its_own_can_have_the_page():
    api = FastAPI()
    mount_page(api)
    assert ask(api, "GET", "/", base_url=HERE).status_code == 200
