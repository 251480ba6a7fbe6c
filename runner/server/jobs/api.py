"""`/v1/files` and `/v1/batches`: the handlers, and what they share."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from runner.errors import BloomdeskError
from runner.errors import explained as why_refused
from runner.server.bodies import checked, read_object
from runner.server.engine import Engine
from runner.server.errors import ApiError, bad_request, explained, quoted
from runner.server.jobs.batches import (
    CANCELLING,
    IN_PROGRESS,
    VALIDATING,
    Batch,
    Batches,
    Order,
)
from runner.server.jobs.data import BATCHES, FILES
from runner.server.jobs.files import INPUT, Files, StoredFile
from runner.server.jobs.job import template_digest
from runner.server.jobs.lines import FORMS
from runner.server.jobs.uploads import read_upload, too_long
from runner.server.jobs.worker import Worker
from runner.server.routing import reply
from runner.server.schemas import BatchBody
from runner.server.settings import Settings

SECONDS = {"h": 3600, "d": 86400}
WINDOW = re.compile(r"([1-9][0-9]{0,3})([hd])")
# How many of a list come at once: the most, and without a number.
MOST_LISTED, BATCHES_LISTED = 10_000, 20
LOOK = 0.01


class JobsApi:
    """Jobs in the data directory `data`."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        data: Path,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Raises `BloomdeskError` if something in the directory is damaged."""
        self._engine, self._settings, self._now = engine, settings, now
        self.files, self.batches = Files(data / FILES, now), Batches(data / BATCHES, now)
        self.worker = Worker(engine, self.files, self.batches, settings)
        self._uploads = 0

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Run batches until the block ends; the engine has ended by then."""
        self.worker.start()
        try:
            yield
        finally:
            self.worker.stop()
            while not self.worker.join(0):
                await asyncio.sleep(LOOK)

    async def upload(self, request: Request) -> Response:
        if len(self.files.all()) >= self._settings.most_files:
            raise bad_request(f"there are {self._settings.most_files:,} files already: delete some", "file")
        if self._uploads >= self._settings.most_uploads:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS, "other files are being sent", headers={"Retry-After": "5"}
            )
        self._uploads += 1
        try:
            with _room():
                upload = await read_upload(request, self._settings)
                with upload.file:
                    stored = await run_in_threadpool(self._add, upload.filename, upload.blocks())
        finally:
            self._uploads -= 1
        return reply(stored.document)

    def _add(self, filename: str, blocks: Iterator[bytes]) -> StoredFile:
        return self.files.add(filename, INPUT, self._within(blocks))

    def _within(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        nbytes = 0
        for block in blocks:
            nbytes += len(block)
            if nbytes > self._settings.most_file_bytes:
                raise too_long(self._settings)
            yield block

    async def list_files(self, request: Request) -> Response:
        given = _query(request, ("after", "limit", "order", "purpose"))
        files = [file for file in self.files.all() if given.get("purpose") in (None, file.purpose)]
        if given.get("order") not in (None, "asc", "desc"):
            raise bad_request("order must be asc or desc", "order")
        if given.get("order") != "asc":
            files.reverse()
        return reply(_page(files, given, MOST_LISTED, lambda file: file.document))

    async def file(self, request: Request) -> Response:
        return reply(self._file(request).document)

    async def content(self, request: Request) -> Response:
        file = self._file(request)
        if not self.files.is_whole(file):
            raise ApiError(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                f"the bytes of {file.id} are missing or damaged on the server's disk: restore them from a copy",
                "file_id",
                "damaged",
            )
        return FileResponse(
            self.files.path(file),
            headers={"x-content-type-options": "nosniff"},
            media_type="application/octet-stream",
            filename=f"{file.id}.jsonl",
        )

    async def delete_file(self, request: Request) -> Response:
        file = self._file(request)
        if batch := self.batches.reads(file.id):
            raise ApiError(HTTPStatus.CONFLICT, f"{batch.id} needs this file: cancel it, or wait for its end")
        with _room():
            await run_in_threadpool(self.files.delete, file)
        return reply({"id": file.id, "object": "file", "deleted": True})

    async def create_batch(self, request: Request) -> Response:
        body = checked(await read_object(request, self._settings), BatchBody)
        try:
            model = self._engine.opened()
        except BloomdeskError as error:
            raise explained(error) from None
        if body.endpoint not in FORMS:
            raise bad_request(f"endpoint must be one of {', '.join(FORMS)}", "endpoint")
        file = self.files.get(body.input_file_id)
        if file is None or file.purpose != INPUT:
            wanted = f'with the purpose "{INPUT}"'
            raise bad_request(f"there is no file {quoted(body.input_file_id)} {wanted}", "input_file_id")
        window = WINDOW.fullmatch(body.completion_window)
        if not window:
            raise bad_request("completion_window is a time such as 24h or 30d", "completion_window")
        if sum(batch.is_running for batch in self.batches.all()) >= self._settings.most_batches:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "too many batches are not done yet",
                headers={"Retry-After": "3600"},
            )
        order = Order(
            body.endpoint,
            file.id,
            body.completion_window,
            self._now() + int(window[1]) * SECONDS[window[2]],
            body.metadata,
            self._settings.model_name,
            model.weights.fingerprint,
            template_digest(body.endpoint, self._settings),
        )
        with _room():
            batch = await run_in_threadpool(self.batches.create, order)
        self.worker.add(batch)
        return reply(self.batches.document(batch))

    async def list_batches(self, request: Request) -> Response:
        given = _query(request, ("after", "limit"))
        newest_first = self.batches.all()[::-1]
        return reply(_page(newest_first, given, BATCHES_LISTED, self.batches.document))

    async def batch(self, request: Request) -> Response:
        return reply(self.batches.document(self._batch(request)))

    async def cancel_batch(self, request: Request) -> Response:
        batch = self._batch(request)
        with _room():
            batch = await run_in_threadpool(self.batches.to, batch, CANCELLING, {VALIDATING, IN_PROGRESS})
        if batch.status != CANCELLING:
            raise ApiError(HTTPStatus.CONFLICT, f"the batch is {batch.status}, so it cannot be cancelled")
        self.worker.wake()
        return reply(self.batches.document(batch))

    def _file(self, request: Request) -> StoredFile:
        return _known(self.files.get, "file", request.path_params["file_id"])

    def _batch(self, request: Request) -> Batch:
        return _known(self.batches.get, "batch", request.path_params["batch_id"])


def _known(get: Callable[[str], Any], kind: str, name: str) -> Any:
    if (found := get(name)) is None:
        raise ApiError(HTTPStatus.NOT_FOUND, f"there is no {kind} {quoted(name)}", f"{kind}_id", "not_found")
    return found


def _query(request: Request, known: Collection[str]) -> Mapping[str, str]:
    for name in request.query_params:
        if name not in known:
            raise bad_request(f"unknown or unsupported parameter {quoted(name)}", name[:64])
    return request.query_params


def _page(
    items: list[Any], given: Mapping[str, str], usual: int, document: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """A page of a list, as OpenAI has it: up to `limit` of the items after the one with the id `after`."""
    if (after := given.get("after")) is not None:
        place = next((place for place, item in enumerate(items) if item.id == after), None)
        if place is None:
            raise bad_request(f"there is no {quoted(after)} in this list", "after")
        items = items[place + 1 :]
    limit = given.get("limit", str(usual))
    if not re.fullmatch("[1-9][0-9]{0,4}", limit) or int(limit) > MOST_LISTED:
        raise bad_request(f"limit is a number from 1 to {MOST_LISTED:,}", "limit")
    shown = items[: int(limit)]
    return {
        "object": "list",
        "data": [document(item) for item in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": len(items) > len(shown),
    }


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Raise `ApiError` in place of an OSError: the disk takes no more."""
    try:
        yield
    except OSError as error:
        why = why_refused(error)[0]
        raise ApiError(HTTPStatus.INSUFFICIENT_STORAGE, f"the server cannot keep this: {why}") from None
