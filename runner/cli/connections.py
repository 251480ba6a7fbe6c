"""Connections: how many there may be, and how long one may stay silent, in uvicorn."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Closed when no whole request head has come for `read_head` seconds, at first or after an answer.

    With more than `most` connections, requests are answered by the application `full`.
    """

    read_head: float
    most: int
    full: ASGIApp
    _timer: asyncio.TimerHandle | None = None

    @classmethod
    def bounded(cls, read_head: float, most: int, full: ASGIApp) -> type[Connection]:
        """Connections with these bounds, for uvicorn."""
        return type(cls.__name__, (cls,), {"read_head": read_head, "most": most, "full": staticmethod(full)})

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        self.app = self.full if len(self.connections) > self.most else self.config.loaded_app
        super().data_received(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._timer:
            self._timer.cancel()

    def _expect_head(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.read_head, self._give_up)

    def _give_up(self) -> None:
        # A request may have begun since; then the timer starts again at its end.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
