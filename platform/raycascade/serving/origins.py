"""Origins of web pages: scheme, host and port."""

import urllib.parse

from raycascade.errors import ConfigError


def origin_of(text: str) -> str:
    """An origin as browsers send it: lower case, without a path and without the usual port; ConfigError for what is
    none."""
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    bare = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username)
    # These would end the directive of a content security policy, or widen it.
    clean = text.isascii() and not set(text) & set(" ;,'*")
    if parts.scheme not in ("http", "https") or not parts.hostname or not bare or not clean:
        raise ConfigError(f"page.peers: {text!r} is no origin; give scheme, host and port, such as "
                          "https://candidate.example:8000")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    usual = port is None or (parts.scheme, port) in (("http", 80), ("https", 443))
    return f"{parts.scheme}://{host}" + ("" if usual else f":{port}")
