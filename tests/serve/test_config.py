"""`serve deploy serve/config.yaml`, by what it sends to Ray Serve's controller: the application of the file, and
another bundle by a change of its `user_config`."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from raycascade.bundle import Bundle, load_bundle
from raycascade.flows import serving
from raycascade.serving.options import parse_options
from raycascade.serving.versions import read_release
from tests.serve.load import Load
from tests.served import checked_bundle

pytestmark = pytest.mark.ray
FILE = Path(__file__).resolve().parents[2] / "serve" / "config.yaml"
APP = "raycascade"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("configured")
    return [load_bundle(checked_bundle(str(folder / name), seed=seed)) for name, seed in (("one", 11), ("two", 12))]


def config(first: str, asked_for: str, *, gateways: int = 1) -> dict[str, Any]:
    """The file with other bundles, on a machine of its own."""
    tree = yaml.safe_load(FILE.read_text())
    (app,) = tree["applications"]
    app["args"]["bundle"] = first
    app["args"]["options"] |= {"deadline_ms": 30_000, "poll_s": 1.0, "users": {"timeout_ms": 30_000}}
    app["args"]["options"]["stages"] |= {
        "pre_ranker": {"autoscale": {"min": 2, "max": 3}}, "ranker": {"replicas": 2, "cpus": 0.15}}
    (gateway,) = app["deployments"]
    assert gateway["name"] == serving.GATEWAY
    gateway["user_config"] = {"bundle": asked_for}
    gateway["num_replicas"] = gateways
    return tree


def apply(tree: dict[str, Any]) -> None:
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(tree))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running() -> bool:
    app = serve.status().applications.get(APP)
    return app is not None and app.status == "RUNNING"


@pytest.fixture(scope="module")
def url(ray_cluster: None, bundles: list[Bundle]) -> Iterator[str]:
    port = serving.free_port("127.0.0.1", 0)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    apply(config(bundles[0].uri, bundles[0].uri))
    until(running)
    yield f"http://127.0.0.1:{port}"
    serving.stop(APP)


def about(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/v1/model", timeout=30.0).json()


def version(url: str) -> str:
    return about(url)["version"]


def replicas() -> dict[str, dict[str, int]]:
    deployments = serve.status().applications[APP].deployments
    return {name: {str(state): n for state, n in one.replica_states.items()} for name, one in deployments.items()}


def test_every_stage_has_the_replicas_that_its_options_ask_for(url: str):
    assert replicas() == {serving.GATEWAY: {"RUNNING": 1}, "retriever": {"RUNNING": 1}, "pre_ranker": {"RUNNING": 2},
                          "ranker": {"RUNNING": 2}}


def test_the_options_of_a_stage_reach_ray_serve():
    options = parse_options({"poll_s": 3.0, "gateway": {"drain_s": 7.0}, "stages": {
        "default": {"cpus": 0.5, "max_queued": 70},
        "ranker": {"gpus": 0.25, "replicas": 3, "max_ongoing": 9},
        "pre_ranker": {"autoscale": {"min": 2, "max": 5, "target_ongoing": 2.5}}}}, where="test")
    ranker, scaled = (serving._stage_deployment(name, options) for name in ("ranker", "pre_ranker"))
    assert (ranker.num_replicas, ranker.max_ongoing_requests, ranker.max_queued_requests) == (3, 9, 70)
    assert ranker.ray_actor_options == {"num_cpus": 0.5, "num_gpus": 0.25}
    config = scaled._deployment_config
    scaling = config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 2.5)
    assert (config.health_check_period_s, config.graceful_shutdown_timeout_s) == (3.0, 7.0)


def test_the_file_serves_and_a_changed_user_config_swaps_without_a_failed_request(url: str, bundles: list[Bundle]):
    one, two = bundles
    assert version(url) == one.version
    with Load(url, bundles) as load:
        load.more(10)
        apply(config(one.uri, two.uri))
        load.until(lambda replies: replies.versions[two.version] > 10)
    assert (load.replies.failed, load.replies.wrong, dict(load.replies.degraded)) == ([], [], {})
    until(lambda: about(url)["held"] == [two.version])  # and the old one is let go of
    release = read_release(str(Path(one.uri).parent / "_serving" / f"{APP}.json"))
    assert release is not None
    assert (release.version, release.configured) == (
        two.version, {"application": one.uri, "user_config": two.uri})


def test_a_bad_bundle_in_the_user_config_changes_nothing(url: str, bundles: list[Bundle], tmp_path: Path):
    before = version(url)
    with Load(url, bundles) as load:
        apply(config(bundles[0].uri, str(tmp_path / "nothing")))
        load.more(30)
    assert (load.replies.failed, load.replies.wrong, dict(load.replies.degraded)) == ([], [], {})
    assert set(load.replies.versions) == {before}
    apply(config(bundles[0].uri, bundles[0].uri))  # another change is heard
    until(lambda: version(url) == bundles[0].version)


def test_more_gateways_than_the_user_store_can_have_do_not_come_to_be(url: str, bundles: list[Bundle]):
    with Load(url, bundles) as load:
        apply(config(bundles[0].uri, bundles[0].uri, gateways=2))
        until(lambda: "users.store embedded keeps users in one replica" in
              serve.status().applications[APP].deployments[serving.GATEWAY].message)
        load.more(10)
    assert (load.replies.failed, load.replies.wrong, dict(load.replies.degraded)) == ([], [], {})
    assert replicas()[serving.GATEWAY]["RUNNING"] == 1
