"""Errors a user can cause. The command line prints them as one line and exits with status 2.

    RaycascadeError
    |- ConfigError       a config, an override or a plug-in's options
    |- DataError         a raw log, an items table or a request
    |- ShardError        shards that are missing, unfinished or damaged
    |- BundleError       a bundle that is missing, damaged or of another version
    |- ExpectationError  a run that finished below the figures its config expects (exit status 1)
    |- ComparisonError   a comparison of which runs failed (exit status 1)
    |- ResourceError     work that a cluster cannot hold: its processes die again and again (exit status 1)
    `- ServingError      a request that cannot be answered now
       |- Overloaded        more requests than the queues hold: try again after `retry_after_s`
       |- DeadlineExceeded  the request's time was over before anything could be answered
       `- NotReady          what answers is not there yet, or gone

A message says what was wrong, what was seen and what to do. Our own bugs raise anything else.
"""


class RaycascadeError(Exception):
    """The root of every error that a user can cause and mend."""

    exit_status = 2


class ConfigError(RaycascadeError):
    """A config, an override on the command line or the options of a plug-in."""


class DataError(RaycascadeError):
    """A raw log, an items table or a single request."""


class ShardError(RaycascadeError):
    """Shards that are missing, unfinished or damaged."""


class BundleError(RaycascadeError):
    """A bundle that is missing, damaged or of another version or schema."""


class ExpectationError(RaycascadeError):
    """A run that finished, but below the figures its config expects."""

    exit_status = 1


class ComparisonError(RaycascadeError):
    """A comparison that finished, but some of its runs failed."""

    exit_status = 1


class ResourceError(RaycascadeError):
    """Work that the cluster cannot hold: its processes die, most often for memory."""

    exit_status = 1


class ServingError(RaycascadeError):
    """A request that cannot be answered now, through no fault of its own; the same one may be answered later."""

    exit_status = 1


class Overloaded(ServingError):
    """More requests than the bounded queues hold; `retry_after_s` (whole, at least 1) says when to come again."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return _overloaded, (str(self), self.retry_after_s)


def _overloaded(message: str, retry_after_s: int) -> Overloaded:
    return Overloaded(message, retry_after_s=retry_after_s)


class DeadlineExceeded(ServingError):
    """The request's deadline passed before anything could be answered."""


class NotReady(ServingError):
    """A stage, or the bundle that a request needs, is not there."""
