"""The other end of the wire: a closed loop of clients in a process of its own, over bare sockets.

    python benchmarks/_serve_client.py < jobs > results

A job is one line of JSON: `port`, `clients`, `users` (one request each, shared by the clients) and `path`, where the
bodies of all answers go, one a line, in the order of `users`. Its result is one line: `seconds` of the whole, `latency`
of every request in seconds, and `processor` seconds of this process. A request costs it about 0.1 ms: bytes are made
before the clock runs, and answers are read behind it.
"""

import json
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

TIMEOUT_S = 60.0
END_OF_HEAD = b"\r\n\r\n"


class Loop(NamedTuple):
    """What came of a closed loop."""

    seconds: float
    processor: float
    latency: list[float]
    answers: list[bytes]


class _Connection:
    """A client: one request at a time over one connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number, self.began, self.received = -1, 0.0, b""

    def ask(self, number: int, request: bytes) -> None:
        self.number, self.received, self.began = number, b"", time.perf_counter()
        self.socket.sendall(request)

    def answered(self) -> bytes | None:
        """The body, once all of it is there."""
        part = self.socket.recv(1 << 18)
        if not part:
            raise ConnectionError("the server closed the connection")
        self.received += part
        return body_of(self.received)


def body_of(received: bytes) -> bytes | None:
    """The body of a whole response, None where some of it is missing; ConnectionError for any status but 200."""
    end = received.find(END_OF_HEAD)
    if end < 0:
        return None
    head = received[:end].lower()
    where = head.find(b"content-length:")
    if not head.startswith(b"http/1.1 200") or where < 0:
        raise ConnectionError(f"not an answer: {received[:600]!r}")
    length = int(head[where + 15:].split(b"\r\n", 1)[0])
    body = received[end + len(END_OF_HEAD):]
    return body if len(body) >= length else None


def request_of(user: int) -> bytes:
    """The bytes that ask for a user's recommendations."""
    body = json.dumps({"user_id": user}).encode()
    return (b"POST /v1/recommend HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body)) + body


def closed_loop(port: int, clients: int, users: Sequence[int]) -> Loop:
    """Asks once for every user; each client sends its next request when it has its answer."""
    requests = [request_of(user) for user in users]
    latency, answers = [0.0] * len(users), [b""] * len(users)
    selector, waiting, asked = selectors.DefaultSelector(), 0, 0
    connections = [_Connection(port) for _ in range(min(clients, len(users)))]
    started, busy = time.perf_counter(), time.process_time()
    for connection in connections:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.ask(asked, requests[asked])
        asked, waiting = asked + 1, waiting + 1
    while waiting:
        ready = selector.select(TIMEOUT_S)
        if not ready:
            raise ConnectionError(f"no answer within {TIMEOUT_S:.0f} s")
        for key, _ in ready:
            connection: _Connection = key.data
            body = connection.answered()
            if body is None:
                continue
            latency[connection.number] = time.perf_counter() - connection.began
            answers[connection.number] = body
            waiting -= 1
            if asked < len(requests):
                connection.ask(asked, requests[asked])
                asked, waiting = asked + 1, waiting + 1
    spent = time.perf_counter() - started, time.process_time() - busy
    for connection in connections:
        connection.socket.close()
    return Loop(*spent, latency, answers)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The result of one job."""
    loop = closed_loop(job["port"], job["clients"], job["users"])
    with open(job["path"], "wb") as file:
        file.write(b"\n".join(loop.answers))
    return {"seconds": loop.seconds, "processor": loop.processor, "latency": loop.latency}


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
