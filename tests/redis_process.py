"""A Redis server of the test's own, on a free loopback port, in memory only; and stores over it."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from raycascade.serving.users import IdKinds, NewEvent
from raycascade.serving.users_redis import RedisUserStore
from tests.naive_users import EXCLUDE_LEN, HISTORY_LEN

SERVER = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed; apt-get install redis-server")
START_S = 60.0
SOON_S = 60.0  # deadline of a condition that is waited for
INTEGERS = IdKinds("int", "int")


class RedisProcess:
    """One server that can be killed, stopped and started again on its port."""

    def __init__(self, folder: Path, *, password: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder, self._password = folder, password
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://{f':{self._password}@' if self._password else ''}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts it, empty, and waits until it answers."""
        assert SERVER is not None
        self._process = subprocess.Popen(
            [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir",
             str(self._folder), *(["--requirepass", self._password] if self._password else [])],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, "redis-server ended; its port may have been taken"
                    assert time.monotonic() < deadline, f"redis-server does not answer after {START_S:g} s"
                    time.sleep(0.01)

    def kill(self) -> None:
        """Ends it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_S)
            self._process = None

    def freeze(self) -> None:
        """It keeps its connections and answers nobody."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def client(self) -> redis.Redis:
        """A plain client."""
        return redis.Redis(port=self.port, password=self._password or None, socket_timeout=START_S)


def store_of(server: RedisProcess, **changes: Any) -> RedisUserStore:
    """A store that waits long, so that a busy machine does no harm."""
    options = {"kinds": INTEGERS, "namespace": "test", "history_len": HISTORY_LEN, "exclude_len": EXCLUDE_LEN,
               "dedup_s": 3600, "timeout_s": 60.0}
    return RedisUserStore(server.url, **{**options, **changes})


def event(event_id: str, *, user: int | str = 1, item: int | str = 5, time_ms: int | None = 9) -> NewEvent:
    """An event of user 1."""
    return NewEvent(event_id=event_id, user_id=user, item_id=item, time_ms=time_ms)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until an awaitable condition holds."""
    deadline = time.monotonic() + SOON_S
    while not await condition():
        assert time.monotonic() < deadline, f"it did not happen within {SOON_S:g} s"
        await asyncio.sleep(0.02)
