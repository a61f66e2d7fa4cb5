"""The options of serving: one YAML file, `raycascade serve --options FILE` and Serve's own config read the same keys.

Everything has a default here; what a file leaves out is that. Unknown keys are errors that name the near miss.
"""

from typing import Any, Literal

from pydantic import Field as Option, ValidationError, field_validator, model_validator

from raycascade import storage
from raycascade.config import read_tree, with_override
from raycascade.errors import ConfigError
from raycascade.plugins import first_problem
from raycascade.schema import Frozen, near_miss
from raycascade.serving.origins import origin_of

Mode = Literal["composed", "fused"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class AutoscaleOptions(Frozen):
    """Between `min` and `max` replicas, so many that each has about `target_ongoing` calls at a time. A call is one
    batch of requests."""

    min: int = Option(default=1, ge=1)
    max: int = Option(default=4, ge=1)
    target_ongoing: float = Option(default=1.5, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> "AutoscaleOptions":
        if self.max < self.min:
            raise ConfigError(f"autoscale: max {self.max} is less than min {self.min}; raise max")
        return self


class BatchOptions(Frozen):
    """Concurrent requests of a stage are joined into batches of at most `max_size`. A batch leaves as soon as fewer
    than `in_flight` others are on their way (None: one in this process, two for each replica elsewhere), so that a
    request waits only while there is work before it; `wait_ms` makes it wait for others as well."""

    max_size: int = Option(default=16, ge=1, le=1024)
    wait_ms: float = Option(default=0.0, ge=0, le=1000)
    in_flight: int | None = Option(default=None, ge=1)


class StageOptions(Frozen):
    """One stage. Composed: a deployment of `replicas`, or `autoscale`d, each with `cpus` and `gpus` (shares are
    allowed); a replica works on at most `max_ongoing` calls. In both modes at most `max_queued` requests wait for the
    stage in a gateway replica; beyond them the stage is overloaded. `threads`: of torch in a replica."""

    replicas: int = Option(default=1, ge=1)
    autoscale: AutoscaleOptions | None = None
    cpus: float = Option(default=0.1, ge=0)
    gpus: float = Option(default=0.0, ge=0)
    threads: int = Option(default=1, ge=1)
    max_ongoing: int = Option(default=16, ge=1)
    max_queued: int = Option(default=256, ge=1)
    batch: BatchOptions = BatchOptions()

    @property
    def most_replicas(self) -> int:
        """How many replicas there can be."""
        return self.autoscale.max if self.autoscale else self.replicas


class GatewayOptions(Frozen):
    """The ingress: each of `replicas` works on at most `max_ongoing` requests, `max_queued` more wait, and further ones
    are refused (429). `threads`: of torch in a replica, where fused stages compute; they work on at most `waves`
    batches of requests at a time. `drain_s`: how long a replica that has to stop may finish its requests."""

    replicas: int = Option(default=1, ge=1)
    max_ongoing: int = Option(default=64, ge=1)
    max_queued: int = Option(default=256, ge=0)
    cpus: float = Option(default=0.1, ge=0)
    gpus: float = Option(default=0.0, ge=0)
    threads: int = Option(default=1, ge=1)
    waves: int = Option(default=2, ge=1)
    drain_s: float = Option(default=20.0, ge=0)


class UsersOptions(Frozen):
    """Where histories are. `embedded`: in the only gateway replica; `redis`: a server that any number of them share, at
    `url` (redis://, rediss://, unix://, or env:NAME for a variable that holds it, so that no password stands in a
    file), below keys that begin with `namespace`. `timeout_ms`: the most that a request waits for it. `history_len`:
    newest events kept of a user; `exclude_len`: items that a user has seen, kept where the training log excludes them.
    `dedup_s`: how long the id of an event is remembered."""

    store: Literal["embedded", "redis"] = "embedded"
    url: str = Option(default="", repr=False)
    namespace: str = Option(default="raycascade", pattern=r"^[\w.-]{1,64}$")
    timeout_ms: int = Option(default=50, ge=1)
    history_len: int = Option(default=200, ge=1, le=10_000)
    exclude_len: int = Option(default=10_000, ge=1)
    dedup_s: int = Option(default=86_400, ge=1)

    @model_validator(mode="after")
    def _url_goes_with_store(self) -> "UsersOptions":
        if self.store == "redis" and not self.url:
            raise ConfigError("users.url: missing; store redis needs one, such as redis://127.0.0.1:6379/0 or env:NAME")
        if self.store == "embedded" and self.url:
            raise ConfigError("users.url: store embedded asks no server; set users.store: redis, or leave url out")
        return self


class KeysOptions(Frozen):
    """The file of hashed API keys; empty: none are asked for, and only loopback is served."""

    file: str = ""


class LimitsOptions(Frozen):
    """What a caller may send: bytes of a body, events of a history, items of an exclusion list, queries of a batch,
    recommendations asked for, and requests per second of one key (0: no limit)."""

    body_bytes: int = Option(default=1 << 20, ge=1)
    history: int = Option(default=1_000, ge=1)
    exclude: int = Option(default=10_000, ge=1)
    batch: int = Option(default=64, ge=1)
    k: int = Option(default=1_000, ge=1)
    per_second: float = Option(default=0.0, ge=0)


class TrafficOptions(Frozen):
    """Where sampled requests are logged (empty: nowhere), their share, and after how many seconds or rows a file is
    closed."""

    uri: str = ""
    sample: float = Option(default=1.0, ge=0, le=1)
    rotate_s: float = Option(default=60.0, gt=0)
    rotate_rows: int = Option(default=10_000, ge=1)


class PageOptions(Frozen):
    """The page at `/`. `peers`: origins (scheme, host and port) of other endpoints whose answers it may compare with
    its own. It may ask those, and their pages may ask this endpoint; no other page of a browser may."""

    peers: tuple[str, ...] = ()

    @field_validator("peers")
    @classmethod
    def _origins(cls, peers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(origin_of(peer) for peer in peers)


class ServeOptions(Frozen):
    """How a bundle is served. `stages`: options by stage name; what `default` says holds for every stage that does not
    say otherwise. `deadline_ms`: of a request that names none. `release`: where the pointer to the served bundle is
    (empty: `_serving/<application>.json` beside the bundle); `poll_s`: how often a replica looks at it. `fast`: Ray
    Serve's throughput mode and HAProxy, where `raycascade serve` starts Ray itself."""

    mode: Mode = "composed"
    host: str = "127.0.0.1"
    port: int = Option(default=8000, ge=0, le=65_535)
    deadline_ms: int = Option(default=1_000, ge=1, le=60_000)
    fast: bool = True
    release: str = ""
    poll_s: float = Option(default=5.0, gt=0)
    gateway: GatewayOptions = GatewayOptions()
    stages: dict[str, StageOptions] = {}
    users: UsersOptions = UsersOptions()
    keys: KeysOptions = KeysOptions()
    limits: LimitsOptions = LimitsOptions()
    traffic: TrafficOptions = TrafficOptions()
    page: PageOptions = PageOptions()

    @model_validator(mode="after")
    def _embedded_users_have_one_gateway(self) -> "ServeOptions":
        self.require_gateways(self.gateway.replicas)
        return self

    @model_validator(mode="after")
    def _a_batch_of_queries_fits_the_queues(self) -> "ServeOptions":
        for name in ("default", *self.stages):
            if self.limits.batch > (most := self.stage(name).max_queued):
                raise ConfigError(f"limits.batch: {self.limits.batch}, but stages.{name}.max_queued lets only {most} "
                                  "requests wait, so that larger batches would be refused; raise that, or lower this")
        return self

    def require_gateways(self, replicas: int) -> None:
        """ConfigError where the user store cannot be that of so many replicas of the gateway."""
        if self.users.store == "embedded" and replicas > 1:
            raise ConfigError(f"gateway.replicas: {replicas}, but users.store embedded keeps users in one replica; set "
                              "users.store: redis, or one replica")

    def stage(self, name: str) -> StageOptions:
        """The options of one stage, `default` below its own."""
        base, own = (self.stages.get(key, StageOptions()).model_dump(exclude_unset=True) for key in ("default", name))
        batch = base.get("batch", {}) | own.get("batch", {})
        return StageOptions.model_validate(base | own | ({"batch": batch} if batch else {}))

    def require_stages(self, names: tuple[str, ...]) -> None:
        """ConfigError where options are given for a stage that the cascade does not have."""
        for name in self.stages:
            if name not in (*names, "default"):
                raise ConfigError(f"stages.{name}: the bundle has no such stage{near_miss(name, (*names, 'default'))}")


def load_options(path: str | None, overrides: "list[str] | tuple[str, ...]" = ()) -> ServeOptions:
    """The options in a YAML file (None: the defaults) with `key.path=value` overrides applied; ConfigError says what is
    wrong with them."""
    tree = read_tree(path) if path else {}
    for one in overrides:
        tree = with_override(tree, one)
    return parse_options(tree, where=path or "options")


def parse_options(tree: dict[str, Any], *, where: str) -> ServeOptions:
    """Validated options from a plain tree; paths are made absolute."""
    try:
        options = ServeOptions.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error, _place(error))}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    keys = options.keys.model_copy(update={"file": storage.absolute(options.keys.file) if options.keys.file else ""})
    traffic = options.traffic.model_copy(
        update={"uri": storage.absolute(options.traffic.uri) if options.traffic.uri else ""})
    release = storage.absolute(options.release) if options.release else ""
    return options.model_copy(update={"keys": keys, "traffic": traffic, "release": release})


def _place(error: ValidationError) -> type[Frozen]:
    """The section that the first problem lies in."""
    sections: dict[str, type[Frozen]] = {
        "gateway": GatewayOptions, "stages": StageOptions, "users": UsersOptions, "keys": KeysOptions,
        "limits": LimitsOptions, "traffic": TrafficOptions, "page": PageOptions,
        "autoscale": AutoscaleOptions, "batch": BatchOptions}
    place: type[Frozen] = ServeOptions
    for part in error.errors()[0]["loc"][:-1]:
        if place is LimitsOptions:
            break
        place = sections.get(str(part), place)
    return place
