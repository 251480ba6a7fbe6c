"""The application: which path is answered by what."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runner.errors import BloomdeskError
from runner.server import completions
from runner.server.admission import admit
from runner.server.answers import Answer, SharedAnswers
from runner.server.auth import Gate
from runner.server.bodies import checked, key_of, read_object
from runner.server.engine import Engine
from runner.server.errors import ApiError, explained
from runner.server.orders import Order, model_named
from runner.server.routing import on_any_error, on_api_error, on_http_error, reply
from runner.server.schemas import CompletionBody
from runner.server.settings import Settings
from runner.server.streams import Document, EventStream

OWNER = "bloomdesk"


def create_app(engine: Engine, settings: Settings) -> Starlette:
    """The ASGI application for an engine, which it starts, and stops at its end."""
    api = Api(engine, settings)
    routes = [
        Route("/health", api.health),
        Route("/version", api.version),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/completions", api.completions, methods=["POST"]),
    ]
    handlers = {ApiError: on_api_error, HTTPException: on_http_error, Exception: on_any_error}
    gate = Middleware(Gate, keys=settings.keys, hosts=settings.hosts)
    return Starlette(routes=routes, middleware=[gate], exception_handlers=handlers, lifespan=api.lifespan)


class Api:
    """The handlers, and what they share."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.answers = SharedAnswers(engine, settings.keep_results)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            self.engine.stop()
            while not self.engine.join(0):
                await asyncio.sleep(0.01)

    async def health(self, _: Request) -> Response:
        try:
            self.engine.opened()
        except BloomdeskError as error:
            return reply({"status": error.message}, HTTPStatus.SERVICE_UNAVAILABLE)
        return reply({"status": "ok"})

    async def version(self, _: Request) -> Response:
        return reply({"version": importlib.metadata.version("bloomdesk")})

    async def models(self, _: Request) -> Response:
        return reply({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        model_named(request.path_params["name"], self.settings)
        return reply(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.model_name, "object": "model", "created": 0, "owned_by": OWNER}

    async def completions(self, request: Request) -> Response:
        given = await read_object(request, self.settings)
        body, key = checked(given, CompletionBody), key_of(request, given)
        model = self._opened()
        answer = key and self.answers.known(key)
        if not answer:
            order = await run_in_threadpool(completions.order_of, body, model, self.settings)
            answer = await self._answer(order, key)
        order = answer.order
        if order.stream:
            return EventStream(answer, self.engine, self.settings, completions.Chunks(order, model))
        return Document(
            answer, self.engine, self.settings, lambda: completions.document(order, model, answer.growths)
        )

    async def _answer(self, order: Order, key: bytes | None) -> Answer:
        """A new answer to an order; or the one that another client began meanwhile."""
        await run_in_threadpool(admit, order, self.engine, self.settings.most_waiting)
        if answer := key and self.answers.known(key):
            return answer
        try:
            return self.answers.begin(order, key)
        except BloomdeskError as error:
            raise explained(error) from None

    def _opened(self) -> Any:
        try:
            return self.engine.opened()
        except BloomdeskError as error:
            raise explained(error) from None
