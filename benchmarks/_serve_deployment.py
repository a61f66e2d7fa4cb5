"""A served bundle with Redis, as processes of the benchmark's own, and what can be seen of them from outside.

Replicas are found among the descendants of the server, so that nobody else's are ever ended.
"""

import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from _serve_processes import Server, environment, free_port, ray_of_its_own, tree_of

CLI = (sys.executable, "-c", "import sys; from raycascade.cli import main; sys.exit(main())")
START_S = 60.0
SOCKET = "admin"
REPLICA = "ray::ServeReplica:raycascade:"  # begins the title of a replica's process; the name of the deployment follows


class Deployment(contextlib.AbstractContextManager["Deployment"]):
    """`raycascade serve BUNDLE` with a local Ray of its own, between `with` and its end. The folder needs a short name:
    Ray keeps its sockets below it. RuntimeError with the end of its log where it does not start."""

    def __init__(self, folder: Path, bundle: str, *, mode: str, options: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._folder = folder / "serve.log", folder
        variables = ray_of_its_own(folder)
        self._token = {name: value for name, value in variables.items() if name.startswith("RAY_AUTH")}
        self._server = Server(
            [*CLI, "serve", bundle, "--mode", mode, "--port", str(free_port()), *options], self._log,
            variables={**variables, "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / SOCKET)})
        self.url, self.address = "", ""

    def __enter__(self) -> "Deployment":
        self._server.__enter__()
        self.url = f"http://127.0.0.1:{self._server.port}"
        found = re.search(r"--address (\S+)", self.log())
        assert found, self.log()
        self.address = found[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__()

    def processes(self) -> dict[int, str]:
        """Titles of the server's process and of all that it started, by process id."""
        titles = {pid: title_of(pid) for pid in tree_of(self._server.pid)}
        return {pid: title for pid, title in titles.items() if title}

    def replicas(self, name: str) -> list[int]:
        """Process ids of a deployment's replicas, those that are starting among them."""
        pattern = re.compile(re.escape(REPLICA + name) + r"(?!\w)")
        return sorted(pid for pid, title in self.processes().items() if pattern.match(title))

    async def doors(self) -> set[str]:
        """The gateway replicas that HAProxy sends requests to, by the names that it has for them."""
        (socket_path,) = self._folder.glob(f"*/{SOCKET}")  # Ray adds the node's id
        try:
            reader, writer = await asyncio.open_unix_connection(str(socket_path))
            writer.write(b"show stat\n")
            lines = (await asyncio.wait_for(reader.read(), 5.0)).decode().splitlines()
            writer.close()
        except (OSError, TimeoutError):  # while it is reloaded
            return set()
        columns = lines[0].removeprefix("# ").split(",") if lines else []
        rows = [dict(zip(columns, line.split(","), strict=False)) for line in lines[1:] if line]
        return {row["svname"] for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")
                and row["bck"] == "0" and row["status"].startswith("UP")}

    async def deploy(self, bundle: str) -> tuple[int, str]:
        """Exit status and output of `raycascade deploy BUNDLE`."""
        process = await asyncio.create_subprocess_exec(
            *CLI, "deploy", bundle, "--address", self.address, env=environment(**self._token),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode(errors="replace").strip()

    def log(self) -> str:
        """What the server has written."""
        return self._log.read_text(errors="replace")


def title_of(pid: int) -> str:
    """The command line of a process, "" where there is none (any more)."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def private_bytes(pid: int) -> int:
    """The memory of a process that is its own: resident, not shared with others and not of a file; 0 where it is
    gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


class Redis:
    """A Redis server on a free loopback port that forgets nothing it has answered, however its process ends: what it
    has written before it answers is with the system, if not on the disk."""

    def __init__(self, folder: Path) -> None:
        server = shutil.which("redis-server")
        if server is None:
            raise SystemExit("redis-server is not installed; apt-get install redis-server")
        folder.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._command = [server, "--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes",
                         "--appendfsync", "no", "--dir", str(folder)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it listens."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", self._port)):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("redis-server does not start")
            time.sleep(0.01)

    def kill(self) -> None:
        """Ends it at once, as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    """One that runs until the end of the block."""
    redis = Redis(folder)
    redis.start()
    try:
        yield redis
    finally:
        redis.kill()
