"""Hot swap under load: no failed, no mixed and no degraded answer; a bad bundle is refused and the old one serves."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from raycascade import storage
from raycascade.bundle import Bundle, add_to_manifest, load_bundle
from raycascade.errors import BundleError, ConfigError
from raycascade.flows import serving
from raycascade.flows.deploy import deploy
from raycascade.serving.versions import read_release
from tests.serve.load import Load
from tests.served import checked_bundle, patient

pytestmark = pytest.mark.ray
SWAPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swapped")


@pytest.fixture(scope="module")
def bundles(folder: Path) -> list[Bundle]:
    return [load_bundle(checked_bundle(str(folder / name), seed=seed)) for name, seed in (("one", 11), ("two", 12))]


@pytest.fixture(scope="module", params=["composed", "fused"])
def served(request: pytest.FixtureRequest, ray_cluster: None, bundles: list[Bundle]) -> Iterator[tuple[str, str]]:
    """Application and URL; composed, the last stage has two replicas."""
    app = f"swap-{request.param}"
    options = patient(mode=request.param, stages={"ranker": {"replicas": 2}})
    yield app, serving.start(bundles[0].uri, options, name=app, route_prefix=f"/{app}")
    serving.stop(app)


def held(url: str) -> tuple[str, list[str]]:
    about = httpx.get(f"{url}/v1/model", timeout=30.0).json()
    return about["version"], about["held"]


def test_swaps_under_load_fail_nothing_and_mix_nothing(served: tuple[str, str], bundles: list[Bundle]):
    app, url = served
    with Load(url, bundles) as load:
        load.more(20)
        for swap in range(SWAPS):
            target = bundles[(swap + 1) % 2]
            result = deploy(target.uri, app=app)
            assert (result["version"], result["changed"]) == (target.version, True)
            seen = load.replies.versions[target.version]
            load.until(lambda replies, version=target.version, seen=seen: replies.versions[version] > seen + 10)
            assert held(url) == (target.version, [target.version])
    replies = load.replies
    assert (replies.failed, replies.wrong, dict(replies.degraded)) == ([], [], {})
    assert set(replies.statuses) == {200}
    assert set(replies.versions) == {bundle.version for bundle in bundles}
    release = read_release(str(Path(bundles[0].uri).parent / "_serving" / f"{app}.json"))
    assert release is not None
    assert release.version == bundles[SWAPS % 2].version
    assert not deploy(bundles[SWAPS % 2].uri, app=app)["changed"]


def damaged(uri: str, folder: Path) -> str:
    copy = shutil.copytree(uri, folder / "damaged")
    with open(copy / "stages" / "ranker" / "weights.safetensors", "ab") as file:
        file.write(b"x")
    return str(copy)


def lying(uri: str, folder: Path) -> str:
    copy = str(shutil.copytree(uri, folder / "lying"))
    file = storage.join(copy, "selfcheck/answers.json")
    answers = storage.read_json(file)
    answers["stages"][-1]["scores"][0][0] += 0.5
    storage.write_json(file, answers)
    add_to_manifest(copy, ["selfcheck/answers.json"])
    return copy


def test_bad_bundles_are_refused_under_load_and_the_old_one_serves(
    served: tuple[str, str], bundles: list[Bundle], tmp_path: Path
):
    app, url = served
    before = held(url)
    with Load(url, bundles) as load:
        for bad, message in ((damaged, "changed since it was written"), (lying, "self-check failed")):
            with pytest.raises(BundleError, match=message):
                deploy(bad(bundles[0].uri, tmp_path), app=app)
        with pytest.raises(BundleError, match="no finished bundle"):
            deploy(str(tmp_path / "nothing"), app=app)
        load.more(10)
    assert (load.replies.failed, load.replies.wrong, dict(load.replies.degraded)) == ([], [], {})
    assert held(url) == before
    assert set(load.replies.versions) == {before[0]}


def test_an_application_that_does_not_run_is_named(ray_cluster: None, bundles: list[Bundle]):
    with pytest.raises(ConfigError, match="--app shop: no such application is running"):
        deploy(bundles[0].uri, app="shop")
