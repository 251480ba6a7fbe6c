"""`GET /progress`: what the engine does now, once as JSON, or as server-sent events for as long as somebody watches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from runner.errors import BloomdeskError
from runner.server.answers import Answer
from runner.server.engine import Engine, Work
from runner.server.routing import reply
from runner.server.settings import Settings
from runner.server.streams import STREAM_HEADERS, event

EVENTS = "text/event-stream"
# Seconds between two looks at the engine.
INTERVAL = 0.2
# Of the requests that run or wait, so many are listed; all are counted.
MOST_LISTED = 100


def watch(engine: Engine, settings: Settings) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint. A stream ends when the server does, so that it holds up no shutdown."""
    looks = _Looks(engine, settings)

    async def answer(request: Request) -> Response:
        if request.method == "HEAD" or EVENTS not in request.headers.get("accept", ""):
            return reply(state_of(engine, settings))
        return StreamingResponse(_events(looks, settings.keep_alive), headers=STREAM_HEADERS)

    return answer


class _Looks:
    """One look at the engine in an `INTERVAL` for all who watch, however many."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self._settings = engine, settings
        self._found, self._at = b"", float("-inf")

    def event(self) -> bytes:
        """The state as an event."""
        now = time.monotonic()
        if now - self._at > INTERVAL / 2 or self.engine.is_stopping:
            self._found, self._at = event(state_of(self.engine, self._settings)), now
        return self._found


async def _events(looks: _Looks, keep_alive: float) -> AsyncIterator[bytes]:
    """What has changed, as soon as it is seen; a comment if nothing has for a while."""
    told, told_at = b"", time.monotonic()
    while True:
        is_last = looks.engine.is_stopping
        found, now = looks.event(), time.monotonic()
        if found != told:
            told, told_at = found, now
            yield found
        elif now - told_at > keep_alive:
            told_at = now
            yield b": nothing new\n\n"
        if is_last:
            return
        await asyncio.sleep(INTERVAL)


def state_of(engine: Engine, settings: Settings) -> dict[str, Any]:
    """The model, the pass that runs, and who is in it or waits for it, without what they asked."""
    status, message, blocks = _status(engine)
    progress, queue = engine.progress, engine.queue()
    active = sum(each.is_active for each in queue)
    return {
        "object": "progress",
        "model": settings.model_name,
        "status": status,
        "message": message,
        "blocks": blocks,
        "pass": {
            "number": progress.number,
            "block": progress.block,
            "bytes_per_second": round(progress.bytes_per_second),
            "seconds_left": round(progress.seconds_left, 2),
        }
        if active
        else None,
        "seconds_a_pass": round(engine.seconds_a_pass, 3),
        "active": active,
        "waiting": len(queue) - active,
        "requests": [
            {
                "id": _id_of(each.work),
                "active": each.is_active,
                "tokens": each.tokens,
                "max_tokens": each.most_tokens,
            }
            for each in queue[:MOST_LISTED]
        ],
    }


def _status(engine: Engine) -> tuple[str, str | None, int]:
    """Whether the model is there, why not, and its number of blocks."""
    try:
        return "ready", None, engine.opened().weights.model.n_layer
    except BloomdeskError as error:
        status = "stopping" if engine.is_stopping else "failed" if engine.failure else "loading"
        return status, error.message, 0


def _id_of(work: Work) -> str | None:
    """The id of the order that a client waits for; a line of a job has none."""
    return work.listener.order.id if isinstance(work.listener, Answer) else None
