"""The paths of jobs."""

from __future__ import annotations

from collections.abc import Iterator

from starlette.routing import Route

from runner.server.jobs.api import JobsApi
from runner.server.openapi import Description
from runner.server.schemas import BatchBody, FileForm


def routes_of(api: JobsApi) -> Iterator[tuple[Route, Description]]:
    """The routes, with their descriptions."""
    yield (
        Route("/v1/files", api.upload, methods=["POST"]),
        Description("Keep a file of requests", FileForm, sends="multipart/form-data"),
    )
    yield Route("/v1/files", api.list_files), Description("The files")
    yield Route("/v1/files/{file_id}", api.file), Description("What is known of a file")
    yield Route("/v1/files/{file_id}", api.delete_file, methods=["DELETE"]), Description("Delete a file")
    yield (
        Route("/v1/files/{file_id}/content", api.content),
        Description("The bytes of a file", None, ("application/octet-stream",)),
    )
    yield (
        Route("/v1/batches", api.create_batch, methods=["POST"]),
        Description("Do the requests of a file", BatchBody),
    )
    yield Route("/v1/batches", api.list_batches), Description("The batches, the newest first")
    yield Route("/v1/batches/{batch_id}", api.batch), Description("How far a batch has come")
    yield (
        Route("/v1/batches/{batch_id}/cancel", api.cancel_batch, methods=["POST"]),
        Description("Cancel a batch; what is done is kept"),
    )
