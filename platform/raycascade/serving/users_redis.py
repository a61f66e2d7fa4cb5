"""Users in a Redis server (6.2 or later), shared by any number of gateway replicas.

    <namespace>:<kind of user ids>:<kind of item ids>:{<user id as JSON>}:
        user    hash, what `users load` wrote: features (JSON object), exclude (JSON list of item ids), past (JSON list
                of the events of the whole history), at_ms (the moment of all that)
        events  list of the events that came in while serving, as JSON in order of time
        seen    sorted set: item id as JSON, by the moment when it was seen first
        ids     sorted set: event ids, by the moment when they arrived; expires as a whole

An event is [time_ms, item id] or [time_ms, item id, {features}], with time_ms 0 where it is not known.
Everything is raw and in JSON, which people can read and every language writes, and which is smaller than an Arrow
stream for the tens of events of a user. Keys of a user share a hash slot. Event ids are compared within a user.
"""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from raycascade.errors import ConfigError
from raycascade.serving.users import (
    MOST_EVENT_IDS,
    IdKinds,
    NewEvent,
    PastEvent,
    RawId,
    Recorded,
    StoreUnavailable,
    UserState,
    unix_ms,
)
from raycascade.serving.users_scripts import APPEND, FETCH, LOAD, SCRIPTS, Script

try:
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import (
        ConnectionError as RedisConnectionError,
        NoScriptError,
        RedisError,
        TimeoutError as RedisTimeoutError,
    )
except ModuleNotFoundError as error:
    raise ConfigError("users.store: redis needs the package redis; install raycascade[redis]") from error

logger = logging.getLogger(__name__)
SCHEMES = ("redis", "rediss", "unix")
MOST_CONNECTIONS = 32  # of one replica
FAILURES_TO_OPEN = 3  # in a row, before requests stop to ask
PROBE_S = 0.5  # between two looks at a server that does not answer
PROBE_TIMEOUT_S = 1.0
SILENT_S = 60.0  # between two lines of the log that say why a server refuses
COMPACT = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False)


class Call(NamedTuple):
    """A script with its keys and arguments."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[str | int]


class LoadedUser(NamedTuple):
    """What `users load` knows of one user at a moment: JSON by the names of the fields; those left out stay as they
    are."""

    user_id: RawId
    at_ms: int
    fields: Mapping[str, str]


class RedisUserStore:
    """Users in Redis. No call waits longer than `timeout_s`; after a few failures in a row none waits at all, until the
    server answers a probe in the background. Belongs to one event loop."""

    def __init__(
        self, url: str, kinds: IdKinds, *, namespace: str, history_len: int, exclude_len: int, dedup_s: float,
        timeout_s: float, now_ms: Callable[[], int] = unix_ms,
    ) -> None:
        url = resolve_url(url)
        self.address = redacted(url)
        self._kinds, self._now_ms = kinds, now_ms
        self._prefix = f"{namespace}:{kinds.users}:{kinds.items}:"
        self._history_len, self._exclude_len, self._dedup_ms = history_len, exclude_len, int(dedup_s * 1000)
        self._timeout_s = timeout_s
        # One more attempt, at once: a connection of the pool may have died while nobody used it.
        retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        try:
            self._redis = Redis.from_pool(BlockingConnectionPool.from_url(
                url, max_connections=MOST_CONNECTIONS, timeout=timeout_s, retry=retry, protocol=2))
        except (ValueError, TypeError):  # their messages may repeat the URL
            raise ConfigError(f"users.url: {self.address} cannot be used; see the options of redis-py's from_url"
                              "") from None
        self._failures = 0
        self._open = False
        self._silent_until = 0.0
        self._probing: asyncio.Task[None] | None = None

    async def fetch(self, user_ids: Sequence[RawId], *, timeout_s: float) -> list[UserState | None]:
        """The state of each user in one round trip, None for one that the server does not know; StoreUnavailable."""
        with_seen = "1" if self._exclude_len else "0"
        calls = [Call(FETCH, self._keys(user_id, "user", "events", "seen"), (with_seen,)) for user_id in user_ids]
        found = await self.call(calls, timeout_s=timeout_s)
        return [_state(*fields, history_len=self._history_len) for fields in found]

    async def append(self, events: Sequence[NewEvent], *, timeout_s: float) -> Recorded:
        """Adds events in one round trip, those of a user as one. StoreUnavailable: some users may have theirs."""
        by_user: dict[RawId, list[NewEvent]] = {}
        for event in events:
            by_user.setdefault(self._kinds.user(event.user_id), []).append(event)
        now = self._now_ms()
        calls = []
        for user_id, own in by_user.items():
            arguments: list[str | int] = [self._history_len, self._exclude_len, self._dedup_ms, MOST_EVENT_IDS]
            for event in own:
                item_id, time_ms = self._kinds.item(event.item_id), now if event.time_ms is None else event.time_ms
                arguments += [event.event_id, time_ms, event_json(item_id, time_ms, event.features), as_json(item_id)]
            calls.append(Call(APPEND, self._keys(user_id, "events", "seen", "ids"), arguments))
        accepted = sum(await self.call(calls, timeout_s=timeout_s))
        return Recorded(accepted=accepted, duplicates=len(events) - accepted)

    async def load(self, users: Sequence[LoadedUser], *, timeout_s: float) -> int:
        """Writes users in one round trip; how many were not older than what is held. StoreUnavailable."""
        calls = [Call(LOAD, self._keys(user.user_id, "user"), (user.at_ms, *chain(*user.fields.items())))
                 for user in users]
        return sum(await self.call(calls, timeout_s=timeout_s, patient=True))

    async def ready(self) -> bool:
        """Whether the server answers now."""
        return not self._open and await self._answers()

    async def note(self, name: str, value: str | None) -> None:
        """Notes how far a load has come, for a week; None forgets it. StoreUnavailable."""
        key = f"{self._prefix}load:{name}"
        await self._asked(self._redis.delete(key) if value is None else self._redis.set(key, value, ex=7 * 86_400))

    async def noted(self, name: str) -> str | None:
        """What was noted; None if nothing was."""
        found = await self._asked(self._redis.get(f"{self._prefix}load:{name}"))
        return None if found is None else found.decode()

    async def close(self) -> None:
        """Ends the connections, and the task that looks whether the server is back."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
            self._probing = None
        await self._redis.aclose(close_connection_pool=True)

    def _keys(self, user_id: RawId, *names: str) -> list[str]:
        one = f"{self._prefix}{{{as_json(self._kinds.user(user_id))}}}:"
        return [one + name for name in names]

    # ---- the server, its failures
    async def call(self, calls: Sequence[Call], *, timeout_s: float, patient: bool = False) -> list[Any]:
        """The replies of scripts, in one round trip. StoreUnavailable at once while the server does not answer.
        `patient`: the store's own limit does not hold."""
        if not calls:
            return []
        if self._open:
            raise StoreUnavailable(f"the user store at {self.address} does not answer; it is asked again every "
                                   f"{PROBE_S:g} s", "open")
        allowed_s = max(0.0, timeout_s if patient else min(timeout_s, self._timeout_s))
        try:
            async with asyncio.timeout(allowed_s):
                replies = await self._pipelined(calls)
        except TimeoutError:
            raise self._failed("timeout", f"no answer within {allowed_s * 1000:.0f} ms",
                               counts=allowed_s >= self._timeout_s) from None
        except (RedisError, OSError) as error:
            raise self._failed(_reason(error), _words(error)) from None
        self._failures = 0
        return replies

    async def _pipelined(self, calls: Sequence[Call]) -> list[Any]:
        replies = await self._sent(calls)
        unheard = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unheard:  # the server was started since
            for sha in {calls[at].script.sha for at in unheard}:
                await self._redis.script_load(SCRIPTS[sha].text)
            for at, reply in zip(unheard, await self._sent([calls[at] for at in unheard]), strict=True):
                replies[at] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _sent(self, calls: Sequence[Call]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for script, keys, arguments in calls:
                pipeline.evalsha(script.sha, len(keys), *keys, *arguments)
            return await pipeline.execute(raise_on_error=False)  # the message would repeat what was sent

    async def _asked(self, command: Any) -> Any:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await command
        except (RedisError, OSError) as error:
            raise self._failed(_reason(error), _words(error)) from None

    def _failed(self, reason: str, words: str, *, counts: bool = True) -> StoreUnavailable:
        """The error to raise. An answer that refuses costs no time, and may be about one user: it shuts nobody out."""
        if reason == "refused":
            if time.monotonic() >= self._silent_until:
                self._silent_until = time.monotonic() + SILENT_S
                logger.warning("the user store at %s refuses: %s", self.address, words)
        elif counts:
            self._failures += 1
        if self._failures >= FAILURES_TO_OPEN and not self._open:
            self._open = True
            self._probing = asyncio.get_running_loop().create_task(self._probe())
            logger.warning("the user store at %s does not answer (%s); histories are empty until it does", self.address,
                           words)
        return StoreUnavailable(f"the user store at {self.address}: {words}; check that it runs and lets this user in",
                                reason)

    async def _probe(self) -> None:
        """Waits in the background until the server answers."""
        down_since = time.monotonic()
        while True:
            await asyncio.sleep(PROBE_S)
            if await self._answers():
                break
        self._failures, self._open = 0, False
        logger.warning("the user store at %s answers again after %.1f s", self.address, time.monotonic() - down_since)

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return bool(await self._redis.ping())
        except (RedisError, OSError):
            return False


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return "timeout"
    return "connection" if isinstance(error, RedisConnectionError | OSError) else "refused"


def _words(error: Exception) -> str:
    """What a server or a socket said, without what it was asked."""
    return " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__


def _state(
    features: bytes | None, exclude: bytes | None, past: bytes | None, since: bytes, seen: bytes, *, history_len: int
) -> UserState | None:
    events, loaded, flat = _events(since), _events(past or b"[]"), json.loads(seen)
    if features is None and exclude is None and past is None and not events and not flat:
        return None
    if loaded:  # it may know events already that came in while serving
        held = {(event.item_id, event.time_ms) for event in loaded}
        events = loaded + [event for event in events if (event.item_id, event.time_ms) not in held]
        events.sort(key=lambda event: event.time_ms)
    return UserState(features=json.loads(features or b"{}"), events=tuple(events[-history_len:]),
                     exclude=tuple(json.loads(exclude or b"[]")), seen=tuple(zip(flat[::2], flat[1::2], strict=True)),
                     whole=past is not None)


def _events(text: bytes) -> list[PastEvent]:
    return [PastEvent(item_id, time_ms, rest[0] if rest else {}) for time_ms, item_id, *rest in json.loads(text)]


# ---------------------------------------------------------------- JSON and URLs
def as_json(value: Any) -> str:
    """Compact JSON on one line, the same for equal values."""
    return COMPACT.encode(value)


def event_json(item_id: RawId, time_ms: int, features: Any) -> str:
    """An event as it stands in the list of a user; features that are null are left out."""
    known = {name: value for name, value in features.items() if value is not None}
    return as_json([time_ms, item_id, known] if known else [time_ms, item_id])


def resolve_url(url: str) -> str:
    """The URL itself, or of env:NAME what the variable holds; ConfigError where it is no URL of Redis."""
    if url.startswith("env:"):
        name = url.removeprefix("env:")
        if not os.environ.get(name):
            raise ConfigError(f"users.url: {url}: the environment variable {name} is not set; set it to the URL of "
                              "Redis")
        url = os.environ[name]
    if not re.match(rf"({'|'.join(SCHEMES)})://.", url):
        scheme = url.partition("://")[0] if "://" in url else "no scheme"
        raise ConfigError(f"users.url: got {scheme[:20]!r}; give redis://, rediss:// (TLS), unix:// or env:NAME")
    return url


def redacted(url: str) -> str:
    """The URL without user, password and options, for people. Of one that cannot be taken apart for certain, such as
    with a "/" in the password, only the scheme is left."""
    scheme, _, _ = url.partition("://")
    try:
        parts = urlsplit(url)
        place = parts.path if scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}{parts.path.rstrip('/')}"
    except ValueError:
        return f"{scheme}://..."
    behind = parts.path + parts.query + parts.fragment
    return f"{scheme}://..." if "@" in behind or parts.fragment or not (parts.hostname or scheme == "unix") else (
        f"{scheme}://{place}")
