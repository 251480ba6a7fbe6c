"""A server without a network: its application over a small random model, and clients that behave as they should not."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from runner.generation.live_batch import LiveBatch
from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.server.app import create_app
from runner.server.engine import Engine
from runner.server.settings import Settings
from tests.support.streaming import LONGEST


class GatedModel(Model):
    """A model whose passes wait until they are let through; `begun` counts those that wait or have gone."""

    @classmethod
    def of(cls, model: Model) -> GatedModel:
        found = cls(**{each.name: getattr(model, each.name) for each in fields(Model)})
        object.__setattr__(found, "gate", threading.Semaphore(0))
        object.__setattr__(found, "begun", [])
        return found

    def forward_all(self, segments: Any, on_part: Any = None) -> Any:
        self.begun.append(len(segments))
        assert self.gate.acquire(timeout=LONGEST)
        return super().forward_all(segments, on_part)

    def let(self, passes: int) -> None:
        """Let this many passes through, those that wait first."""
        self.gate.release(passes)


def engine_of(model: Model | Callable[[], Model], options: GenerationOptions | None = None) -> Engine:
    return Engine(model if not isinstance(model, Model) else lambda: model, options or GenerationOptions())


@contextmanager
def client_of(
    model: Model | Callable[[], Model],
    settings: Settings | None = None,
    options: GenerationOptions | None = None,
    **parts: Any,
) -> Iterator[TestClient]:
    """A client of a server that is ready, or has failed; its `engine` is there to be looked at."""
    engine = engine_of(model, options)
    app = create_app(engine, settings or Settings(), **parts)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        wait_for(lambda: engine.model is not None or engine.failure is not None)
        client.engine = engine
        yield client


def live_batches(monkeypatch: pytest.MonkeyPatch) -> list[LiveBatch]:
    """The batches that models make from now on, as they are made."""
    made, live_batch = [], Model.live_batch
    monkeypatch.setattr(Model, "live_batch", lambda *given: made.append(live_batch(*given)) or made[-1])
    return made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


async def soon(condition: Callable[[], bool]) -> None:
    """As `wait_for`, in an event loop."""
    async with asyncio.timeout(LONGEST):
        while not condition():
            await asyncio.sleep(0.001)


class Exchange:
    """A request that is made by hand, so that its client can read slowly, or leave."""

    def __init__(
        self,
        app: Starlette,
        path: str,
        document: object,
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
        *,
        is_whole: bool = True,
    ) -> None:
        """A body that is not whole is one whose rest never comes."""
        self.messages: list[dict[str, Any]] = []
        # Seconds from the request to each message.
        self.times: list[float] = []
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._reads = asyncio.Event()
        self._reads.set()
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": not is_whole})
        given = {"host": "localhost", "content-type": "application/json", **(headers or {})}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        self._began = time.monotonic()
        self.task = asyncio.ensure_future(app(self._scope, self._incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        await self._reads.wait()
        self.messages.append(message)
        self.times.append(time.monotonic() - self._began)

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    def stop_reading(self) -> None:
        self._reads.clear()

    def read_on(self) -> None:
        self._reads.set()

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def text(self) -> str:
        return self.body.decode()

    async def document(self) -> Any:
        """The whole answer, once it is there."""
        async with asyncio.timeout(LONGEST):
            await self.task
        return json.loads(self.body)


@asynccontextmanager
async def serving(
    model: Model, settings: Settings | None = None, options: GenerationOptions | None = None, **parts: Any
) -> AsyncIterator[tuple[Starlette, Engine]]:
    """The application and its engine, in this event loop; passes that still wait are let through at the end."""
    engine = engine_of(model, options)
    app = create_app(engine, settings or Settings(), **parts)
    async with app.router.lifespan_context(app):
        await soon(lambda: engine.is_ready)
        try:
            yield app, engine
        finally:
            engine.stop()
            if isinstance(model, GatedModel):
                model.let(1000)


def events(text: str) -> list[Any]:
    """The documents of server-sent events; "[DONE]" stays a text, and comments are left out."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def comments(text: str) -> list[str]:
    return [line[2:] for line in text.splitlines() if line.startswith(": ")]
