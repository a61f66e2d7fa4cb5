"""Not waiting for a stage that does not answer: after some failures in a row it is asked by one call at a time."""

import time
from collections.abc import Callable

FAILURES, PAUSE_S = 3, 0.25


class Breaker:
    """Closed: every call may go. Open, after `failures` in a row: one call in `pause_s` seconds may, to find out
    whether it is back; the others are told at once, instead of spending their time on it. Any success closes it."""

    def __init__(
        self, *, failures: int = FAILURES, pause_s: float = PAUSE_S, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._pause_s, self._clock_s = failures, pause_s, clock_s
        self._failures = 0
        self._next_s = 0.0

    def allows(self) -> bool:
        """Whether a call may go; one that may has to be reported."""
        if self._failures < self._most:
            return True
        if self._clock_s() < self._next_s:
            return False
        self._next_s = self._clock_s() + self._pause_s
        return True

    def succeeded(self) -> None:
        """A call was answered, whatever the answer was."""
        self._failures = 0

    def failed(self) -> None:
        """A call was not answered."""
        self._failures += 1
        if self._failures == self._most:
            self._next_s = self._clock_s() + self._pause_s
