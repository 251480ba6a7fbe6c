"""The application: which path is answered by what."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.generation.options import Sampling
from runner.server import chat, completions
from runner.server.admission import admit, check_fits
from runner.server.answers import Answer, SharedAnswers
from runner.server.auth import Gate
from runner.server.bodies import Unsent, checked, key_of, read_object
from runner.server.engine import Engine, Growth
from runner.server.errors import ApiError, explained
from runner.server.jobs.api import JobsApi
from runner.server.jobs.data import ANSWERS
from runner.server.jobs.routes import routes_of
from runner.server.kept import Kept, KeptAnswers
from runner.server.logs import Log, WriteLine, log_of
from runner.server.metrics import CONTENT_TYPE, Counted, Metrics
from runner.server.openapi import Description, description
from runner.server.orders import Order, model_named, schema_of
from runner.server.page_files import page_routes
from runner.server.routing import Trimmed, on_any_error, on_api_error, on_http_error, reply
from runner.server.schemas import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from runner.server.settings import Settings
from runner.server.streams import Chunks, Document, EventStream
from runner.server.tokens import detokenized, tokenized, tokenizer_info
from runner.server.watch import watch

OWNER = "bloomdesk"
EVENTS = "text/event-stream"
# Statuses of another model's name, and of a full queue.
GENERATING = (404, 429)
# Seconds between looks at whether the engine has ended.
LOOK = 0.01


class Form(Protocol):
    """A form of generation: completions or chats."""

    def order_of(self, body: Any, model: Model, settings: Settings) -> Order: ...

    def document(self, order: Order, model: Model, growths: Sequence[Growth]) -> dict[str, Any]: ...

    @property
    def Chunks(self) -> Callable[[Order, Model], Chunks]: ...


def create_app(
    engine: Engine,
    settings: Settings,
    write_line: WriteLine | None = None,
    clock: Callable[[], float] = time.monotonic,
    data: Path | None = None,
) -> Starlette:
    """The ASGI application for an engine, which it starts, and stops at its end.

    `write_line` gets a line of the log for each request. Jobs and answers are kept in the directory `data`, which
    this process holds. Raises `BloomdeskError` if something in there is damaged.
    """
    jobs = JobsApi(engine, settings, data) if data else None
    kept = KeptAnswers(data / ANSWERS, settings.keep_results) if data else None
    api = Api(engine, settings, clock, jobs, kept)
    described = [*_routes(api), *routes_of(api.jobs)]
    document = description(described)
    routes = [route for route, _ in described]
    routes += [Route("/openapi.json", lambda _: reply(document)), *page_routes()]
    handlers = {ApiError: on_api_error, HTTPException: on_http_error, Exception: on_any_error}
    middleware = [
        Middleware(Trimmed),
        Middleware(Counted, metrics=api.metrics),
        Middleware(Gate, keys=settings.keys, hosts=settings.hosts),
        Middleware(Unsent, engine=engine),
    ]
    if write_line:
        middleware.insert(0, Middleware(Log, write=write_line, as_json=settings.log_json))
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=api.lifespan)


def _routes(api: Api) -> Iterator[tuple[Route, Description]]:
    """All routes but that of their description."""
    yield (
        Route("/v1/completions", api.generating(completions, CompletionBody), methods=["POST"]),
        Description(
            "Continue prompts, or score them",
            CompletionBody,
            ("application/json", EVENTS),
            errors=GENERATING,
        ),
    )
    yield (
        Route("/v1/chat/completions", api.generating(chat, ChatBody), methods=["POST"]),
        Description("Answer messages", ChatBody, ("application/json", EVENTS), errors=GENERATING),
    )
    yield Route("/v1/models", api.models), Description("The models: one")
    yield Route("/v1/models/{model:path}", api.model), Description("The model of this name", errors=(404,))
    yield (
        Route("/tokenize", api.asking(tokenized, TokenizeBody), methods=["POST"]),
        Description("The token ids of a text", TokenizeBody, errors=(404,)),
    )
    yield (
        Route("/detokenize", api.asking(detokenized, DetokenizeBody), methods=["POST"]),
        Description("The text of token ids", DetokenizeBody, errors=(404,)),
    )
    yield Route("/tokenizer_info", api.tokenizer_info), Description("What the tokenizer's file says")
    yield (
        Route("/progress", watch(api.engine, api.settings)),
        Description("The pass and the queue; with Accept: text/event-stream, as they change"),
    )
    yield Route("/health", api.health), Description("Whether the model is there")
    yield Route("/metrics", api.metrics_text), Description("Numbers for Prometheus", None, ("text/plain",))
    yield Route("/version", api.version), Description("The version")


class Api:
    """The handlers, and what they share."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        clock: Callable[[], float],
        jobs: JobsApi | None,
        kept: KeptAnswers | None,
    ) -> None:
        self.engine, self.settings, self.jobs, self._kept = engine, settings, jobs, kept
        self.metrics = Metrics(engine)
        self.answers = SharedAnswers(engine, settings.keep_results, clock, kept)
        self._compiling = asyncio.Semaphore()

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        async with self.jobs.lifespan() if self.jobs else contextlib.nullcontext():
            try:
                yield
            finally:
                self.engine.stop()
                while not self.engine.join(0):
                    await asyncio.sleep(LOOK)
                if self._kept:
                    # What the last pass gave may be on its way.
                    await asyncio.sleep(0)
                    self._kept.close()

    async def health(self, _: Request) -> Response:
        try:
            self.engine.opened()
        except BloomdeskError as error:
            raise explained(error) from None
        return reply({"status": "ok"})

    async def metrics_text(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def version(self, _: Request) -> Response:
        return reply({"version": importlib.metadata.version("bloomdesk")})

    async def models(self, _: Request) -> Response:
        return reply({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        model_named(request.path_params["model"], self.settings)
        return reply(self._model())

    async def tokenizer_info(self, _: Request) -> Response:
        return reply(tokenizer_info(self._opened(), self.settings))

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.model_name, "object": "model", "created": 0, "owned_by": OWNER}

    def asking(
        self, answer: Callable[[Any, Model, Settings], dict[str, Any]], schema: type[BaseModel]
    ) -> Callable[[Request], Any]:
        """A handler for what needs the model, and no pass."""

        async def handler(request: Request) -> Response:
            body = checked(await read_object(request, self.settings), schema)
            return reply(await run_in_threadpool(answer, body, self._opened(), self.settings))

        return handler

    def generating(self, form: Form, schema: type[BaseModel]) -> Callable[[Request], Any]:
        """A handler for what passes are made for."""

        async def handler(request: Request) -> Response:
            given = await read_object(request, self.settings)
            body, key = checked(given, schema), key_of(request, given)
            model, log = self._opened(), log_of(request.scope)
            answer, asked = key and self.answers.known(key), None
            if not answer:
                kept = await self.answers.kept(key)
                asked = await self._order(form, kept.seeded(body) if kept else body, model)
                if kept and kept.is_of(asked):
                    asked = kept.named(asked)
                else:
                    kept = None
                answer = await self._answer(asked, key, kept)
            order = answer.order
            log["joined"] = order is not asked
            log |= {"id": order.id, "prompt_tokens": order.prompt_tokens, "texts": len(order.requests)}
            if body.user is not None:
                log["user"] = body.user
            if self.settings.log_prompts:
                log["prompts"] = [prompt.text or list(prompt.ids) for prompt in order.prompts]
            if order.stream:
                return EventStream(answer, self.engine, self.settings, log, form.Chunks(order, model))
            document = lambda: form.document(order, model, answer.growths)  # noqa: E731
            return Document(answer, self.engine, self.settings, log, document)

        return handler

    async def _order(self, form: Form, body: GenerationBody, model: Model) -> Order:
        """The order of a body; one at a time if a schema is to be compiled, so that others find threads."""
        if model.grammars.has(Sampling(json_schema=schema_of(body.response_format))):
            return await run_in_threadpool(form.order_of, body, model, self.settings)
        try:
            async with asyncio.timeout(self.settings.schema_wait):
                await self._compiling.acquire()
        except TimeoutError:
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "JSON schemas of other requests are being compiled; try again",
                "response_format",
                "unavailable",
                {"Retry-After": f"{math.ceil(self.settings.schema_wait)}"},
            ) from None
        try:
            return await run_in_threadpool(form.order_of, body, model, self.settings)
        finally:
            self._compiling.release()

    async def _answer(self, order: Order, key: bytes | None, kept: Kept | None) -> Answer:
        """A new answer to an order, which continues what is kept; or the answer that another client began meanwhile."""
        await run_in_threadpool(check_fits, order, self.engine)
        if answer := key and self.answers.known(key):
            return answer
        admit(order, self.engine, self.settings.most_waiting)
        try:
            return self.answers.begin(order, key, kept)
        except BloomdeskError as error:
            raise explained(error) from None

    def _opened(self) -> Model:
        try:
            return self.engine.opened()
        except BloomdeskError as error:
            raise explained(error) from None
