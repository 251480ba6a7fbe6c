"""The paths of jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runner.server.errors import ApiError
from runner.server.jobs.api import MOST_LISTED, JobsApi
from runner.server.openapi import Description
from runner.server.routing import Handler
from runner.server.schemas import BatchBody, FileForm

# What a list takes, and how it may refuse: 404 if no jobs are kept.
PAGE = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED},
}
LISTING = (400, 404)


def routes_of(api: JobsApi | None) -> Iterator[tuple[Route, Description]]:
    """The routes, with their descriptions; without jobs they say so."""

    def handler(method: Callable[[JobsApi, Request], Awaitable[Response]]) -> Handler:
        async def handle(request: Request) -> Response:
            if api is None:
                raise ApiError(404, "this server keeps no jobs: start it with --data DIR", code="no_data")
            return await method(api, request)

        return handle

    yield (
        Route("/v1/files", handler(JobsApi.upload), methods=["POST"]),
        Description("Keep a file of requests", FileForm, sends="multipart/form-data", errors=(404, 429, 507)),
    )
    yield (
        Route("/v1/files", handler(JobsApi.list_files)),
        Description(
            "The files",
            errors=LISTING,
            query={**PAGE, "order": {"enum": ["asc", "desc"]}, "purpose": {"type": "string"}},
        ),
    )
    yield (
        Route("/v1/files/{file_id}", handler(JobsApi.file)),
        Description("What is known of a file", errors=(404,)),
    )
    yield (
        Route("/v1/files/{file_id}", handler(JobsApi.delete_file), methods=["DELETE"]),
        Description("Delete a file", errors=(404, 409, 507)),
    )
    yield (
        Route("/v1/files/{file_id}/content", handler(JobsApi.content)),
        Description("The bytes of a file", None, ("application/octet-stream",), errors=(404,)),
    )
    yield (
        Route("/v1/batches", handler(JobsApi.create_batch), methods=["POST"]),
        Description("Do the requests of a file", BatchBody, errors=(404, 429, 507)),
    )
    yield (
        Route("/v1/batches", handler(JobsApi.list_batches)),
        Description("The batches, the newest first", errors=LISTING, query=PAGE),
    )
    yield (
        Route("/v1/batches/{batch_id}", handler(JobsApi.batch)),
        Description("How far a batch has come", errors=(404,)),
    )
    yield (
        Route("/v1/batches/{batch_id}/cancel", handler(JobsApi.cancel_batch), methods=["POST"]),
        Description("Cancel a batch; what is done is kept", errors=(404, 409, 507)),
    )
