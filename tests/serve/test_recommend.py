"""One real deployment per mode, asked over HTTP: the same answers as in process and in batch."""

import socket
import urllib.parse
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import BundleError, ConfigError
from raycascade.flows import score, serving
from tests.served import checked_bundle, patient
from tests.tiny_world import KEEPS, item_id

pytestmark = pytest.mark.ray
USERS = [100, 103, 110, 124, 31]  # the last one is not in the log


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checked_bundle(str(tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture(scope="module")
def bundle(uri: str) -> Bundle:
    return load_bundle(uri)


@pytest.fixture(scope="module")
def urls(ray_cluster: None, uri: str) -> Iterator[dict[str, str]]:
    """Both modes side by side in one Serve."""
    started: dict[str, str] = {}
    port = 0
    for mode in ("composed", "fused"):
        options = patient(mode=mode, port=port)
        started[mode] = serving.start(uri, options, name=mode, route_prefix=f"/{mode}")
        port = urllib.parse.urlsplit(started[mode]).port or 0
    yield started
    for mode in started:
        serving.stop(mode)


@pytest.fixture(params=["composed", "fused"])
def url(request: pytest.FixtureRequest, urls: dict[str, str]) -> str:
    return urls[request.param]


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/recommend", json={"user_id": 100, **body}, timeout=30.0)


def assert_same(reply: httpx.Response, items: list[Any], scores: list[float]) -> None:
    assert reply.status_code == 200, reply.text
    assert [item["item_id"] for item in reply.json()["items"]] == items
    np.testing.assert_allclose([item["score"] for item in reply.json()["items"]], scores, rtol=1e-5, atol=1e-5)


def test_http_gives_the_answer_of_the_batch_and_of_the_process(url: str, bundle: Bundle):
    batch = score.results(bundle, pa.table({"request_id": [str(user) for user in USERS], "user_id": USERS})).to_pylist()
    for row in batch:
        assert_same(post(url, user_id=row["user_id"]), row["items"], row["scores"])


def test_both_modes_give_the_same_trace(urls: dict[str, str]):
    for user in USERS:
        near, far = (post(urls[mode], user_id=user, trace=True).json() for mode in ("fused", "composed"))
        assert near["trace"] == far["trace"]


def test_what_a_query_brings_counts_as_in_process(url: str, bundle: Bundle):
    past = [item_id(4), item_id(50), item_id(9)]
    row = pa.table({"request_id": ["r"], "user_id": [100], "device": ["desk"], "city": ["city 1"],
                    "history": pa.array([past], pa.list_(pa.int64()))})
    (wanted,) = score.results(bundle, row).to_pylist()
    reply = post(url, context={"device": "desk"}, features={"city": "city 1"}, history=past)
    assert_same(reply, wanted["items"], wanted["scores"])
    assert reply.json()["items"] != post(url).json()["items"]


def test_unknown_users_and_items_are_served(url: str):
    reply = post(url, user_id="nobody", history=["gone", 1])
    assert (reply.status_code, reply.json()["known_user"], len(reply.json()["items"])) == (200, False, KEEPS["ranker"])


def test_k_and_exclude_are_respected(url: str):
    everything = [item["item_id"] for item in post(url).json()["items"]]
    rest = [item["item_id"] for item in post(url, k=3, exclude=everything[:2]).json()["items"]]
    assert len(rest) == 3
    assert not set(rest) & set(everything[:2])


def test_bad_input_is_a_problem_document(url: str):
    for body in ({"k": KEEPS["ranker"] + 1}, {"history": "5000"}, {"features": {"citty": "x"}}):
        reply = post(url, **body)
        assert (reply.status_code, reply.headers["content-type"]) == (422, "application/problem+json"), reply.text


def test_the_model_and_the_probes_answer(url: str):
    about = httpx.get(f"{url}/v1/model", timeout=30.0).json()
    assert [stage["name"] for stage in about["stages"]] == list(KEEPS)
    assert httpx.get(f"{url}/healthz", timeout=30.0).status_code == 200
    assert httpx.get(f"{url}/readyz", timeout=30.0).json()["stages"] == dict.fromkeys(KEEPS, True)


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
