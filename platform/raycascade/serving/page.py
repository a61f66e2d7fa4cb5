"""The page of an endpoint: static files of the package, served at `/` and `/page/...` without any other server's help.

The page asks the API as any client does: what it shows, it has asked for with the caller's key. Its files hold no
secrets and need no key.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
INDEX = "index.html"
# A proxy or a browser asks each time whether a file is still the one it has: the scripts of two versions never mix.
HEADERS = {
    "cache-control": "no-cache", "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin", "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff", "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class PageFile:
    """A static file: its bytes, media type and entity tag."""

    content: bytes
    kind: str
    etag: str


def mount_page(api: FastAPI, *, peers: Sequence[str] = ()) -> None:
    """Adds the page to an application.

    `peers`: the origins (`origin_of`) of other endpoints whose answers may be compared with this one's. The page may
    send requests there, and the pages there may send theirs here; nothing else of a browser may. A page that asks from
    elsewhere shows no key before it has asked whether it may: call this last, so that it is answered at the first door.
    """
    files = page_files()
    headers = {**HEADERS, "content-security-policy": content_security_policy(peers)}

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return _reply(files[INDEX], request, headers)

    @api.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def part(name: str, request: Request) -> Response:
        if name not in files:
            return Response("no such part of the page\n", status_code=404, headers=headers, media_type="text/plain")
        return _reply(files[name], request, headers)

    api.add_middleware(PrefixSlash)
    if peers:
        api.add_middleware(CORSMiddleware, allow_origins=peers, allow_methods=["GET", "POST"],
                           allow_headers=["authorization", "content-type", "x-request-id"],
                           expose_headers=["retry-after", "x-request-id"])


class PrefixSlash:
    """Middleware that leads from `/prefix`, where the application is mounted, to `/prefix/`: the page names its parts
    relative to itself, so that it works behind any prefix."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        prefix = scope.get("root_path", "")
        if scope["type"] == "http" and prefix and scope["path"] == prefix:
            there = {"location": prefix.rpartition("/")[2] + "/"}
            await Response(status_code=307, headers=HEADERS | there)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def page_files() -> dict[str, PageFile]:
    """Every file of the page by its name."""
    files: dict[str, PageFile] = {}
    for entry in resources.files("raycascade").joinpath("serving", "page").iterdir():
        suffix = "." + entry.name.rpartition(".")[-1]
        if suffix in KINDS:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[entry.name] = PageFile(content, KINDS[suffix], etag)
    return files


def content_security_policy(peers: Sequence[str] = ()) -> str:
    """What the page may do: run its own scripts, none of them inline, and ask its own server and the peers."""
    rules = {"default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self'",
             "connect-src": " ".join(("'self'", *peers)), "base-uri": "'none'", "form-action": "'none'",
             "frame-ancestors": "'none'", "require-trusted-types-for": "'script'", "trusted-types": "'none'"}
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _reply(file: PageFile, request: Request, headers: dict[str, str]) -> Response:
    """The file, or 304 where the client has it."""
    tagged = {**headers, "etag": file.etag}
    held = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in held or "*" in held:
        return Response(status_code=304, headers=tagged)
    return Response(file.content, headers=tagged, media_type=file.kind)
