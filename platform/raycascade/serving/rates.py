"""Requests per second: a token bucket for every key, in the memory of one gateway replica."""

import time
from collections.abc import Callable


class TokenBucket:
    """Holds `burst` tokens at most and gains `per_second`; a request takes one."""

    def __init__(self, *, per_second: float, burst: float, now_s: float) -> None:
        assert per_second > 0, per_second
        assert burst >= 1, burst
        self.per_second, self.burst = per_second, burst
        self._tokens, self._at_s = burst, now_s

    def take(self, now_s: float) -> float:
        """0.0, and a token is gone; or the seconds until there is one, and nothing has changed."""
        self._fill(now_s)
        if self._tokens < 1:
            return (1 - self._tokens) / self.per_second
        self._tokens -= 1
        return 0.0

    def owe(self, tokens: int, now_s: float) -> None:
        """Takes tokens that may not be there yet; later requests wait until the debt is paid."""
        self._fill(now_s)
        self._tokens -= tokens

    def _fill(self, now_s: float) -> None:
        self._tokens = min(self.burst, self._tokens + (now_s - self._at_s) * self.per_second)
        self._at_s = now_s


class Rates:
    """The buckets of all who ask, by name. A name whose rate has changed starts with a full bucket."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, name: str, *, per_second: float, burst: float | None = None) -> float:
        """Seconds until `name` may ask (0.0: now). `per_second` 0 is no limit; `burst` None is a second's worth."""
        if per_second <= 0:
            self._buckets.pop(name, None)
            return 0.0
        most, now_s = max(1.0, per_second if burst is None else burst), self._clock_s()
        bucket = self._buckets.get(name)
        if bucket is None or (bucket.per_second, bucket.burst) != (per_second, most):
            bucket = self._buckets[name] = TokenBucket(per_second=per_second, burst=most, now_s=now_s)
        return bucket.take(now_s)

    def owe(self, name: str, tokens: int) -> None:
        """Counts what one request asked for beyond its first: a batch weighs as much as its queries one by one."""
        if name in self._buckets and tokens > 0:
            self._buckets[name].owe(tokens, self._clock_s())
