"""How an answer travels: server-sent events with comments, or one document after some whitespace.

Headers and a first byte go out at once, and something every few seconds, so that neither clients nor proxies give up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from runner.server.answers import Answer
from runner.server.engine import Engine, Growth
from runner.server.errors import failed
from runner.server.settings import Settings

DONE = b"data: [DONE]\n\n"
# Proxies must not hold back what is small, nor keep it.
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}
JSON_HEADERS = {"content-type": "application/json", "cache-control": "no-store", "x-accel-buffering": "no"}
# JSON may begin with whitespace.
WHITESPACE = b"\n"


class Chunks(Protocol):
    """What a stream is made of."""

    def of(self, growths: Sequence[Growth]) -> Iterator[dict[str, Any]]: ...

    def last(self) -> Iterator[dict[str, Any]]: ...


class Delivery:
    """An ASGI response that reads an answer until it is finished, or until its client has gone."""

    def __init__(
        self, answer: Answer, engine: Engine, settings: Settings, log: MutableMapping[str, Any]
    ) -> None:
        """`log` is told how many tokens came."""
        self._answer, self._engine, self._settings, self._log = answer, engine, settings, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answer.reading():
            gone = asyncio.ensure_future(_disconnected(receive))
            sent = asyncio.ensure_future(self._deliver(_Sender(send, self._settings.send)))
            try:
                await asyncio.wait({gone, sent}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (gone, sent):
                    if not task.done():
                        task.cancel()
                await asyncio.gather(gone, sent, return_exceptions=True)
                self._log["new_tokens"] = self._answer.new_tokens
                if self._answer.failure:
                    self._log["failure"] = self._answer.failure.message
        if not sent.cancelled() and (error := sent.exception()) and not isinstance(error, ClientGone):
            raise error

    async def _deliver(self, sender: _Sender) -> None:
        raise NotImplementedError


class ClientGone(Exception):
    """A client reads nothing any more."""


class _Sender:
    """Sends a response in pieces, none of which may take longer than `patience` seconds."""

    def __init__(self, send: Send, patience: float) -> None:
        self._send, self._patience = send, patience

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._within({"type": "http.response.start", "status": status, "headers": encoded})

    async def body(self, data: bytes, *, more: bool = True) -> None:
        await self._within({"type": "http.response.body", "body": data, "more_body": more})

    async def whole(self, status: int, data: bytes, headers: Mapping[str, str] = JSON_HEADERS) -> None:
        await self.start(status, {**headers, "content-length": str(len(data))})
        await self.body(data, more=False)

    async def _within(self, message: Mapping[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientGone from None


class EventStream(Delivery):
    """Chunks as server-sent events, with comments that say where the pass is."""

    def __init__(
        self,
        answer: Answer,
        engine: Engine,
        settings: Settings,
        log: MutableMapping[str, Any],
        chunks: Chunks,
    ) -> None:
        super().__init__(answer, engine, settings, log)
        self._chunks = chunks

    async def _deliver(self, sender: _Sender) -> None:
        answer, seen = self._answer, 0
        await sender.start(HTTPStatus.OK, {**STREAM_HEADERS, "x-request-id": answer.order.id})
        await sender.body(self._comment())
        while True:
            await answer.wait(seen, self._settings.keep_alive)
            new = answer.growths[seen:]
            seen += len(new)
            if data := b"".join(map(event, self._chunks.of(new))):
                await sender.body(data)
            elif not answer.is_finished:
                await sender.body(self._comment())
            if answer.is_finished and seen == len(answer.growths):
                break
        if answer.failure:
            await sender.body(event(failed(answer.failure).document) + DONE, more=False)
        else:
            await sender.body(b"".join(map(event, self._chunks.last())) + DONE, more=False)

    def _comment(self) -> bytes:
        return f": {self._engine.progress.words}\n\n".encode()


class Document(Delivery):
    """One JSON document; if it takes a while, after headers and whitespace. An error then comes in the body."""

    def __init__(
        self,
        answer: Answer,
        engine: Engine,
        settings: Settings,
        log: MutableMapping[str, Any],
        document: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__(answer, engine, settings, log)
        self._document = document

    async def _deliver(self, sender: _Sender) -> None:
        answer, is_begun = self._answer, False
        timeout = self._settings.first_byte
        while not answer.is_finished:
            seen = len(answer.growths)
            began = asyncio.get_running_loop().time()
            await answer.wait(seen, timeout)
            timeout -= asyncio.get_running_loop().time() - began
            if timeout > 0 or answer.is_finished:
                continue
            timeout = self._settings.keep_alive
            if not is_begun:
                await sender.start(HTTPStatus.OK, JSON_HEADERS)
                is_begun = True
            await sender.body(WHITESPACE)
        status, data = HTTPStatus.OK, b""
        if answer.failure:
            error = failed(answer.failure)
            status, data = HTTPStatus(error.status), error.body
        else:
            data = as_json(self._document())
        if is_begun:
            await sender.body(data, more=False)
        else:
            await sender.whole(status, data)


def as_json(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def event(document: object) -> bytes:
    """A server-sent event."""
    return b"data: " + as_json(document) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
