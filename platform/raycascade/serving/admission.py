"""The doors before the application, plain ASGI middleware: a request gets an id, shows its key and waits its turn."""

import logging

from fastapi import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raycascade.serving.arrival import REQUEST_ID, arrival_of, note
from raycascade.serving.keys import KeyRing, is_loopback
from raycascade.serving.logs import within
from raycascade.serving.problems import failed, problem, try_later
from raycascade.serving.rates import Rates
from raycascade.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)
PROBES = ("/healthz", "/readyz")  # for whoever watches the process; they tell nothing else
OPEN = (*PROBES, "/", "/openapi.json")  # and what shows how to ask, to anyone who may reach the server
OPEN_BELOW = "/page/"  # the files of the page
ANY_KEY = {"www-authenticate": "Bearer"}
HOW = "send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"


class Reception:
    """The outermost door: names the request and its answer, and lets no exception out.

    `telemetry` hears of what the gateway never does. `names_answers`: whether to add the header with the id; a server
    that adds one itself would make it two."""

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry, names_answers: bool = True) -> None:
        self.app, self._telemetry, self._names_answers = app, telemetry, names_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        arrival, status = note(scope), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._names_answers:
                    MutableHeaders(scope=message)[REQUEST_ID] = arrival.request_id
            await send(message)

        with within(arrival.request_id):
            try:
                await self.app(scope, receive, named)
            except Exception as error:
                if status:
                    raise
                await failed(scope, error)(scope, receive, named)
            if arrival.refused:
                self._telemetry.request(arrival.refused, arrival.seconds)
            if status >= 400:
                logger.info("refused", extra={"method": scope["method"], "path": scope["path"], "status": status,
                                              "key_name": arrival.key_name, "ms": round(arrival.seconds * 1000, 3)})


class Admission:
    """Lets in who shows a key of the ring and asks no faster than it may. Without a ring: this machine alone.

    `per_second`: of a key that has no rate of its own, and of everybody together where there are no keys (0: any)."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None, rates: Rates, per_second: float = 0.0) -> None:
        self.app, self._keys, self._rates, self._per_second = app, keys, rates, per_second

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: passed on, or answered with 401 or 429."""
        path = _path(scope)
        if scope["type"] != "http" or path in PROBES:
            await self.app(scope, receive, send)
            return
        open_to_all = path in OPEN or path.startswith(OPEN_BELOW)
        refusal = self._locality(scope) if self._keys is None else None
        if refusal is None and not open_to_all:
            refusal = self._admission(scope)
        await (refusal or self.app)(scope, receive, send)

    def _locality(self, scope: Scope) -> Response | None:
        """Without keys: None for a request from this machine, else the problem."""
        if _from_here(scope):
            return None
        return _unauthorised(scope, "no API keys are set up, so only requests from this machine, to a loopback "
                                    "address, are answered; set keys.file, and add a key with `raycascade keys add`")

    def _admission(self, scope: Scope) -> Response | None:
        """None for a request with a key that may ask now, else the problem."""
        per_second, burst = self._per_second, None
        if self._keys is not None:
            presented = _presented(scope)
            key = self._keys.owner(presented) if presented else None
            if key is None:
                return _unauthorised(scope, f"the API key is not valid; {HOW}" if presented else f"no API key; {HOW}")
            arrival_of(scope).key_name = key.name
            per_second, burst = key.per_second or per_second, key.burst
        wait_s = self._rates.take(arrival_of(scope).key_name, per_second=per_second, burst=burst)
        if wait_s <= 0:
            return None
        arrival_of(scope).refused = "limited"
        detail = f"more than {per_second:g} requests per second; send fewer, or wait as long as Retry-After says"
        return try_later(scope, 429, detail, retry_after_s=wait_s)


def _unauthorised(scope: Scope, detail: str) -> Response:
    arrival_of(scope).refused = "unauthorised"
    return problem(scope, 401, detail, headers=ANY_KEY)


def _presented(scope: Scope) -> str:
    headers = Headers(scope=scope)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key", "") or (token.strip() if scheme.lower() == "bearer" else "")


def _path(scope: Scope) -> str:
    """The path below the place where the application is mounted."""
    path, root = scope.get("path", ""), scope.get("root_path", "").rstrip("/")
    return path[len(root):] or "/" if path == root or path.startswith(f"{root}/") else path


def _from_here(scope: Scope) -> bool:
    """Whether a request comes from this machine and was meant for it.

    The second part keeps a page of the internet, whose name was made to lead to this machine, from asking through the
    browser of someone here; such names have a dot."""
    client = (scope.get("client") or ("",))[0]
    host = Headers(scope=scope).get("host", "")
    name = host[:host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    from_here = is_loopback(client) or not client or not any(mark in client for mark in ".:")
    return from_here and (is_loopback(name) or not any(mark in name for mark in ".:"))
