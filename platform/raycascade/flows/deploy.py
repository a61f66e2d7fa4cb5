"""deploy: another bundle in the place of the one that is served, in all replicas or in none.

Every replica loads it beside the old one and checks it; the gateways ask the self-check's requests through all stages.
Only then is the release written, and the gateways change over, each between two requests. Whatever fails before that
changes nothing. A replica that begins in the middle finds the release by itself.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from raycascade import storage
from raycascade.errors import ConfigError, NotReady, RaycascadeError
from raycascade.serving.replicas import LONGEST_S, PREPARE_S, GatewayReplica
from raycascade.serving.stages import Lost
from raycascade.serving.versions import read_release, write_release

logger = logging.getLogger(__name__)
SWITCH_S = 30.0
AGAIN_S, TRY_S = 2.0, 300.0  # a config's bundle is tried so often, so long, while replicas are still starting
FROM_CONFIG = "user_config"


def deploy(uri: str, *, app: str) -> dict[str, Any]:
    """Serves another bundle with the application `app` of the connected cluster; {"bundle", "version", "before",
    "changed", "seconds"}. BundleError for a bundle that cannot take its place, NotReady where a replica does not
    answer; then the old one is served as before."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if app not in serve.status().applications:
        running = ", ".join(serve.status().applications) or "none"
        raise ConfigError(f"--app {app}: no such application is running (there is {running}); `raycascade serve` "
                          "starts one, and --address names the cluster that it runs on")
    return asyncio.run(_deploy(storage.absolute(uri), app))


async def _deploy(uri: str, app: str) -> dict[str, Any]:
    started = time.monotonic()
    gateways = serve.get_deployment_handle("Gateway", app)
    about = await _asked(gateways.about.remote(), SWITCH_S)
    stages = {stage["name"]: serve.get_deployment_handle(stage["name"], app) for stage in about["stages"]
              } if about["mode"] == "composed" else {}
    version = await _prepared(stages, gateways, uri)
    result = {"bundle": uri, "version": version, "before": about["version"], "changed": version != about["version"]}
    if result["changed"]:
        await _asked(gateways.release_to.remote(uri, version), SWITCH_S)
        await _told(gateways, "activate", version, timeout_s=SWITCH_S)
        await _told(gateways, "retire", about["version"], LONGEST_S, timeout_s=LONGEST_S + SWITCH_S)
        for handle in stages.values():
            await _told(handle, "forget", about["version"], timeout_s=SWITCH_S)
    return {**result, "seconds": round(time.monotonic() - started, 2)}


async def _prepared(stages: Mapping[str, Any], gateways: Any, uri: str) -> str:
    """The version, once every replica holds it; where one cannot, all let go of it."""
    try:
        await asyncio.gather(*(_all(handle, "prepare", uri, timeout_s=PREPARE_S) for handle in stages.values()))
        versions = await _all(gateways, "prepare", uri, timeout_s=PREPARE_S)
    except RaycascadeError:
        await _refused((gateways, *stages.values()), uri)
        raise
    assert len(set(versions)) == 1, versions
    return versions[0]


async def deploy_configured(
    uri: str, replica: GatewayReplica, stages: Mapping[str, Any], *, release: str
) -> bool:
    """What one gateway replica does when Serve's config names a bundle: the same for itself, as every other replica
    does. Whether it is served now; False where this config asked for it before. Tries again while replicas start."""
    uri = storage.absolute(uri)
    found = await asyncio.to_thread(read_release, release)
    if found is not None and found.configured.get(FROM_CONFIG) == uri:
        return False
    until = time.monotonic() + TRY_S
    while True:
        try:
            await asyncio.gather(*(_all(handle, "prepare", uri, timeout_s=PREPARE_S) for handle in stages.values()))
            version = await replica.prepare(uri)
            break
        except NotReady:
            if time.monotonic() > until:
                await _refused(stages.values(), uri)
                raise
            await asyncio.sleep(AGAIN_S)
        except RaycascadeError:
            await _refused(stages.values(), uri)
            raise
    await asyncio.to_thread(write_release, release, bundle=uri, version=version, source=FROM_CONFIG)
    await replica.activate(version)
    return True


async def _refused(handles: Iterable[Any], uri: str) -> None:
    """All replicas let go of a bundle; those that cannot hear it do so by themselves, later."""
    await asyncio.gather(*(_all(handle, "refuse", uri, timeout_s=SWITCH_S) for handle in handles),
                         return_exceptions=True)


async def _all(handle: Any, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """What every replica of a deployment answers."""
    return await _asked(handle.broadcast(method, *arguments).results_async(timeout_s=timeout_s), timeout_s)


async def _told(handle: Any, method: str, *arguments: Any, timeout_s: float) -> None:
    """Tells every replica. One that cannot hear it any more needs not: the one in its place reads the release."""
    try:
        await _all(handle, method, *arguments, timeout_s=timeout_s)
    except NotReady as error:
        logger.warning("%s: %s", method, error)


async def _asked(answer: Awaitable[Any], timeout_s: float) -> Any:
    """An answer of a replica; its errors as what they are, and NotReady where there is none."""
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except RayTaskError as error:
        if isinstance(error.cause, RaycascadeError):
            raise error.cause from None
        if isinstance(error.cause, TimeoutError | Lost):
            raise NotReady(f"deploy: a replica did not get ready ({error.cause}); the old bundle is served") from None
        raise
    except (TimeoutError, RayError, RayServeException, DeploymentUnavailableError) as error:
        reason = " ".join(str(error).split())[:200] or f"nothing within {timeout_s:g} s"
        raise NotReady(f"deploy: a replica does not answer ({reason}); the old bundle is served; try again when "
                       "`serve status` shows all replicas healthy") from None
