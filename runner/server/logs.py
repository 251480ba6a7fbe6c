"""One line for each request, and no client's text in it but as JSON or with control characters escaped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

WriteLine = Callable[[str], None]
# Characters of a client's own text that a line has.
LONGEST_TEXT = 200
# What a client gets if it leaves before the headers; nginx's number for it.
CLIENT_GONE = 499


def log_of(scope: Scope) -> MutableMapping[str, Any]:
    """What the line of a request will say beside the usual."""
    return scope.setdefault("state", {}).setdefault("log", {})


class Log:
    """Writes a line when a request is done."""

    def __init__(self, app: ASGIApp, write: WriteLine, *, as_json: bool = False) -> None:
        self._app, self._write, self._as_json = app, write, as_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            seconds = round(time.perf_counter() - began, 3)
            client = (scope.get("client") or ("",))[0]
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "client": client,
                "method": scope["method"],
                "path": scope["path"][:LONGEST_TEXT],
                "status": status,
                "seconds": seconds,
                **log_of(scope),
            }
            self._write(json.dumps(line) if self._as_json else in_words(line))


def in_words(line: Mapping[str, Any]) -> str:
    """Like "2026-11-27T08:30:00.000+00:00 127.0.0.1 POST /v1/completions 200 3.1 s new_tokens=16"."""
    first = [line["time"], _safe(line["client"]), _safe(line["method"]), _safe(line["path"])]
    usual = {"time", "client", "method", "path", "status", "seconds"}
    others = [f"{name}={_safe(value)}" for name, value in line.items() if name not in usual]
    return " ".join([*first, str(line["status"]), f"{line['seconds']} s", *others])


def _safe(value: object) -> str:
    """A value in ASCII, quoted if it has anything but plain characters."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text and text else json.dumps(text)
