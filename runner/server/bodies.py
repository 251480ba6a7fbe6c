"""Bodies of requests, read within bounds of bytes and time, and checked against their schema."""

from __future__ import annotations

import asyncio
import hashlib
import json
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runner.server.engine import Engine, Stopped
from runner.server.errors import ApiError, bad_request, explained, of_validation
from runner.server.settings import Settings

Checked = TypeVar("Checked", bound=BaseModel)
# Seconds between looks at whether the server ends.
LOOK = 0.1


async def read_object(request: Request, settings: Settings) -> dict[str, Any]:
    """The JSON object of a request. Raises `ApiError` if it is none, too long, or too slow in coming."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site could send any other kind without being asked.
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON, with the header Content-Type: application/json"
        )
    data = await _read(request, settings)
    try:
        found = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise bad_request("the body must be a JSON object")
    return found


def checked(given: dict[str, Any], schema: type[Checked]) -> Checked:
    """The body as `schema`. Raises `ApiError` for the first thing that is wrong with it."""
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise of_validation(error, schema.model_fields) from None


def key_of(request: Request, given: dict[str, Any]) -> bytes | None:
    """What is equal for requests that are the same: client, path and body; None if it shall share nothing."""
    if given.get("cache") is False:
        return None
    text = json.dumps([request.url.path, request.scope["state"].get("key"), given], sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


async def _read(request: Request, settings: Settings) -> bytes:
    most, data = settings.most_body_bytes, bytearray()
    too_long = ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body may have up to {most:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise too_long
    try:
        async with asyncio.timeout(settings.read_body):
            async for piece in request.stream():
                data += piece
                if len(data) > most:
                    raise too_long
    except TimeoutError:
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "the body took too long to come") from None
    except ClientDisconnect:
        raise ApiError(HTTPStatus.BAD_REQUEST, "the client has gone") from None
    return bytes(data)


class Unsent:
    """Answers a request whose body has not come with a 503 when the server ends, so that no slow sender holds it up."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app, self._engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_come = False

        async def watched() -> Message:
            nonlocal has_come
            message = await (receive() if has_come else self._received(receive))
            has_come = not message.get("more_body")
            return message

        await self._app(scope, watched, send)

    async def _received(self, receive: Receive) -> Message:
        """The next piece of the body. Raises `ApiError` at the end of the server."""
        coming = asyncio.ensure_future(receive())
        try:
            while not (await asyncio.wait({coming}, timeout=LOOK))[0]:
                if self._engine.is_stopping:
                    raise explained(Stopped())
            return coming.result()
        finally:
            coming.cancel()
