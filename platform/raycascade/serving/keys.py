"""API keys: a JSON file of names, salted hashes and rates, read again when it changes. The keys themselves are nowhere.

A key holds 256 random bits, so a single SHA-256 with a salt is as hard to turn back as the key is to guess, and a
request pays microseconds for it where a slow hash would cost it a core.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field as Option, ValidationError, model_validator

from raycascade.errors import ConfigError
from raycascade.plugins import first_problem
from raycascade.schema import Frozen, near_miss
from raycascade.serving.options import ServeOptions

logger = logging.getLogger(__name__)
PREFIX = "rck_"  # so that a scanner for secrets knows one when it sees it
MOST_CHARACTERS = 256  # of what is presented; a key has 47
Stamp = tuple[int, int, int]


class Key(Frozen):
    """One key of the file: who has it, the hash of it, and how fast it may ask (None: what the options say)."""

    name: Annotated[str, Option(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    salt: Annotated[str, Option(pattern=r"^[0-9a-f]{32}$")]
    sha256: Annotated[str, Option(pattern=r"^[0-9a-f]{64}$")]
    per_second: Annotated[float, Option(gt=0, allow_inf_nan=False)] | None = None
    burst: Annotated[int, Option(ge=1)] | None = None  # None: a second's worth
    created: str = ""

    def fits(self, presented: str) -> bool:
        """Whether this is the key, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(hashed(presented, self.salt), self.sha256)


class KeyFile(Frozen):
    """The file as a whole."""

    format: Literal[1] = 1
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _every_name_once(self) -> "KeyFile":
        names = [key.name for key in self.keys]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"key {name!r} is there twice; remove one")
        return self


def hashed(key: str, salt: str) -> str:
    """What the file holds in place of a key."""
    return hashlib.sha256(f"{salt}{key}".encode("utf-8", "surrogateescape")).hexdigest()


# ---------------------------------------------------------------- the file
def read_keys(path: str) -> tuple[Key, ...]:
    """The keys of a file; ConfigError where it cannot be used, which repeats nothing that stands in it."""
    try:
        tree = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file of keys; make one with `raycascade keys add NAME --file {path}`"
                          ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    except ValueError:
        raise ConfigError(f"{path}: no valid JSON; restore the file, or make a new one with `raycascade keys add`"
                          ) from None
    try:
        return KeyFile.model_validate(tree).keys
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise ConfigError(f"{path}: {place} is not as `raycascade keys add` writes it; restore the file") from None


def add_key(path: str, name: str, *, per_second: float | None = None, burst: int | None = None) -> str:
    """A new key, which nobody can read again; its hash goes into the file, which is made where there is none.

    ConfigError for a name that is taken or is no clean word, and for rates that are not above zero."""
    key, salt = PREFIX + secrets.token_urlsafe(32), secrets.token_hex(16)
    try:
        entry = Key(name=name, salt=salt, sha256=hashed(key, salt), per_second=per_second, burst=burst,
                    created=datetime.now(UTC).isoformat(timespec="seconds"))
    except ValidationError as error:
        raise ConfigError(f"keys add: {first_problem(error, Key)}") from None
    with _locked(path):
        keys = read_keys(path) if os.path.exists(path) else ()
        if name in {one.name for one in keys}:
            raise ConfigError(f"{path}: there is a key {name!r} already; remove it first, or choose another name")
        _write(path, (*keys, entry))
    return key


def remove_key(path: str, name: str) -> None:
    """Takes a key out of the file; ConfigError where there is none of that name."""
    with _locked(path):
        keys = read_keys(path)
        names = {key.name for key in keys}
        if name not in names:
            raise ConfigError(f"{path}: there is no key {name!r}{near_miss(name, names)}")
        _write(path, tuple(key for key in keys if key.name != name))


def _write(path: str, keys: tuple[Key, ...]) -> None:
    """Replaces the file in one step, readable by its owner alone unless it was made readable by others."""
    text = json.dumps(KeyFile(keys=keys).model_dump(mode="json", exclude_none=True), indent=1) + "\n"
    mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o600
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Only one process at a time changes the file; the folder is locked, because the file is replaced."""
    import fcntl

    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{path}: the keys cannot be written ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except PermissionError as error:
        raise ConfigError(f"{path}: the keys cannot be written ({error.strerror}); check the folder's rights") from None
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- while serving
class KeyRing:
    """The keys of a file that may change at any time. A file that cannot be used changes nothing, and is logged once.

    ConfigError where the file cannot be used at the start."""

    def __init__(self, path: str, *, check_s: float = 1.0, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._path, self._check_s, self._clock_s = path, check_s, clock_s
        self._checked_s, self._stamp = clock_s(), _stamp(path)
        self._keys = read_keys(path)

    def owner(self, presented: str) -> Key | None:
        """The key that was presented, or None. Every key of the file is compared, whichever fits."""
        self._refresh()
        found = None
        if len(presented) > MOST_CHARACTERS:
            return None
        for key in self._keys:
            found = key if key.fits(presented) else found
        return found

    def _refresh(self) -> None:
        now_s = self._clock_s()
        if now_s - self._checked_s < self._check_s:
            return
        self._checked_s, stamp = now_s, _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
            logger.warning("%s: read again, %d keys are valid now", self._path, len(self._keys))
        except ConfigError as error:
            logger.error("%s; the %d keys from before stay valid", error, len(self._keys))


def _stamp(path: str) -> Stamp | None:
    """What changes with the file; None where there is none. A link is followed."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. A name other than localhost is not looked up."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost"
    inner = getattr(address, "ipv4_mapped", None) or address
    return inner.is_loopback


def require_safe_binding(host: str, options: ServeOptions) -> None:
    """ConfigError where others than this machine could ask without a key."""
    if is_loopback(host):
        return
    if not options.keys.file:
        raise ConfigError(f"--host {host}: without API keys only loopback (127.0.0.1) is served; make a key with "
                          "`raycascade keys add NAME --file keys.json` and set keys.file")
    if not read_keys(options.keys.file):
        raise ConfigError(f"--host {host}: {options.keys.file} holds no key; add one with "
                          f"`raycascade keys add NAME --file {options.keys.file}`")
