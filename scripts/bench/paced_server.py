"""A server on loopback whose passes can be slowed down, so that there is time to see them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.server.app import create_app
from runner.server.engine import Engine
from runner.server.settings import Settings

# Seconds that it may take to begin, and to end.
PATIENCE = 30.0


class PacedEngine(Engine):
    """Waits for `pause` seconds after each part of a pass."""

    pause = 0.0

    def _on_part(self, part: int, parts: int) -> None:
        super()._on_part(part, parts)
        time.sleep(self.pause)


@dataclass
class Served:
    """A server that runs, and where."""

    engine: PacedEngine
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def served(
    model: Callable[[], Model],
    settings: Settings | None = None,
    most: int | None = None,
    data: Path | None = None,
) -> Iterator[Served]:
    """A server at a free port of loopback until the end of the block.

    `most` texts share a pass; jobs are kept in `data`.
    """
    engine = PacedEngine(model, GenerationOptions(speculate="off", batch=most))
    app = create_app(engine, settings or Settings(), data=data)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started and (engine.model or engine.failure))
        yield Served(engine, server.servers[0].sockets[0].getsockname()[1])
    finally:
        engine.pause = 0.0
        engine.stop()
        server.should_exit = True
        thread.join(PATIENCE)


def until(holds: Callable[[], object]) -> None:
    """Return as soon as it holds. Raises `TimeoutError` if that takes too long."""
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("it did not come to hold")
        time.sleep(0.02)
