"""Errors a user can cause. The command line prints them as one line and exits with status 2.

    RaycascadeError
    |- ConfigError       a config, an override or a plug-in's options
    |- DataError         a raw log, an items table or a request
    |- ShardError        shards that are missing, unfinished or damaged
    |- BundleError       a bundle that is missing, damaged or of another version
    |- ExpectationError  a run that finished below the figures its config expects (exit status 1)
    |- ComparisonError   a comparison of which runs failed (exit status 1)
    `- ResourceError     work that a cluster cannot hold: its processes die again and again (exit status 1)

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
