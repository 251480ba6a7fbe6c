"""A server without a network: its application, driven by hand or by a client, over a small random model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.server.app import create_app
from runner.server.engine import Engine
from runner.server.settings import Settings


@contextmanager
def client_of(
    model: Model | Callable[[], Model],
    settings: Settings | None = None,
    options: GenerationOptions | None = None,
) -> Iterator[TestClient]:
    """A client of a server that is ready; its `engine` is there to be looked at."""
    engine = Engine(model if callable(model) else lambda: model, options or GenerationOptions())
    app = create_app(engine, settings or Settings())
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        while engine.model is None and engine.failure is None:
            pass
        client.engine = engine
        yield client


def events(text: str) -> list[Any]:
    """The documents of server-sent events; "[DONE]" stays a text, and comments are left out."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def comments(text: str) -> list[str]:
    return [line[2:] for line in text.splitlines() if line.startswith(": ")]


__all__ = ["asyncio", "client_of", "comments", "events"]
