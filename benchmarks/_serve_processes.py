"""Servers and clients as processes: how they are started, what of the processor they use, and how they end (Linux)."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
START_S, STOP_S, POLL_S = 300.0, 60.0, 0.1
DEADLINE_MS = 30_000  # no answer is degraded for want of time
TICK = os.sysconf("SC_CLK_TCK")
SERVING_AT = re.compile(r"serving .+ \(\w+\) at http://127\.0\.0\.1:(\d+)/")


def environment(**extra: str) -> dict[str, str]:
    """That of every process: one thread a computation, and the code of this checkout."""
    path = os.pathsep.join([str(HERE.parent / "platform"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


class Server(AbstractContextManager["Server"]):
    """A server in processes of its own, between `with` and its end. `port`: where it listens once it is ready.

    RuntimeError with the end of its output where it does not come up."""

    def __init__(
        self, command: Sequence[str], log: Path, *, port: int | None = None, cores: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._command, self._log, self._cores = list(command), log, tuple(cores)
        self._variables, self._given_port = dict(variables or {}), port
        self.port = 0

    def __enter__(self) -> "Server":
        allowed = os.sched_getaffinity(0)
        if self._cores:  # children inherit it
            os.sched_setaffinity(0, self._cores)
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT,
                                                 env=environment(**self._variables), start_new_session=True)
        finally:
            os.sched_setaffinity(0, allowed)
        try:
            self.port = self._when_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """SIGTERM and time to drain; then whatever is left of it is killed."""
        left = tree_of(self._process.pid)
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        deadline = time.monotonic() + STOP_S / 6
        while time.monotonic() < deadline and any(map(_still_there, left.items())):
            time.sleep(POLL_S)
        for one in filter(_still_there, left.items()):
            with suppress(ProcessLookupError):
                os.kill(one[0], signal.SIGKILL)
        self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process that was started; the others are below it."""
        return self._process.pid

    def processor_s(self) -> float:
        """Seconds of the processor that all its processes have used so far."""
        return sum(_processor_s(pid) for pid in tree_of(self._process.pid))

    def _when_ready(self) -> int:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._given_port is not None and _listens(self._given_port):
                return self._given_port
            if found := SERVING_AT.search(self._log.read_text(errors="replace")):
                return int(found[1])
            time.sleep(POLL_S)
        end = self._log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(self._command)} did not come up:\n{end}")


def ray_of_its_own(folder: Path) -> dict[str, str]:
    """Variables of a local Ray beside any others of this machine: a token, and files of its own. The folder needs a
    short name, for Ray keeps its sockets below it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder)}


def raycascade(bundle: str, mode: str, folder: Path, *, cores: Sequence[int] = ()) -> Server:
    """`raycascade serve` as it comes, but for the deadline; its files are in the folder."""
    folder.mkdir()
    command = [sys.executable, "-m", "raycascade", "serve", bundle, "--mode", mode, "--port", str(free_port()),
               f"deadline_ms={DEADLINE_MS}"]
    return Server(command, folder / "serve.log", cores=cores, variables=ray_of_its_own(folder))


def reference(bundle: str, folder: Path, *, workers: int) -> Server:
    """The server written by hand."""
    port = free_port()
    command = [sys.executable, str(HERE / "_serve_reference.py"), "--bundle", bundle, "--port", str(port), "--workers",
               str(workers)]
    return Server(command, folder / f"reference-{workers}.log", port=port)


class Clients(AbstractContextManager["Clients"]):
    """The process of the clients."""

    def __enter__(self) -> "Clients":
        self._process = subprocess.Popen([sys.executable, str(HERE / "_serve_client.py")], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, env=environment())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def ask(self, **job: Any) -> dict[str, Any]:
        """The result of a job; RuntimeError where the client failed, its own error is on standard error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the clients failed: a server answered with something other than 200, or not at all")
        return json.loads(line)


# ---------------------------------------------------------------- /proc
def tree_of(pid: int) -> dict[int, str]:
    """A process and all below it, with the moment that each began, which tells it from another of the same id."""
    parents: dict[int, list[int]] = {}
    began: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (fields := _stat(int(folder.name))):
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
            began[int(folder.name)] = fields[19]
    found, left = {}, [pid]
    while left:
        one = left.pop()
        if one in began:
            found[one] = began[one]
            left += parents.get(one, [])
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _processor_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICK if fields else 0.0


def _still_there(one: tuple[int, str]) -> bool:
    fields = _stat(one[0])
    return bool(fields) and fields[19] == one[1] and fields[0] != "Z"


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
