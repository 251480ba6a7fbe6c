"""Who may ask: keys, compared in constant time, and the names by which a server without keys may be called."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runner.server.errors import ApiError
from runner.server.page_files import PATHS
from runner.server.routing import respond

# Nothing secret is there: whoever watches over the server has no key, and the page asks for one.
OPEN_PATHS = frozenset({"/health", *PATHS})
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def key_of(headers: Headers, keys: Sequence[str]) -> int | None:
    """The number of the key that a client came with, or None if it has none of them. Every key is compared."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # A header's bytes come as the letters of Latin-1.
    offered = given.encode("latin-1").strip() if scheme.lower() == "bearer" else b""
    found = [hmac.compare_digest(offered, key.encode()) for key in keys]
    return found.index(True) if True in found else None


def host_of(headers: Headers) -> str:
    """The name by which a client called, without the port."""
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    return name.strip("[]").lower()


class Gate:
    """Lets through who has a key or, if there are none, who calls the server by one of its `hosts`.

    The second keeps out pages of a browser on this machine that reach the server under a name of their own.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: Sequence[str]) -> None:
        self._app, self._keys, self._hosts = app, tuple(keys), frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        number = key_of(headers, self._keys)
        scope.setdefault("state", {})["key"] = None if number is None else self._keys[number]
        if self._keys and number is None and scope["path"] not in OPEN_PATHS:
            error = ApiError(
                HTTPStatus.UNAUTHORIZED,
                "this server needs a key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await respond(error)(scope, receive, send)
        elif not self._keys and self._hosts and host_of(headers) not in self._hosts:
            error = ApiError(
                HTTPStatus.FORBIDDEN,
                "this server is not called by that name; give it a key to be called by any",
                code="unknown_host",
            )
            await respond(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)
