"""What goes with a request through the gateway: its id, its deadline and who asks."""

import re
import time
import uuid
from dataclasses import dataclass

CLEAN_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")  # what may stand in a log line as it is


@dataclass(frozen=True)
class RequestContext:
    """`deadline` is a moment of `time.monotonic()` in seconds, good in this process only: what travels is the time
    left. `key_name` is the name of the API key, never the key; `received_ms` is Unix time."""

    request_id: str
    deadline: float
    key_name: str = ""
    received_ms: int = 0

    @classmethod
    def new(cls, *, deadline_ms: int, request_id: str | None = None, key_name: str = "") -> "RequestContext":
        """A context for a request that arrives now. A `request_id` that is no clean token is replaced by a new one."""
        clean = request_id is not None and CLEAN_ID.fullmatch(request_id)
        return cls(request_id if request_id is not None and clean else uuid.uuid4().hex,
                   time.monotonic() + deadline_ms / 1000, key_name, int(time.time() * 1000))

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative behind it."""
        return self.deadline - time.monotonic()
