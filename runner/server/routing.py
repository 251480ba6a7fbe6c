"""What every route has in common: answers of JSON, and errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from runner.server.errors import ApiError, quoted
from runner.server.streams import as_json

Handler = Callable[[Request], Awaitable[Response]]


def reply(document: object, status: int = 200) -> Response:
    return Response(as_json(document), status, media_type="application/json")


def respond(error: ApiError) -> Response:
    return Response(error.body, error.status, error.headers, "application/json")


TOO_MANY_CONNECTIONS = respond(
    ApiError(
        503,
        "too many connections",
        code="too_many_connections",
        headers={"Retry-After": "5", "Connection": "close"},
    )
)


class Trimmed:
    """Answers a path with slashes at its end as the one without.

    Starlette's redirect would name the wrong scheme behind a proxy that has TLS.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self._app(scope, receive, send)


async def on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return respond(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """For paths that don't exist, and methods that a path hasn't."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {quoted(request.url.path)}"
    return respond(ApiError(error.status_code, message, headers=error.headers or {}))


async def on_any_error(_: Request, error: Exception) -> Response:
    return respond(ApiError(500, f"unexpected {type(error).__name__}; the server's log has more"))
