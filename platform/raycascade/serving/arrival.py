"""What the server notes of a request when it comes in, before anything of it is read: its id and the moment."""

import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Scope

from raycascade.serving.context import CLEAN_ID, RequestContext

NOTED = "raycascade.arrival"  # in the scope
REQUEST_ID = "x-request-id"


@dataclass(slots=True)
class Arrival:
    """One request. `at_s` is on the clock of `time.monotonic`, `received_ms` is Unix time; `key_name` is the name of
    the API key once that is known; `refused` says, in the words of the metrics, why the gateway never heard of it."""

    request_id: str
    at_s: float = field(default_factory=time.monotonic)
    received_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    key_name: str = ""
    refused: str = ""

    @property
    def seconds(self) -> float:
        """Since it came in."""
        return time.monotonic() - self.at_s

    def context(self, *, deadline_ms: int) -> RequestContext:
        """For the gateway: the time that was asked for counts from the arrival."""
        return RequestContext(self.request_id, self.at_s + deadline_ms / 1000, self.key_name, self.received_ms)


def note(scope: Scope) -> Arrival:
    """Notes a request; an id that the caller gave is kept where it may stand in a log as it is."""
    given = Headers(scope=scope).get(REQUEST_ID, "")
    arrival = scope[NOTED] = Arrival(given if CLEAN_ID.fullmatch(given) else uuid.uuid4().hex)
    return arrival


def arrival_of(scope: Scope) -> Arrival:
    """What was noted of a request."""
    return scope[NOTED]
