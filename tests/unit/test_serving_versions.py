"""Versions of a bundle in one process: releases, changing over between requests, replicas that follow, bad bundles."""

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from raycascade import storage
from raycascade.bundle import Bundle, add_to_manifest, load_bundle, stated_version
from raycascade.errors import BundleError, ConfigError, NotReady
from raycascade.serving import replicas
from raycascade.serving.lanes import Lanes
from raycascade.serving.options import ServeOptions
from raycascade.serving.replicas import GatewayReplica, StageReplica
from raycascade.serving.requests import Query
from raycascade.serving.stages import LocalStage, Lost, Stage, StageServer, pack
from raycascade.serving.telemetry import Telemetry
from raycascade.serving.versions import read_release, release_uri, write_release
from tests.served import checked_bundle, patient
from tests.tiny_world import KEEPS

FUSED = patient(mode="fused")


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: checked_bundle(str(folder / name), seed=seed) for name, seed in (("one", 11), ("two", 12))}


@pytest.fixture(scope="module")
def versions(uris: dict[str, str]) -> dict[str, str]:
    return {name: stated_version(uri) for name, uri in uris.items()}


def damaged(uri: str, folder: Path) -> str:
    """A copy with a byte too many in the last stage's weights."""
    copy = shutil.copytree(uri, folder / "damaged")
    with open(copy / "stages" / "ranker" / "weights.safetensors", "ab") as file:
        file.write(b"x")
    return str(copy)


def lying(uri: str, folder: Path) -> str:
    """A copy that is whole, but whose record is not what it answers."""
    copy = str(shutil.copytree(uri, folder / "lying"))
    file = storage.join(copy, "selfcheck/answers.json")
    answers = storage.read_json(file)
    answers["stages"][-1]["scores"][0][0] += 0.5
    storage.write_json(file, answers)
    add_to_manifest(copy, ["selfcheck/answers.json"])
    return copy


def stages_of(bundle: Bundle, lanes: Lanes) -> Mapping[str, Stage]:
    return {name: LocalStage(StageServer(bundle, name), lanes=lanes) for name in bundle.cascade.names}


def fused_replica(uri: str, release: str, telemetry: Telemetry | None = None) -> GatewayReplica:
    return GatewayReplica(uri, tuple(KEEPS), stages_of, FUSED, release, telemetry=telemetry)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(60.0):
            return await work()

    return asyncio.run(limited())


async def looked(replica: GatewayReplica | StageReplica) -> None:
    """The replica has looked at the release."""
    replica.look()
    assert replica._looking is not None
    await replica._looking


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


# ---------------------------------------------------------------- the release
def test_a_release_comes_back_as_it_was_written_and_keeps_what_configs_asked_for(tmp_path: Path):
    uri = release_uri("", bundle=str(tmp_path / "bundles" / "one"), app="shop")
    assert uri == str(tmp_path / "bundles" / "_serving" / "shop.json")
    assert read_release(uri) is None
    write_release(uri, bundle="one", version="1" * 16, source="application")
    write_release(uri, bundle="two", version="2" * 16)
    release = read_release(uri)
    assert release is not None
    assert (release.bundle, release.version, release.configured) == ("two", "2" * 16, {"application": "one"})


@pytest.mark.parametrize("content", ["", "[]", '{"bundle": "x"}', '{"other": 1}'])
def test_what_is_no_release_is_refused(tmp_path: Path, content: str):
    file = tmp_path / "release.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="not a release"):
        read_release(str(file))


def test_a_release_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the release cannot be written"):
        write_release(str(tmp_path / "file" / "release.json"), bundle="one", version="1")


# ---------------------------------------------------------------- the gateway
def test_a_gateway_changes_over_between_two_requests_and_lets_go_of_the_old_one(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path
):
    telemetry = Telemetry(stages=tuple(KEEPS))
    replica = fused_replica(uris["one"], str(tmp_path / "release.json"), telemetry)

    async def work() -> None:
        gateway = replica.gateway
        assert await replica.prepare(uris["two"]) == versions["two"]
        assert (await gateway.recommend(Query(user_id=100))).version == versions["one"]
        await replica.activate(versions["two"])
        answer = await gateway.recommend(Query(user_id=100))
        assert (answer.version, answer.model) == (versions["two"], "two")
        assert gateway.active.checked
        assert set(gateway.versions.held) == set(versions.values())
        assert await replica.retire(versions["one"], 5.0)
        assert gateway.versions.held == (versions["two"],)
        assert not await replica.retire(versions["two"], 0.0)  # the active one stays

    run(work)
    assert telemetry.totals()["raycascade_swaps_total", "swapped"] == 1


def test_a_request_on_its_way_keeps_its_version_and_holds_it(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replica = fused_replica(uris["one"], str(tmp_path / "release.json"))
    gate, old = threading.Event(), replica.gateway.active
    ranker = old.stages["ranker"]
    assert isinstance(ranker, LocalStage)
    compute = ranker.server.run
    monkeypatch.setattr(ranker.server, "run", lambda *both: gate.wait(60.0) and compute(*both))

    async def work() -> None:
        waiting = asyncio.create_task(replica.gateway.recommend(Query(user_id=100)))
        await until(lambda: old.num_running == 1)
        await replica.prepare(uris["two"])
        await replica.activate(versions["two"])
        assert (await replica.gateway.recommend(Query(user_id=100))).version == versions["two"]
        retiring = asyncio.create_task(replica.retire(versions["one"], 30.0))
        await asyncio.sleep(0)
        assert not retiring.done()
        gate.set()
        assert (await waiting).version == versions["one"]
        assert await retiring

    run(work)


@pytest.mark.parametrize(("bad", "message"), [(damaged, "changed since it was written"), (lying, "self-check failed")])
def test_a_bad_bundle_is_refused_and_the_old_one_serves(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path, bad: Callable[[str, Path], str], message: str
):
    telemetry = Telemetry(stages=tuple(KEEPS))
    replica = fused_replica(uris["one"], str(tmp_path / "release.json"), telemetry)
    uri = bad(uris["two"], tmp_path)

    async def work() -> None:
        with pytest.raises(BundleError, match=message):
            await replica.prepare(uri)
        await replica.refuse(uri)
        assert replica.gateway.versions.held == (versions["one"],)
        assert (await replica.gateway.recommend(Query(user_id=100))).version == versions["one"]

    run(work)
    assert telemetry.totals()["raycascade_swaps_total", "refused"] == 1
    with pytest.raises(BundleError, match=message):
        fused_replica(uri, str(tmp_path / "none.json"))


def test_a_version_that_is_not_loaded_is_not_activated(uris: dict[str, str], tmp_path: Path):
    gateway = fused_replica(uris["one"], str(tmp_path / "release.json")).gateway
    with pytest.raises(NotReady, match="version 123 is not loaded here"):
        gateway.activate("123")


def test_a_gateway_lets_go_of_what_was_prepared_and_never_served(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whoever deployed it has died in the middle."""
    replica = fused_replica(uris["one"], str(tmp_path / "release.json"))

    async def work() -> None:
        await replica.prepare(uris["two"])
        await looked(replica)
        assert set(replica.gateway.versions.held) == set(versions.values())  # it may still be on its way
        monkeypatch.setattr(replicas, "PREPARED_S", 0.0)
        await replica.prepare(uris["two"])
        await looked(replica)
        assert replica.gateway.versions.held == (versions["one"],)

    run(work)


def test_a_gateway_that_changed_over_by_itself_lets_go_of_the_old_version(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path
):
    """As the gateway that a config has told: nobody asks it to."""
    release = str(tmp_path / "release.json")
    replica = fused_replica(uris["one"], release)

    async def work() -> None:
        await replica.prepare(uris["two"])
        write_release(release, bundle=uris["two"], version=versions["two"], source="user_config")
        await replica.activate(versions["two"])
        await looked(replica)
        assert replica.gateway.versions.held == (versions["two"],)

    run(work)


def test_a_selfcheck_that_takes_too_long_changes_nothing(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replica = fused_replica(uris["one"], str(tmp_path / "release.json"))
    monkeypatch.setattr(replicas, "CHECK_S", 0.0)
    with pytest.raises(NotReady, match="the self-check through all stages was not done in 0 s"):
        run(lambda: replica.prepare(uris["two"]))
    assert replica.gateway.versions.held == (versions["one"],)


def test_a_damaged_copy_of_the_version_that_is_served_is_refused(uris: dict[str, str], tmp_path: Path):
    release, bad = str(tmp_path / "release.json"), damaged(uris["one"], tmp_path)
    both = fused_replica(uris["one"], release), StageReplica(uris["one"], "ranker", ServeOptions(), release)

    async def work() -> None:
        for replica in both:
            with pytest.raises(BundleError, match="changed since it was written"):
                await replica.prepare(bad)

    run(work)


def test_a_release_of_a_bad_bundle_is_one_line_in_the_log_and_the_old_one_serves(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    release, bad = str(tmp_path / "release.json"), damaged(uris["two"], tmp_path)
    gateway = fused_replica(uris["one"], release)
    stage = StageReplica(uris["one"], "ranker", ServeOptions(), release)
    write_release(release, bundle=bad, version="2" * 16)

    async def work() -> None:
        await looked(gateway)
        await looked(stage)
        assert (await gateway.gateway.recommend(Query(user_id=100))).version == versions["one"]

    run(work)
    said = [record for record in caplog.records if "cannot follow the release" in record.message]
    assert [record.message.split(" cannot")[0] for record in said] == ["the gateway", "stage ranker"]
    assert all("changed since it was written" in record.message and not record.exc_info for record in said)


@pytest.mark.parametrize("kind", ["gateway", "stage"])
def test_what_is_refused_while_it_is_still_being_loaded_is_let_go_of(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path, kind: str
):
    """Another replica was quicker to find that the bundle is bad."""
    release = str(tmp_path / "release.json")

    async def work() -> None:
        replica = fused_replica(uris["one"], release) if kind == "gateway" else StageReplica(
            uris["one"], "ranker", ServeOptions(), release)
        loading = asyncio.create_task(replica.prepare(uris["two"]))
        await until(replica._loading.locked)
        await replica.refuse(uris["two"])
        await loading
        held = replica.held if isinstance(replica, StageReplica) else replica.gateway.versions.held
        assert held == (versions["one"],)

    run(work)


def test_composed_stages_must_be_those_that_are_deployed(uris: dict[str, str], tmp_path: Path):
    other = checked_bundle(str(tmp_path / "other"), keeps={"retriever": 40, "ranker": 5})
    replica = GatewayReplica(uris["one"], tuple(KEEPS), stages_of, patient(), str(tmp_path / "release.json"))
    with pytest.raises(BundleError, match="its stages are retriever, ranker, but retriever, pre_ranker, ranker are"):
        run(lambda: replica.prepare(other))


def test_a_replica_starts_with_what_is_released_and_follows_a_later_release(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path
):
    release = str(tmp_path / "release.json")
    write_release(release, bundle=uris["two"], version=versions["two"])
    replica = fused_replica(uris["one"], release)
    assert replica.gateway.active.version == versions["two"]

    async def work() -> None:
        write_release(release, bundle=uris["one"], version=versions["one"])
        replica.look()
        await until(lambda: replica.gateway.versions.held == (versions["one"],))
        write_release(release, bundle=str(tmp_path / "nothing"), version="0" * 16)
        replica.look()
        replica.look()
        await until(lambda: replica._looking is not None and replica._looking.done())
        assert (await replica.gateway.recommend(Query(user_id=100))).version == versions["one"]

    run(work)


# ---------------------------------------------------------------- a stage
def test_a_stage_answers_requests_of_the_versions_that_it_holds_and_of_no_other(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path
):
    release = str(tmp_path / "release.json")
    write_release(release, bundle=uris["one"], version=versions["one"])
    replica = StageReplica(uris["one"], "retriever", ServeOptions(), release)
    bundles = {name: load_bundle(uri) for name, uri in uris.items()}
    tables = {name: bundle.encode(bundle.users.table.select(["user_key"]).rename_columns(["user_id"]).slice(0, 2))
              for name, bundle in bundles.items()}
    messages = {name: pack(table, version=versions[name]) for name, table in tables.items()}

    def expected(name: str) -> list[list[int]]:
        return bundles[name].recommend(tables[name]).stages[0].kept()[0].tolist()

    async def work() -> None:
        assert (await replica.run(messages["one"], None, 30.0)).rows_QK.tolist() == expected("one")
        with pytest.raises(Lost):
            await replica.run(messages["two"], None, 30.0)
        assert await replica.prepare(uris["two"]) == versions["two"]
        both = await asyncio.gather(*(replica.run(messages[name], None, 30.0) for name in ("one", "two", "one")))
        assert [one.rows_QK.tolist() for one in both] == [expected(name) for name in ("one", "two", "one")]
        await replica.forget(versions["one"])  # it is released
        assert set(replica.held) == set(versions.values())
        write_release(release, bundle=uris["two"], version=versions["two"])
        await replica.forget(versions["one"])
        assert replica.held == (versions["two"],)

    run(work)


def test_a_stage_keeps_what_is_prepared_and_what_a_gateway_may_still_ask_for_and_no_more(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """However long the other replicas load: nobody asks for the new bundle before all have it."""
    release = str(tmp_path / "release.json")
    write_release(release, bundle=uris["one"], version=versions["one"])
    replica = StageReplica(uris["one"], "ranker", ServeOptions(), release)

    async def work() -> None:
        await looked(replica)
        await replica.prepare(uris["two"])
        monkeypatch.setattr(replicas, "KEPT_S", 0.0)
        await looked(replica)
        assert set(replica.held) == set(versions.values())
        monkeypatch.setattr(replicas, "KEPT_S", 60.0)
        write_release(release, bundle=uris["two"], version=versions["two"])
        await looked(replica)
        assert set(replica.held) == set(versions.values())  # a gateway may not have changed over
        replica._kept_until[versions["one"]] = 0.0  # long after
        await looked(replica)
        assert replica.held == (versions["two"],)

    run(work)


def test_a_stage_loads_the_release_that_a_request_speaks_of(
    uris: dict[str, str], versions: dict[str, str], tmp_path: Path
):
    release = str(tmp_path / "release.json")
    replica = StageReplica(uris["one"], "ranker", ServeOptions(), release)
    write_release(release, bundle=uris["two"], version=versions["two"])
    bundle = load_bundle(uris["two"])
    message = pack(bundle.encode(bundle.users.table.select(["user_key"]).rename_columns(["user_id"]).slice(0, 1)),
                   version=versions["two"])

    async def work() -> None:
        with pytest.raises(Lost):
            await replica.run(message, None, 30.0)
        await until(lambda: versions["two"] in replica.held)

    run(work)


@pytest.mark.parametrize("name", list(KEEPS))
def test_a_stage_checks_its_own_part(uris: dict[str, str], tmp_path: Path, name: str):
    replica = StageReplica(uris["one"], name, ServeOptions(), str(tmp_path / "release.json"))
    bad = lying(uris["two"], tmp_path)
    if name == "ranker":
        with pytest.raises(BundleError, match="self-check failed at stage 'ranker', request 0"):
            run(lambda: replica.prepare(bad))
    else:
        run(lambda: replica.prepare(bad))
    run(lambda: replica.refuse(bad))
    assert replica.held == (stated_version(uris["one"]),)
