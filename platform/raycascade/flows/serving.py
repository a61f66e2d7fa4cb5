"""serve: a bundle behind HTTP, with Ray Serve. The stages and the gateway are plain classes (raycascade/serving).

composed: every stage is a deployment of its own. fused: the same classes in one replica, without hops. Whoever imports
this module has Ray's settings behind it: `_fast.set_environment` comes before.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raycascade import plugins, storage
from raycascade.bundle import Bundle, stated_version, verify
from raycascade.config import parse_config
from raycascade.errors import ConfigError, DeadlineExceeded, NotReady, Overloaded, RaycascadeError, ServingError
from raycascade.flows._metrics import RayMetrics
from raycascade.serving.api import build_api
from raycascade.serving.keys import require_safe_binding
from raycascade.serving.lanes import Lanes
from raycascade.serving.logs import log_json
from raycascade.serving.options import ServeOptions, StageOptions
from raycascade.serving.replicas import GatewayReplica, StageReplica, released_bundle
from raycascade.serving.stages import LocalStage, Lost, RemoteStage, Stage, StageServer, Survivors
from raycascade.serving.telemetry import Telemetry
from raycascade.serving.versions import read_release, release_uri, write_release

logger = logging.getLogger(__name__)
APP, GATEWAY = "raycascade", "Gateway"
APPLICATION = "application"  # where a release says that a config asked for a bundle
SPARE_CALLS = 64  # of a gateway replica, beyond what it takes: probes, and requests that it refuses itself
BIG_MESSAGE = 3 << 20  # bytes; above 4 MB a call goes through the object store
READY_S = 5.0
Stages = Callable[[Bundle, Lanes], Mapping[str, Stage]]


# ---------------------------------------------------------------- in the replicas
class StageDeployment(StageReplica):
    """A stage in its replica."""

    def __init__(self, uri: str, name: str, options: ServeOptions, release: str) -> None:
        log_json()
        super().__init__(uri, name, options, release)

    def ready(self) -> bool:
        """True once the bundle is loaded, which the constructor waits for."""
        return True

    def process(self) -> int:
        """The process id, for whoever looks for the replica on its machine."""
        return os.getpid()

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds: the moment to look whether another bundle is released."""
        self.look()


class GatewayIngress:
    """The HTTP ingress in its replica: a gateway over far stages, or over near ones where there are no handles."""

    def __init__(
        self, uri: str, names: tuple[str, ...], options: ServeOptions, release: str, *handles: Any
    ) -> None:
        log_json()
        _require_as_deployed(options)
        self._options, self._handles = options, dict(zip(names, handles, strict=False))
        self._telemetry = Telemetry(RayMetrics(), stages=names)
        self._replica = GatewayReplica(uri, names, _stages_of(self._handles, options), options, release,
                                       telemetry=self._telemetry)
        self._deploying: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._replica.gateway, self._options, names_answers=False)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """`user_config: {bundle: URI}` in Serve's config begins to deploy the bundle, unless this very config did so
        before. One that is refused is logged and changes nothing: an error here would make Ray Serve replace the
        replica."""
        if set(user_config) != {"bundle"}:
            logger.error("user_config: expected {bundle: URI}, got the keys %s; nothing changes", sorted(user_config))
            return
        if self._deploying is not None:
            self._deploying.cancel()
        self._deploying = asyncio.get_running_loop().create_task(self._deploy(str(user_config["bundle"])))

    async def _deploy(self, uri: str) -> None:
        from raycascade.flows.deploy import deploy_configured

        try:
            await deploy_configured(uri, self._replica, self._handles, release=self._replica.release)
        except Exception as error:
            expected = isinstance(error, RaycascadeError | OSError)
            logger.error("the bundle of user_config is not served: %s", error, exc_info=None if expected else error)
            await self._replica.refuse(uri)

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds: the moment to look whether another bundle is released."""
        self._replica.look()

    async def prepare(self, uri: str) -> str:
        """See `GatewayReplica`; so the others."""
        return await self._replica.prepare(uri)

    async def refuse(self, uri: str) -> None:
        """Lets go of a bundle that was prepared in vain."""
        await self._replica.refuse(uri)

    async def release_to(self, uri: str, version: str) -> None:
        """Writes the release."""
        await self._replica.release_to(uri, version)

    async def activate(self, version: str) -> None:
        """Answers new requests with another version."""
        await self._replica.activate(version)

    async def retire(self, version: str, timeout_s: float) -> bool:
        """Lets go of a version once its requests have ended."""
        return await self._replica.retire(version, timeout_s)

    async def about(self) -> dict[str, Any]:
        """What is served."""
        return self._replica.gateway.about()

    async def __del__(self) -> None:
        if hasattr(self, "_replica"):  # Ray Serve awaits this once the last request has ended
            await self._replica.close()
            self._telemetry.close()


def _require_as_deployed(options: ServeOptions) -> None:
    """ConfigError where a Serve config has made of the gateway what the options could not have asked for: several
    replicas over one that keeps users, or an endpoint that others than this machine reach without keys."""
    config = serve.get_replica_context()._deployment_config
    scaling = config.autoscaling_config
    options.require_gateways(scaling.max_replicas if scaling else config.num_replicas or 1)
    client = _get_global_client()
    host = client.http_config.host if client else None
    if host:
        require_safe_binding(host, options)


def _stages_of(handles: Mapping[str, Any], options: ServeOptions) -> Stages:
    if handles:
        far = {name: remote_stage(name, handle, options.stage(name)) for name, handle in handles.items()}
        return lambda bundle, lanes: far
    return lambda bundle, lanes: {name: LocalStage(StageServer(bundle, name), options.stage(name), lanes)
                                  for name in bundle.cascade.names}


def remote_stage(name: str, handle: Any, options: StageOptions) -> RemoteStage:
    """A stage behind a deployment handle; what Ray raises becomes what the gateway understands."""
    by_reference = handle.options(_by_reference=True)

    async def call(message: bytes, before: Survivors | None, left_s: float) -> Survivors:
        size = len(message) + (0 if before is None else before.rows_QK.nbytes + before.scores_QK.nbytes)
        response = (by_reference if size > BIG_MESSAGE else handle).run.remote(message, before, left_s)
        try:
            async with asyncio.timeout(left_s):
                return Survivors(*await response)
        except TimeoutError:
            response.cancel()  # without it the stage would go on
            raise DeadlineExceeded(f"{name}: no answer in time") from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise Overloaded(f"{name}: its replicas have as many calls as they take") from None
        except DeploymentUnavailableError:
            raise NotReady(f"{name}: the deployment has failed; see `serve status`") from None
        except (RayActorError, ObjectLostError):
            raise Lost(f"{name}: the replica is gone") from None
        except RayTaskError as error:
            if isinstance(error.cause, Lost | ServingError):
                raise error.cause from None
            raise

    async def alive() -> bool:
        response = handle.ready.remote()
        try:
            async with asyncio.timeout(READY_S):
                return await response
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()  # or the questions would pile up before a stage that is away
            raise

    return RemoteStage(name, call, alive, options)


# ---------------------------------------------------------------- the application
def application(uri: str, options: ServeOptions, *, app: str = APP) -> serve.Application:
    """The Serve application of a bundle, or of a later one where the release of this config says so. BundleError or
    ConfigError before anything starts."""
    uri = storage.absolute(uri)
    verify(uri)
    names = _stage_names(uri)
    options.require_stages(names)
    release = release_uri(options.release, bundle=uri, app=app)
    found = read_release(release)
    if found is None or found.configured.get(APPLICATION) != uri:
        write_release(release, bundle=uri, version=stated_version(uri), source=APPLICATION)
    door = options.gateway
    gateway = serve.deployment(serve.ingress()(GatewayIngress)).options(
        name=GATEWAY, num_replicas=door.replicas, max_surge_percent=100, graceful_shutdown_timeout_s=door.drain_s,
        max_ongoing_requests=door.max_ongoing + door.max_queued + SPARE_CALLS, health_check_period_s=options.poll_s,
        ray_actor_options={"num_cpus": door.cpus, "num_gpus": door.gpus})
    if options.mode == "fused":
        return gateway.bind(uri, names, options, release)
    handles = [_stage_deployment(name, options).bind(uri, name, options, release) for name in names]
    return gateway.bind(uri, names, options, release, *handles)


def _stage_deployment(name: str, options: ServeOptions) -> serve.Deployment:
    own = options.stage(name)
    scaling: dict[str, Any] = {"num_replicas": own.replicas}
    if own.autoscale:
        scaling = {"autoscaling_config": {
            "min_replicas": own.autoscale.min, "max_replicas": own.autoscale.max,
            "target_ongoing_requests": own.autoscale.target_ongoing}}
    return serve.deployment(StageDeployment).options(
        name=name, max_ongoing_requests=own.max_ongoing, max_queued_requests=own.max_queued, max_surge_percent=100,
        health_check_period_s=options.poll_s, graceful_shutdown_timeout_s=options.gateway.drain_s,
        ray_actor_options={"num_cpus": own.cpus, "num_gpus": own.gpus}, **scaling)


def start(uri: str, options: ServeOptions, *, name: str = APP, route_prefix: str = "/") -> str:
    """Deploys a bundle, waits until it answers, and returns its URL. Port 0 is a free one.

    A second application beside a running one needs its own name and route prefix, and the port of the first.
    """
    require_safe_binding(options.host, options)
    port = options.port
    app = application(uri, options, app=name)
    if not serve.status().applications:
        port = free_port(options.host, port)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": port})
    assert port, "the port of the Serve that is running already"
    try:
        serve.run(app, name=name, route_prefix=route_prefix)
    except BaseException:
        stop(name)
        raise
    return f"http://{options.host}:{port}{route_prefix}".rstrip("/")


def stop(name: str = APP) -> None:
    """Removes an application once its requests have ended, and Serve itself with the last one."""
    serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()


def serve_until_interrupted(uri: str, options: ServeOptions) -> None:
    """Serves until Ctrl-C or SIGTERM, then drains; says on standard error where."""
    import ray

    ended = threading.Event()
    previous = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        url = start(uri, options)
        address = ray.get_runtime_context().gcs_address
        sys.stderr.write(f"serving {released(uri, options)} ({options.mode}) at {url}/v1/recommend; Ctrl-C ends it; "
                         f"another bundle: raycascade deploy BUNDLE --address {address}\n")
        ended.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    stop()


def released(uri: str, options: ServeOptions, *, app: str = APP) -> str:
    """The bundle that is served where this one is asked for: itself, or what was deployed in its place later on."""
    uri = storage.absolute(uri)
    bundle = released_bundle(release_uri(options.release, bundle=uri, app=app), uri)
    return uri if bundle == uri else f"{bundle}, which was deployed in the place of {uri},"


def _stage_names(uri: str) -> tuple[str, ...]:
    path = storage.join(uri, "config.yaml")
    stages = parse_config(yaml.safe_load(storage.read_bytes(path)), where=path).stages
    if not hasattr(plugins.find("models", stages[0].model["name"]), "embed_items"):
        raise ConfigError(f"serve: stage {stages[0].name!r} cannot search a catalogue: only a model with item vectors, "
                          "such as two_tower, can; put one first, or score requests that bring candidates")
    return tuple(stage.name for stage in stages)


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0; ConfigError if another program listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror
            raise ConfigError(f"--port {port}: cannot listen on {host} ({reason}); choose another port") from None
        return probe.getsockname()[1]
