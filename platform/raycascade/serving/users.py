"""What is known of users between requests: their raw features, their past, and the events that come in while serving.

A `UserStore` holds raw ids and raw values, so that it outlives the bundle that is served; `user_rows.py` makes encoded
requests of them with the bundle of the moment. `EmbeddedUserStore` stands here, `RedisUserStore` in `users_redis.py`.
"""

import bisect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field as Option, StrictInt, StrictStr

from raycascade.bundle import Bundle
from raycascade.errors import DataError, NotReady
from raycascade.features import FeatureState
from raycascade.schema import AgeFeature, DenseFeature, Feature, IdFeature, IdsFeature, VectorFeature, near_miss
from raycascade.serving.options import UsersOptions
from raycascade.serving.requests import Id, Name, Value, ids_as

MOST_AHEAD_MS = 86_400_000  # an event may be so far in the future, where the sender's clock is wrong
MOST_EVENT_BYTES = 4_096  # of its features as JSON
MOST_EVENT_IDS = 10_000  # remembered of one user, the newest
MOST_NUMBER = 3.4e38  # of a vector, which is kept in float32
MOST_USERS = 100_000  # that an embedded store holds events of; those heard of last stay

RawId = int | str


class NewEvent(BaseModel):
    """Something that a user did with an item, once for each `event_id` and user."""

    model_config = ConfigDict(extra="forbid")
    event_id: Annotated[StrictStr, Option(min_length=1, max_length=128)]
    user_id: Id
    item_id: Id
    time_ms: Annotated[StrictInt, Option(ge=0, lt=1 << 53)] | None = None  # None: when it arrives
    features: dict[Name, Value] = {}
    # Of the answer that showed the item: the traffic log then credits it alone.
    request_id: Annotated[StrictStr, Option(min_length=1, max_length=128)] | None = None


class Recorded(BaseModel):
    """How many events were new, and how many had come before."""

    accepted: int
    duplicates: int


class PastEvent(NamedTuple):
    """An event of a user's past. `time_ms` is 0 where it is not known."""

    item_id: RawId
    time_ms: int
    features: Mapping[str, Any]


@dataclass(frozen=True)
class UserState:
    """What a store holds of one user, everything raw.

    `events` are in order of time. If they are the `whole` history, what the bundle's users table holds does not count;
    otherwise they continue it. `exclude`: items that must not be recommended; `seen`: items of events and when each was
    seen first, which are excluded too where the training log excludes what was seen.
    """

    features: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[PastEvent, ...] = ()
    exclude: tuple[RawId, ...] = ()
    seen: tuple[tuple[RawId, int], ...] = ()
    whole: bool = False


class StoreUnavailable(NotReady):
    """The store does not answer in time or at all. `reason`: timeout, connection, refused (it answered with an error),
    or open (it has not answered lately, so that it was not asked)."""

    def __init__(self, message: str, reason: str = "connection") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class UserStore(Protocol):
    """Users by raw id. Ids are compared in the types of the training log: "7" is 7 where its ids are integers."""

    async def fetch(self, user_ids: Sequence[RawId], *, timeout_s: float) -> list[UserState | None]:
        """The state of each user, None for one that the store does not know; StoreUnavailable."""
        ...

    async def append(self, events: Sequence[NewEvent], *, timeout_s: float) -> Recorded:
        """Adds events, each once, however often and by whomever it is sent. StoreUnavailable: some may be recorded; the
        same events can be sent again."""
        ...

    async def ready(self) -> bool:
        """Whether the store answers."""
        ...

    async def close(self) -> None:
        """Ends connections and tasks."""
        ...


def open_user_store(options: UsersOptions, bundle: Bundle) -> UserStore:
    """The store that the options name, for the id types of a bundle; ConfigError where it cannot be. It keeps what
    users have seen where the bundle's log excludes that; logs of whole requests say themselves what each excludes, so
    that events add nothing to it."""
    kinds = IdKinds.of(bundle)
    exclude_len = options.exclude_len if bundle.excludes_seen else 0
    if options.store == "embedded":
        return EmbeddedUserStore(kinds, history_len=options.history_len, exclude_len=exclude_len,
                                 dedup_s=options.dedup_s)
    from raycascade.serving.users_redis import RedisUserStore

    return RedisUserStore(options.url, kinds, namespace=options.namespace, history_len=options.history_len,
                          exclude_len=exclude_len, dedup_s=options.dedup_s, timeout_s=options.timeout_ms / 1000)


# ---------------------------------------------------------------- ids and events at the door
class IdKinds(NamedTuple):
    """What ids are in the training log. A store speaks of users in these terms, and of none of other ones."""

    users: Literal["int", "text"]
    items: Literal["int", "text"]

    @classmethod
    def of(cls, bundle: Bundle) -> "IdKinds":
        """Those of a bundle."""
        return cls(kind_of(bundle.users.table["user_key"].type), kind_of(bundle.items.keys.type))

    def user(self, user_id: RawId) -> RawId:
        """A user's id in its type, or as it is where it cannot be of that type."""
        return _typed(user_id, self.users)

    def item(self, item_id: RawId) -> RawId:
        """The same for an item."""
        return _typed(item_id, self.items)


def kind_of(kind: pa.DataType) -> Literal["int", "text"]:
    """What ids of an Arrow type are; their width does not matter."""
    return "int" if pa.types.is_integer(kind) else "text"


def _typed(value: RawId, kind: str) -> RawId:
    (typed,) = ids_as([value], pa.int64() if kind == "int" else pa.string())
    return value if typed is None else typed


def unix_ms() -> int:
    """Now."""
    return time.time_ns() // 1_000_000


def check_events(events: Sequence[NewEvent], bundle: Bundle, *, now_ms: int | None = None) -> None:
    """DataError names the event that says what the log of the bundle does not know, that lies in the future, or that is
    too large. An item that the catalogue does not hold is no error: a later bundle may know it."""
    latest_ms = (unix_ms() if now_ms is None else now_ms) + MOST_AHEAD_MS
    known = event_features(bundle.state)
    for position, event in enumerate(events):
        where = f"events.{position}"
        if event.time_ms is not None and event.time_ms > latest_ms:
            raise DataError(f"{where}.time_ms: {event.time_ms} is more than a day ahead of this server's clock; send "
                            "Unix milliseconds, or leave it out")
        for name, value in event.features.items():
            if name not in known:
                raise DataError(f"{where}.features.{name}: no such event feature{near_miss(name, set(known))}")
            if not fits(value, known[name]):
                shown = json.dumps(value)[:80]
                raise DataError(f"{where}.features.{name}: expected {_expected(known[name])}, got {shown}")
        if (size := len(json.dumps(event.features))) > MOST_EVENT_BYTES:
            raise DataError(f"{where}.features: {size} bytes, at most {MOST_EVENT_BYTES} are kept; send less")


def event_features(state: FeatureState) -> dict[str, Feature]:
    """The features that an event brings itself, by name."""
    return {f.name: f for f in state.schema.side("event") if not isinstance(f, AgeFeature)}


def fits(value: Any, feature: Feature) -> bool:
    """Whether a raw value can be one of a feature; null can."""
    if value is None:
        return True
    if isinstance(feature, VectorFeature):
        return isinstance(value, list) and len(value) == feature.dim and all(
            isinstance(one, int | float) and abs(one) < MOST_NUMBER for one in value)
    if isinstance(feature, IdsFeature):
        return isinstance(value, list) and all(isinstance(one, int | str) for one in value)
    if isinstance(feature, DenseFeature):
        return isinstance(value, int | float)
    return isinstance(feature, IdFeature) and isinstance(value, int | str)


def _expected(feature: Feature) -> str:
    if isinstance(feature, VectorFeature):
        return f"a list of {feature.dim} numbers"
    if isinstance(feature, IdsFeature):
        return "a list of ids"
    return "a number" if isinstance(feature, DenseFeature) else "an id"


# ---------------------------------------------------------------- embedded
@dataclass(slots=True)
class _Held:
    events: list[PastEvent] = field(default_factory=list)
    seen: dict[RawId, int] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)  # event id -> arrival, in order of arrival


class EmbeddedUserStore:
    """Events in the memory of one process, gone with it; users are those of the bundle's users table. It never waits,
    and is for one event loop."""

    def __init__(
        self, kinds: IdKinds, *, history_len: int, exclude_len: int, dedup_s: float, most_users: int = MOST_USERS,
        now_ms: Callable[[], int] = unix_ms,
    ) -> None:
        self._kinds = kinds
        self._history_len, self._exclude_len, self._dedup_ms = history_len, exclude_len, int(dedup_s * 1000)
        self._most_users, self._now_ms = most_users, now_ms
        self._users: dict[RawId, _Held] = {}

    async def fetch(self, user_ids: Sequence[RawId], *, timeout_s: float) -> list[UserState | None]:
        """The events of each user since the process began; None where there are none."""
        del timeout_s
        found = [self._users.get(self._kinds.user(user_id)) for user_id in user_ids]
        return [held and UserState(events=tuple(held.events), seen=tuple(held.seen.items())) for held in found]

    async def append(self, events: Sequence[NewEvent], *, timeout_s: float) -> Recorded:
        """Adds events."""
        del timeout_s
        now = self._now_ms()
        accepted = sum(self._add(event, now) for event in events)
        while len(self._users) > self._most_users:
            del self._users[next(iter(self._users))]
        return Recorded(accepted=accepted, duplicates=len(events) - accepted)

    async def ready(self) -> bool:
        """Always."""
        return True

    async def close(self) -> None:
        """There is nothing to end."""

    def _add(self, event: NewEvent, now: int) -> bool:
        user_id = self._kinds.user(event.user_id)
        held = self._users[user_id] = self._users.pop(user_id, None) or _Held()  # the last in the order
        for event_id in [one for one, arrived in held.ids.items() if arrived <= now - self._dedup_ms]:
            del held.ids[event_id]
        if event.event_id in held.ids:
            return False
        held.ids[event.event_id] = now
        if len(held.ids) > MOST_EVENT_IDS:
            del held.ids[next(iter(held.ids))]
        item_id, time_ms = self._kinds.item(event.item_id), now if event.time_ms is None else event.time_ms
        features = {name: value for name, value in event.features.items() if value is not None}
        bisect.insort_right(held.events, PastEvent(item_id, time_ms, features), key=lambda past: past.time_ms)
        del held.events[:-self._history_len]
        if self._exclude_len:
            held.seen[item_id] = min(time_ms, held.seen.get(item_id, time_ms))
            if len(held.seen) > self._exclude_len:
                del held.seen[min(held.seen, key=lambda item: (held.seen[item], json.dumps(item)))]
        return True

