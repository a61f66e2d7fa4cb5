"""The versions of a bundle in one process, and the release: the durable pointer to the one that is served.

The release is a small JSON file beside the bundles, replaced atomically. A replica that starts reads it, and the others
look at it from time to time, so that none that missed a deployment stays behind.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from raycascade import storage
from raycascade.errors import ConfigError, NotReady
from raycascade.serving.served import ServedModel


@dataclass(frozen=True)
class Release:
    """Which bundle is served since `at_ms` (Unix time). `configured`: the bundle that a config asked for last, by where
    it stands in the config: as long as it asks for the same one, what was deployed later stands."""

    bundle: str
    version: str
    at_ms: int
    configured: Mapping[str, str] = field(default_factory=dict)


def release_uri(given: str, *, bundle: str, app: str) -> str:
    """Where the release is: as the options say, or beside the bundle."""
    if given:
        return given
    parent = storage.absolute(bundle).rstrip("/").rpartition("/")[0]
    return storage.join(parent, "_serving", f"{app}.json")


def read_release(uri: str) -> Release | None:
    """The release, None where there is none yet; ConfigError for a file that is something else."""
    if not storage.exists(uri):
        return None
    try:
        tree = json.loads(storage.read_bytes(uri))
        return Release(**tree)
    except (ValueError, TypeError):
        raise ConfigError(f"{uri}: not a release that `raycascade deploy` wrote; delete it, or set release to another "
                          "place") from None


def write_release(uri: str, *, bundle: str, version: str, source: str = "") -> Release:
    """Points to another bundle, on behalf of a `source` in a config ("": a person); ConfigError where nothing can be
    written."""
    found = read_release(uri)
    configured = {**(found.configured if found else {}), **({source: bundle} if source else {})}
    release = Release(bundle, version, time.time_ns() // 1_000_000, configured)
    try:
        storage.write_json(uri, asdict(release))
    except OSError as error:
        raise ConfigError(f"{uri}: the release cannot be written ({error.strerror or error}); set release to a place "
                          "that every replica can read and this process can write") from None
    return release


class Versions:
    """What a gateway holds: the active model and others that are getting ready or being finished with. Belongs to one
    event loop, so that changing the active one is atomic."""

    def __init__(self, model: ServedModel) -> None:
        self._held = {model.version: model}
        self._active = model

    @property
    def active(self) -> ServedModel:
        """What new requests are answered with."""
        return self._active

    @property
    def held(self) -> tuple[str, ...]:
        """The versions that are loaded."""
        return tuple(self._held)

    @contextmanager
    def using(self) -> Iterator[ServedModel]:
        """The active model, which stays until the end of the block however often it is replaced."""
        model = self._active
        model.num_running += 1
        try:
            yield model
        finally:
            model.num_running -= 1

    def add(self, model: ServedModel) -> None:
        """Holds another model beside the active one."""
        self._held.setdefault(model.version, model)

    def activate(self, version: str) -> None:
        """Answers new requests with another model that is held; NotReady where it is not."""
        if version not in self._held:
            raise NotReady(f"version {version} is not loaded here; deploy it again")
        self._active = self._held[version]

    async def retire(self, version: str, *, timeout_s: float) -> bool:
        """Lets go of a version once its requests have ended, or after the time; whether they have. The active one
        stays."""
        model = self._held.get(version)
        if model is None or model is self._active:
            return model is None
        until = time.monotonic() + timeout_s
        while model.num_running and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if model is not self._active:
            self._held.pop(version, None)
        return not model.num_running
