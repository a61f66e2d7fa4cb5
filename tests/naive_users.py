"""Users as a list of all events that ever came, from which every state is worked out anew: the oracle of the stores."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import strategies as st

from raycascade.serving.users import NewEvent, PastEvent, RawId, UserState, UserStore

T = TypeVar("T")
HISTORY_LEN, EXCLUDE_LEN = 5, 4


@dataclass
class NaiveUsers:
    """Ids are integers. No id of an event is ever forgotten."""

    history_len: int = HISTORY_LEN
    exclude_len: int = EXCLUDE_LEN
    came: list[NewEvent] = field(default_factory=list)

    def append(self, events: list[NewEvent]) -> tuple[int, int]:
        """How many are new, and how many are not."""
        before = len(self.came)
        for event in events:
            known = {(int(one.user_id), one.event_id) for one in self.came}
            self.came += [] if (int(event.user_id), event.event_id) in known else [event]
        return len(self.came) - before, len(events) - (len(self.came) - before)

    def state(self, user_id: RawId) -> UserState | None:
        """What is held of a user: the last events in order of time, and the items that were first seen last."""
        own = [event for event in self.came if int(event.user_id) == int(user_id)]
        if not own:
            return None
        history: list[PastEvent] = []
        seen: dict[int, int] = {}
        for event in own:  # a bound that is applied at once forgets what a later event would have brought back
            features = {name: value for name, value in event.features.items() if value is not None}
            history.append(PastEvent(int(event.item_id), event.time_ms or 0, features))
            history = sorted(history, key=lambda past: past.time_ms)[-self.history_len:]
            if self.exclude_len:
                item = int(event.item_id)
                seen[item] = min(seen.get(item, 1 << 60), event.time_ms or 0)
                newest = sorted(seen, key=lambda one: (seen[one], str(one)))[-self.exclude_len:]
                seen = {one: seen[one] for one in newest}
        return UserState(events=tuple(history), seen=tuple(seen.items()))


def same(found: UserState | None, wanted: UserState | None) -> bool:
    """Equal, whatever the order of what was seen."""
    if found is None or wanted is None:
        return found is wanted
    return (found.events, dict(found.seen), found.exclude, found.whole) == (
        wanted.events, dict(wanted.seen), wanted.exclude, wanted.whole)


users = st.sampled_from([1, "1", 2, "03", 3])
new_events = st.builds(
    NewEvent, event_id=st.text("abc", min_size=1, max_size=2), user_id=users, item_id=st.sampled_from(
        [7, "7", 8, 9, 10, *range(100, 108)]), time_ms=st.integers(1, 12), features=st.sampled_from(
        [{}, {"action": "click"}, {"action": None}, {"action": "n\u00e4\n\"]"}, {"weight": 0.1, "action": 1 << 62}]))
batches = st.lists(st.lists(new_events, max_size=6), max_size=8)


async def replay(store: UserStore, sent: list[list[NewEvent]], naive: NaiveUsers) -> None:
    """Sends batches to a store and to the oracle, and compares all they say."""
    for events in sent:
        recorded = await store.append(events, timeout_s=60.0)
        assert (recorded.accepted, recorded.duplicates) == naive.append(events)
        for user_id, found in zip([1, 2, 3, 4], await store.fetch(["1", 2, 3, 4], timeout_s=60.0), strict=True):
            assert same(found, naive.state(user_id)), (user_id, found, naive.state(user_id))


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that must end soon."""
    async def bounded() -> T:
        async with asyncio.timeout(300):
            return await work

    return asyncio.run(bounded())
