"""Bounded open-loop load on a served cascade; every answer is held against what the version it names gives in process.

The world is that of the tests (tests/tiny_world.py): three stages, 120 items, 25 users with histories, and five that
only their events are known of.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from raycascade.bundle import load_bundle
from raycascade.errors import NotReady
from raycascade.serving.gateway import Gateway
from raycascade.serving.options import ServeOptions
from raycascade.serving.requests import Query
from raycascade.serving.stages import LocalStage, OneRequest, StageServer, Survivors
from raycascade.serving.users import NewEvent
from tests.tiny_world import DAY_MS, START_MS, item_id

END_MS = START_MS + 7 * DAY_MS
READERS = (*range(100, 125), *range(901, 906))  # the log knows the former, events alone the latter
WRITERS: tuple[int, ...] = (801, 802, 803, 804)  # each sends its events in turn, each until it is taken
SHARE_OF_EVENTS = 0.05  # of the load: events that were taken before, which must change nothing
CLIENT_S = 30.0  # the most that a client waits
CALIBRATION_S, SHARE_OF_MOST = 4.0, 0.5
Body = dict[str, Any]


def event(user: int, number: int) -> Body:
    """The event of that number of a user."""
    return {"event_id": f"e{number}", "user_id": user, "item_id": item_id((7 * number + user) % 120),
            "time_ms": END_MS + number, "features": {"action": "skip" if number % 3 else "click"}}


def events_before() -> list[Body]:
    """What readers did before the load begins."""
    return [event(user, number) for user in READERS for number in range(6)]


# ---------------------------------------------------------------- what is right
class _Away(LocalStage):
    async def run(self, request: OneRequest, before: Survivors | None, *, deadline: float) -> Survivors:
        raise NotReady("away")


@dataclass
class Right:
    """What a version answers in process. `items[user, heard][stage]`: the items of a user where the store was `heard`
    or not, without that stage (None: a whole answer)."""

    version: str
    items: dict[tuple[int, bool], dict[str | None, list[Any]]] = field(default_factory=dict)


async def right_answers(uri: str, events: Iterable[Body], users: Iterable[int]) -> Right:
    """Computed by the bundle in this process, from the events."""
    bundle = load_bundle(uri)
    options = ServeOptions(deadline_ms=60_000)
    servers = {name: StageServer(bundle, name) for name in bundle.cascade.names}
    whole = Gateway(bundle, {name: LocalStage(server) for name, server in servers.items()}, options)
    popular = Gateway(bundle, {name: _Away(server) for name, server in servers.items()}, options, users=whole.users)
    await whole.users.append([NewEvent.model_validate(one) for one in events], timeout_s=60.0)
    right, names = Right(bundle.version), bundle.cascade.names
    for user in users:
        for heard in (True, False):
            query = Query(user_id=user, trace=True) if heard else Query(user_id=user, trace=True, history=[])
            answer, bare = await whole.recommend(query), await popular.recommend(query)
            passed = [items_of(bare), *([one.item_id for one in stage.items] for stage in answer.trace or ())]
            most = len(passed[-1])
            right.items[user, heard] = {name: order[:most] for name, order in zip(names, passed, strict=False)}
            right.items[user, heard][None] = items_of(answer)
    return right


def items_of(answer: Any) -> list[Any]:
    """The items of an answer object, best first."""
    return [one.item_id for one in answer.items]


# ---------------------------------------------------------------- what came
@dataclass(frozen=True)
class Failure:
    """A request that was not answered as it should be, and when (`time.monotonic()`). `status` 0: no answer at all."""

    kind: str
    began_s: float
    ended_s: float
    status: int
    what: str


@dataclass
class Tally:
    """Counts of what came. `unheard`: whole answers without the user store."""

    sent: int = 0
    held_back: int = 0  # since as many as allowed were on their way
    statuses: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    degraded: Counter[str] = field(default_factory=Counter)
    unheard: int = 0
    whole_in_a_row: int = 0
    failures: list[Failure] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    good: list[tuple[float, float]] = field(default_factory=list)  # begin and end of answered recommendations

    def percentile_ms(self, share: float) -> float:
        """Of the answered recommendations."""
        return 1000 * sorted(self.seconds)[int(share * (len(self.seconds) - 1))] if self.seconds else 0.0


class Load(AbstractAsyncContextManager["Load"]):
    """Requests at moments of a clock, `rate` a second, at most `most` on their way: what comes beyond that is not sent,
    but counted. `needs`: a version that requests of now must get (None: any of those that are known)."""

    def __init__(self, url: str, rights: Iterable[Right], *, rate: float, most: int = 48, seed: int = 1) -> None:
        self.tally, self.rate = Tally(), rate
        self.needs: str | None = None
        self._url, self._most = url, most
        self._rights = {right.version: right for right in rights}
        self._draw = random.Random(seed)
        self._session = session()
        self._running: set[asyncio.Task[None]] = set()
        self._clock: list[asyncio.Task[None]] = []
        self.written = dict.fromkeys(WRITERS, 0)
        self._ended = False

    async def __aenter__(self) -> "Load":
        self._clock = [asyncio.create_task(self._tick()), *(asyncio.create_task(self._write(user)) for user in WRITERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        await asyncio.gather(*self._clock)
        await asyncio.gather(*self._running)
        await self._session.close()

    async def until(self, holds: "Callable[[Tally], bool]", *, timeout_s: float) -> None:
        """Goes on until something holds of what came; TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not holds(self.tally):
                await asyncio.sleep(0.02)

    async def more(self, count: int, *, timeout_s: float = 120.0) -> None:
        """Goes on until so many more are answered."""
        goal = len(self.tally.good) + count
        await self.until(lambda tally: len(tally.good) >= goal, timeout_s=timeout_s)

    async def _tick(self) -> None:
        at = time.monotonic()
        while not self._ended:
            at += 1 / self.rate
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            if len(self._running) >= self._most:
                self.tally.held_back += 1
                continue
            work = self._repeat() if self._draw.random() < SHARE_OF_EVENTS else self._ask(self._draw.choice(READERS))
            task = asyncio.create_task(work)
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _sent(self, kind: str, path: str, body: Body) -> tuple[int, Any, float]:
        """Status, answer and the moment when it began; 0 and None where there was none. What is not 200 is noted."""
        began, status, answer, what = time.monotonic(), 0, None, ""
        self.tally.sent += 1
        try:
            async with self._session.post(self._url + path, json=body) as reply:
                status = reply.status
                if status == 200:
                    answer = await reply.json()
                else:
                    what = (await reply.text())[:300]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            status, what = 0, repr(error)[:300]
        self.tally.statuses[f"{kind} {status}"] += 1
        if answer is None:
            self.tally.failures.append(Failure(kind, began, time.monotonic(), status, what))
            self.tally.whole_in_a_row = 0
        return status, answer, began

    async def _ask(self, user: int) -> None:
        needed = self.needs
        _, answer, began = await self._sent("recommend", "/v1/recommend", {"user_id": user})
        if answer is None:
            return
        tally, ended = self.tally, time.monotonic()
        tally.seconds.append(ended - began)
        tally.good.append((began, ended))
        tally.versions[answer["version"]] += 1
        lacks = answer.get("degraded_at")
        heard = answer["user_source"] != "unavailable"
        right = self._rights.get(answer["version"])
        wanted = right.items[user, heard].get(lacks) if right else None
        items = [one["item_id"] for one in answer["items"]]
        flagged = answer["degraded"] == (lacks is not None) == ("reason" in answer)
        if items != wanted or not flagged or (needed is not None and answer["version"] != needed):
            tally.wrong.append(f"user {user}: {str(answer)[:600]}, wanted {wanted} of {needed or 'any version'}")
        if lacks is not None:
            tally.degraded[f"{lacks}: {answer['reason']}"] += 1
        tally.unheard += not heard
        tally.whole_in_a_row = tally.whole_in_a_row + 1 if lacks is None and heard else 0

    async def _repeat(self) -> None:
        before = [event(self._draw.choice(READERS), number) for number in range(2)]
        _, answer, _ = await self._sent("events", "/v1/events", {"events": before})
        if answer is not None and answer != {"accepted": 0, "duplicates": 2}:
            self.tally.wrong.append(f"events that were known: {answer}")

    async def _write(self, user: int) -> None:
        while not self._ended:
            number = self.written[user]
            _, answer, _ = await self._sent("events", "/v1/events", {"events": [event(user, number)]})
            if answer is not None:
                self.written[user] += 1
            await asyncio.sleep(0.25)


def session() -> aiohttp.ClientSession:
    """A client with as many connections as it needs."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0),
                                 timeout=aiohttp.ClientTimeout(total=CLIENT_S))


async def posted(url: str, path: str, body: Body) -> Body:
    """The answer to one request that may be made again; RuntimeError with the problem after CLIENT_S."""
    until = time.monotonic() + CLIENT_S
    async with session() as client:
        while True:
            async with client.post(url + path, json=body) as reply:
                if reply.status == 200:
                    return await reply.json()
                problem = await reply.text()
            if reply.status != 503 or time.monotonic() > until:
                raise RuntimeError(f"{path}: {reply.status} {problem}")
            await asyncio.sleep(0.2)


async def ready(url: str) -> bool:
    """Whether every stage answers."""
    with suppress(aiohttp.ClientError, TimeoutError, OSError):
        async with session() as client, client.get(f"{url}/readyz") as reply:
            return reply.status == 200
    return False


async def bearable(url: str, rate: float) -> float:
    """The rate, or half of what eight clients get who ask one after the other, if that is less."""
    until, answered = time.monotonic() + CALIBRATION_S, 0

    async def ask(client: aiohttp.ClientSession) -> None:
        nonlocal answered
        while time.monotonic() < until:
            async with client.post(f"{url}/v1/recommend", json={"user_id": READERS[answered % len(READERS)]}) as reply:
                await reply.read()
                answered += 1

    async with session() as client:
        await asyncio.gather(*(ask(client) for _ in range(8)))
    return min(rate, SHARE_OF_MOST * answered / CALIBRATION_S)


async def written_wrong(url: str, uri: str, written: dict[int, int]) -> list[str]:
    """What is wrong with the users who kept writing, now that each of their events was taken once."""
    events = [event(user, number) for user, count in written.items() for number in range(count)]
    right = await right_answers(uri, events, written)
    found = []
    for user in written:
        answer = await posted(url, "/v1/recommend", {"user_id": user})
        items = [one["item_id"] for one in answer["items"]]
        if answer["version"] == right.version and items != right.items[user, True][None]:
            found.append(f"user {user} after {written[user]} events: {items}")
    return found
