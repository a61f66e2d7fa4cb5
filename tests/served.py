"""Served bundles for the tests: options that are patient on a busy machine, and bundles with a self-check."""

from typing import Any

from raycascade import selfcheck
from raycascade.serving.options import ServeOptions, parse_options
from tests.tiny_world import write_bundle


def patient(**changes: Any) -> ServeOptions:
    """Options under which no answer is degraded for want of time, and replicas look at the release often."""
    return parse_options({"port": 0, "deadline_ms": 30_000, "poll_s": 1.0, "users": {"timeout_ms": 30_000}, **changes},
                         where="test")


def checked_bundle(uri: str, *, seed: int = 11, keeps: dict[str, int] | None = None) -> str:
    """A bundle of the hand-made log with its self-check; another seed gives other answers."""
    write_bundle(uri, seed=seed, keeps=keeps)
    selfcheck.record(uri)
    return uri
