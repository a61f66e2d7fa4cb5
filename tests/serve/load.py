"""A steady light load on a served cascade, and what came back."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pyarrow as pa

from raycascade.bundle import Bundle

USERS = tuple(range(100, 112))
WAIT_S = 120.0


@dataclass
class Replies:
    """Counted by status, and by version and degradation; `wrong` are answers that no version would give, `unheard`
    whole answers without what the user store holds."""

    unheard: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    degraded: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[Any] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Load(AbstractContextManager["Load"]):
    """`clients` threads that ask one after the other, between `with` and its end. Whole answers are compared with those
    of the bundle of the version that they name."""

    def __init__(self, url: str, bundles: list[Bundle], *, clients: int = 2) -> None:
        self.replies = Replies()
        self._url = f"{url}/v1/recommend"
        self._expected = {bundle.version: {(user, heard): _answer(bundle, user, heard=heard) for user in USERS
                                           for heard in (True, False)} for bundle in bundles}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def until(self, holds: Callable[[Replies], bool]) -> None:
        """Goes on until something holds of the replies; AssertionError after WAIT_S."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with self._lock:
                if holds(self.replies):
                    return
            time.sleep(0.05)
        raise AssertionError(f"it did not come to that: {self.replies}")

    def more(self, count: int) -> None:
        """Goes on until so many more are answered."""
        goal = self.replies.statuses.total() + count
        self.until(lambda replies: replies.statuses.total() >= goal)

    def _ask(self, first: int) -> None:
        with httpx.Client(timeout=60.0) as client:
            position = first
            while not self._ended.is_set():
                user = USERS[position % len(USERS)]
                position += 1
                try:
                    reply = client.post(self._url, json={"user_id": user})
                except httpx.HTTPError as error:
                    with self._lock:
                        self.replies.failed.append(repr(error))
                    continue
                with self._lock:
                    self._note(user, reply)

    def _note(self, user: int, reply: httpx.Response) -> None:
        self.replies.statuses[reply.status_code] += 1
        if reply.status_code != 200:
            self.replies.failed.append(reply.text)
            return
        answer = reply.json()
        self.replies.versions[answer["version"]] += 1
        items = [item["item_id"] for item in answer["items"]]
        heard = answer["user_source"] != "unavailable"
        if answer["degraded"]:
            self.replies.degraded[answer["degraded_at"], answer["reason"]] += 1
            return
        self.replies.unheard += not heard
        if items != self._expected[answer["version"]][user, heard]:
            self.replies.wrong.append((user, answer))


def _answer(bundle: Bundle, user: int, *, heard: bool) -> list[object]:
    """Of a user without events; where the user store is not `heard`, without a history, too."""
    columns: dict[str, Any] = {"user_id": [user]}
    if not heard:
        columns["history"] = pa.array([[]], pa.list_(pa.int64()))
    final = bundle.recommend(bundle.encode(pa.table(columns))).final
    rows, mask = final.kept()
    return bundle.items.ids_of(rows[0][mask[0]])
