"""serve: a bundle behind HTTP, with Ray Serve. The stages and the gateway are plain classes (raycascade/serving).

composed: every stage is a deployment of its own. fused: the same classes in one replica, without hops.
"""

import logging
import signal
import socket
import sys
import threading
from typing import Any, Literal, cast, get_args

from fastapi import FastAPI
from ray import serve

from raycascade import plugins, storage
from raycascade.bundle import load_bundle, verify
from raycascade.config import parse_config
from raycascade.errors import ConfigError
from raycascade.serving.api import build_api
from raycascade.serving.gateway import Gateway
from raycascade.serving.stages import LocalStage, RemoteStage, StageServer

Mode = Literal["composed", "fused"]
LOOPBACK = ("127.0.0.1", "localhost")
APP = "raycascade"
# Replicas reserve little of a logical CPU, so that a cascade of any depth fits on a small machine.
REPLICA: dict[str, Any] = {"num_cpus": 0.1}


class GatewayIngress:
    """The HTTP ingress in its replica: a gateway over far stages, or over near ones where there are none."""

    def __init__(self, uri: str, names: tuple[str, ...], *handles: Any) -> None:
        bundle = load_bundle(uri, served=() if handles else None)
        far = [RemoteStage(handle) for handle in handles]
        stages = far or [LocalStage(StageServer(bundle, name)) for name in names]
        self._gateway = Gateway(bundle, dict(zip(names, stages, strict=True)))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._gateway)


def application(uri: str, *, mode: str) -> serve.Application:
    """The Serve application of a bundle; BundleError or ConfigError before anything starts."""
    checked = _mode(mode)
    uri = storage.absolute(uri)
    verify(uri)
    names = _stage_names(uri)
    gateway = serve.deployment(serve.ingress()(GatewayIngress)).options(
        name="Gateway", max_ongoing_requests=100, ray_actor_options=REPLICA)
    if checked == "fused":
        return gateway.bind(uri, names)
    stage = serve.deployment(StageServer).options(max_ongoing_requests=16, ray_actor_options=REPLICA)
    handles = [stage.options(name=name).bind(uri, name) for name in names]
    return gateway.bind(uri, names, *handles)


def start(uri: str, *, mode: str, host: str, port: int, name: str = APP, route_prefix: str = "/") -> str:
    """Deploys a bundle, waits until it answers, and returns its URL. Port 0 is a free one.

    A second application beside a running one needs its own name and route prefix, and the port of the first.
    """
    if host not in LOOPBACK:
        raise ConfigError(f"--host {host}: only {' and '.join(LOOPBACK)} are allowed, because requests carry no key; "
                          "put a gateway with authentication in front")
    app = application(uri, mode=mode)
    running = bool(serve.status().applications)
    if not running:
        port = free_port(host, port)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    assert port, "the port of the Serve that is running already"
    try:
        serve.run(app, name=name, route_prefix=route_prefix)
    except BaseException:
        stop(name)
        raise
    return f"http://{host}:{port}{route_prefix}".rstrip("/")


def stop(name: str = APP) -> None:
    """Removes an application, and Serve itself with the last one."""
    serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()


def serve_until_interrupted(uri: str, *, mode: str, host: str, port: int) -> None:
    """Serves until Ctrl-C or SIGTERM; says on standard error where."""
    ended = threading.Event()
    previous = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        url = start(uri, mode=mode, host=host, port=port)
        sys.stderr.write(f"serving {uri} ({mode}) at {url}/v1/recommend; Ctrl-C ends it\n")
        ended.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    stop()


def _mode(mode: str) -> Mode:
    if mode not in get_args(Mode):
        raise ConfigError(f"--mode {mode}: expected one of {', '.join(get_args(Mode))}")
    return cast(Mode, mode)


def _stage_names(uri: str) -> tuple[str, ...]:
    import yaml

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
