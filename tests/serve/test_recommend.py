"""One real deployment per mode, asked over HTTP: the same answers as in process and in batch."""

import re
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow as pa
import pytest

from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import BundleError, ConfigError
from raycascade.flows import score, serving
from raycascade.serving.keys import add_key
from tests.served import checked_bundle, patient
from tests.tiny_world import KEEPS, item_id

pytestmark = pytest.mark.ray
Post = Callable[..., httpx.Response]
USERS = [100, 103, 110, 124, 31]  # the last one is not in the log


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checked_bundle(str(tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture(scope="module")
def bundle(uri: str) -> Bundle:
    return load_bundle(uri)


class Keys(NamedTuple):
    """A file of keys: one that may ask as often as it likes, and one that may ask twice and then once in 1,000 s."""

    file: str
    free: str
    slow: str


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    file = str(tmp_path_factory.mktemp("keys") / "keys.json")
    return Keys(file, add_key(file, "shop"), add_key(file, "slow", per_second=0.001, burst=2))


@pytest.fixture(scope="module")
def urls(ray_cluster: None, uri: str, keys: Keys) -> Iterator[dict[str, str]]:
    """Both modes side by side in one Serve; fused asks for keys."""
    started: dict[str, str] = {}
    port = 0
    for mode in ("composed", "fused"):
        options = patient(mode=mode, port=port, keys={"file": keys.file} if mode == "fused" else {})
        started[mode] = serving.start(uri, options, name=mode, route_prefix=f"/{mode}")
        port = urllib.parse.urlsplit(started[mode]).port or 0
    yield started
    for mode in started:
        serving.stop(mode)


@pytest.fixture
def post(keys: Keys) -> Post:
    """Asks with a key, which composed does not need."""
    def ask(url: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{url}/v1/recommend", json={"user_id": 100, **body}, timeout=30.0,
                          headers={"x-api-key": keys.free})

    return ask


@pytest.fixture(params=["composed", "fused"])
def url(request: pytest.FixtureRequest, urls: dict[str, str]) -> str:
    return urls[request.param]


def assert_same(reply: httpx.Response, items: list[Any], scores: list[float]) -> None:
    assert reply.status_code == 200, reply.text
    assert [item["item_id"] for item in reply.json()["items"]] == items
    np.testing.assert_allclose([item["score"] for item in reply.json()["items"]], scores, rtol=1e-5, atol=1e-5)


def test_http_gives_the_answer_of_the_batch_and_of_the_process(post: Post, url: str, bundle: Bundle):
    batch = score.results(bundle, pa.table({"request_id": [str(user) for user in USERS], "user_id": USERS})).to_pylist()
    for row in batch:
        assert_same(post(url, user_id=row["user_id"]), row["items"], row["scores"])


def test_both_modes_give_the_same_trace(post: Post, urls: dict[str, str]):
    for user in USERS:
        near, far = (post(urls[mode], user_id=user, trace=True).json() for mode in ("fused", "composed"))
        assert near["trace"] == far["trace"]


def test_what_a_query_brings_counts_as_in_process(post: Post, url: str, bundle: Bundle):
    past = [item_id(4), item_id(50), item_id(9)]
    row = pa.table({"request_id": ["r"], "user_id": [100], "device": ["desk"], "city": ["city 1"],
                    "history": pa.array([past], pa.list_(pa.int64()))})
    (wanted,) = score.results(bundle, row).to_pylist()
    reply = post(url, context={"device": "desk"}, features={"city": "city 1"}, history=past)
    assert_same(reply, wanted["items"], wanted["scores"])
    assert reply.json()["items"] != post(url).json()["items"]


def test_unknown_users_and_items_are_served(post: Post, url: str):
    reply = post(url, user_id="nobody", history=["gone", 1])
    assert (reply.status_code, reply.json()["known_user"], len(reply.json()["items"])) == (200, False, KEEPS["ranker"])


def test_k_and_exclude_are_respected(post: Post, url: str):
    everything = [item["item_id"] for item in post(url).json()["items"]]
    rest = [item["item_id"] for item in post(url, k=3, exclude=everything[:2]).json()["items"]]
    assert len(rest) == 3
    assert not set(rest) & set(everything[:2])


def test_bad_input_is_a_problem_document(post: Post, url: str):
    for body in ({"k": KEEPS["ranker"] + 1}, {"history": "5000"}, {"features": {"citty": "x"}}):
        reply = post(url, **body)
        assert (reply.status_code, reply.headers["content-type"]) == (422, "application/problem+json"), reply.text


def test_the_model_and_the_probes_answer(url: str, keys: Keys):
    about = httpx.get(f"{url}/v1/model", timeout=30.0, headers={"authorization": f"Bearer {keys.free}"}).json()
    assert about["self_check"]
    assert [stage["name"] for stage in about["stages"]] == list(KEEPS)
    assert httpx.get(f"{url}/healthz", timeout=30.0).status_code == 200
    assert httpx.get(f"{url}/readyz", timeout=30.0).json()["stages"] == dict.fromkeys(KEEPS, True)


def test_without_a_valid_key_only_probes_and_the_page_are_answered(urls: dict[str, str], keys: Keys):
    url = urls["fused"]
    for headers in ({}, {"x-api-key": keys.free[:-1]}, {"authorization": "Bearer"}):
        reply = httpx.post(f"{url}/v1/recommend", json={"user_id": 100}, timeout=30.0, headers=headers)
        assert (reply.status_code, reply.headers["content-type"]) == (401, "application/problem+json"), reply.text
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert httpx.get(f"{url}{path}", timeout=30.0).status_code == 200


def test_a_key_that_asks_more_than_it_may_is_told_to_wait(urls: dict[str, str], keys: Keys):
    replies = [httpx.post(f"{urls['fused']}/v1/recommend", json={"user_id": 100}, timeout=30.0,
                          headers={"x-api-key": keys.slow}) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[-1].json()["type"].endswith("too-many-requests")
    assert 900 <= int(replies[-1].headers["retry-after"]) <= 1_000


def test_the_page_and_its_files_are_there_below_the_prefix(urls: dict[str, str]):
    for url in urls.values():
        page = httpx.get(f"{url}/", timeout=30.0)
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        (script,) = set(re.findall(r'src="([^"]+page\.js)"', page.text))
        assert httpx.get(f"{url}/{script.removeprefix('/')}", timeout=30.0).status_code == 200


def test_a_gateway_that_stops_answers_what_it_has_taken(urls: dict[str, str], uri: str):
    """Every step waits a second for company, so that requests are inside when the end comes."""
    inside = 3
    options = patient(mode="fused", port=urllib.parse.urlsplit(urls["fused"]).port,
                      gateway={"max_ongoing": inside, "max_queued": 0},
                      stages={"default": {"batch": {"wait_ms": 1_000}}})
    url = serving.start(uri, options, name="stops", route_prefix="/stops")
    with ThreadPoolExecutor(inside) as pool:
        calls = [pool.submit(taken, url) for _ in range(inside)]
        while httpx.post(f"{url}/v1/recommend", json={"user_id": 100, "deadline_ms": 50}, timeout=30.0
                         ).status_code != 429:
            assert not all(call.done() for call in calls)
        serving.stop("stops")
        replies = [call.result() for call in calls]
    assert [(reply.status_code, reply.json()["degraded"]) for reply in replies] == [(200, False)] * inside
    assert httpx.get(f"{url}/readyz", timeout=30.0).status_code == 404


def taken(url: str) -> httpx.Response:
    """The answer to a request that is made again until the gateway has room for it."""
    while True:
        reply = httpx.post(f"{url}/v1/recommend", json={"user_id": 100}, timeout=60.0)
        if reply.status_code != 429:
            return reply


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"host": "0.0.0.0"}, ConfigError, "--host 0.0.0.0: without API keys only loopback"),
    ({"stages": {"rankr": {"replicas": 2}}}, ConfigError, "stages.rankr: .*did you mean 'ranker'"),
    ({"uri": "/nowhere/bundle"}, BundleError, "no finished bundle"),
])
def test_what_cannot_be_served_is_refused_before_anything_starts(
    ray_cluster: None, uri: str, options: dict[str, Any], error: type[Exception], message: str
):
    given = {"uri": uri, **options}
    with pytest.raises(error, match=message):
        serving.start(given.pop("uri"), patient(**given), name="refused", route_prefix="/refused")


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen"):
            serving.free_port("127.0.0.1", port)
