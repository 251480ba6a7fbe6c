"""Connections: silent ones are closed, and those beyond the bound are told so."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvicorn
from starlette.responses import Response

from runner.cli.connections import Connection
from runner.cli.serve import listening
from runner.server.routing import TOO_MANY_CONNECTIONS
from tests.support.streaming import LONGEST

READ_HEAD = 0.2
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Client:
    """A connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.send = reader, writer.write
        self.close = writer.close

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        async with asyncio.timeout(LONGEST):
            try:
                return await self._reader.read()
            except ConnectionError:  # a byte sent after the close is answered with a reset
                return b""

    async def head(self) -> bytes:
        async with asyncio.timeout(LONGEST):
            return await self._reader.readuntil(b"\r\n\r\n")


def serving(
    test: Callable[[Callable[[], Coroutine[Any, Any, Client]]], Coroutine[Any, Any, None]], most: int = 100
) -> None:
    """Run a test with a way to connect to a server that answers after twice the patience for a head."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(2 * READ_HEAD)
        await Response("well")(scope, receive, send)

    async def run(listener: socket.socket) -> None:
        http = Connection.bounded(READ_HEAD, most, TOO_MANY_CONNECTIONS)
        server = uvicorn.Server(uvicorn.Config(app, http=http, lifespan="off", log_level="critical"))
        task = asyncio.create_task(server.serve([listener]))
        address, clients = listener.getsockname(), []

        async def connect() -> Client:
            clients.append(Client(*await asyncio.open_connection(*address)))
            return clients[-1]

        try:
            await test(connect)
        finally:
            for client in clients:
                client.close()
            server.should_exit = True
            await task

    with listening("127.0.0.1", 0) as listener:
        asyncio.run(run(listener))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", b"GET / HT", REQUEST[:-2]])
def test_a_connection_without_a_whole_head_is_closed(sent: bytes) -> None:
    async def test(connect: Callable) -> None:
        client = await connect()
        client.send(sent)
        assert await client.rest() == b""

    serving(test)


@pytest.mark.slow
def test_a_head_that_trickles_in_is_too_late() -> None:
    async def test(connect: Callable) -> None:
        client = await connect()
        for byte in REQUEST[:-1]:
            client.send(bytes([byte]))
            await asyncio.sleep(READ_HEAD / 10)
        assert await client.rest() == b""

    serving(test)


@pytest.mark.slow
@pytest.mark.parametrize("next_sent", [b"", b"GET / HT"])
def test_an_answer_may_take_longer_and_the_next_head_may_not(next_sent: bytes) -> None:
    async def test(connect: Callable) -> None:
        client = await connect()
        client.send(REQUEST)
        assert b"200 OK" in await client.head()
        client.send(next_sent)
        assert await client.rest() == b"well"

    serving(test)


@pytest.mark.slow
def test_beyond_the_bound_a_request_is_told_when_to_come_again_and_later_it_is_answered() -> None:
    async def test(connect: Callable) -> None:
        silent = [await connect() for _ in range(2)]
        late = await connect()
        late.send(REQUEST)
        head = (await late.head()).lower()
        assert b"503" in head and b"retry-after: 5" in head and b"application/json" in head
        assert b"too_many_connections" in await late.rest()
        assert [await each.rest() for each in silent] == [b"", b""]
        again = await connect()
        again.send(REQUEST)
        assert b"200 OK" in await again.head()

    serving(test, most=2)
