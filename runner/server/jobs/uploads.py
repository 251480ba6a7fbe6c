"""Uploads: a form with a file, bounded in bytes and time, kept in a temporary file while it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import BinaryIO
from urllib.parse import urlsplit

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from runner.server.errors import ApiError, bad_request, quoted
from runner.server.jobs.files import BLOCK, INPUT
from runner.server.settings import Settings

KIND = "multipart/form-data"
FIELDS = ("purpose", "file")
# Bytes of a field that is no file, and of what a form has around its file.
MOST_FIELD_BYTES, MOST_FORM_BYTES = 4096, 2**16
# So many are read that unknown ones can be named.
MOST_FIELDS = 32
LONGEST_NAME = 255
# Slower than this, in bytes a second, a client is taken to be gone.
SLOWEST = 50_000


@dataclass(frozen=True)
class Upload:
    """What a client sent: an open temporary file, and what it calls it."""

    filename: str
    file: BinaryIO

    def blocks(self) -> Iterator[bytes]:
        """Its bytes."""
        self.file.seek(0)
        while block := self.file.read(BLOCK):
            yield block


async def read_upload(request: Request, settings: Settings) -> Upload:
    """The file of a form, for the caller to close. Raises `ApiError` for any other body, or a longer one."""
    refuse_other_site(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != KIND:
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send a form: Content-Type: {KIND}")
    parser = MultiPartParser(
        request.headers,
        _bounded(request, settings),
        max_files=1,
        max_fields=MOST_FIELDS,
        max_part_size=MOST_FIELD_BYTES,
    )
    try:
        async with asyncio.timeout(settings.read_body + settings.most_file_bytes / SLOWEST):
            form = await parser.parse()
    except TimeoutError:
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "the file took too long to come") from None
    except ClientDisconnect:
        raise ApiError(HTTPStatus.BAD_REQUEST, "the client has gone") from None
    except MultiPartException as error:
        raise bad_request(f"the form is not valid: {error.message}") from None
    try:
        return _upload(form.multi_items())
    except ApiError:
        await form.close()
        raise


def refuse_other_site(request: Request) -> None:
    """Raise `ApiError` for a page of another site, whose forms a browser sends without asking."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(HTTPStatus.FORBIDDEN, "a page of another site may not send files here")


def _upload(fields: list[tuple[str, str | UploadFile]]) -> Upload:
    found = dict(fields)
    for name, _ in fields:
        if name not in FIELDS:
            raise bad_request(f"unknown or unsupported field {quoted(name)}", name[:LONGEST_NAME])
    if len(found) < len(fields):
        raise bad_request("each field may be given once")
    if found.get("purpose") != INPUT:
        raise bad_request(f'purpose must be "{INPUT}": files are for batches here', "purpose")
    file = found.get("file")
    if not isinstance(file, UploadFile):
        raise bad_request("file is required, with a name", "file")
    return Upload((file.filename or "file")[:LONGEST_NAME], file.file)


async def _bounded(request: Request, settings: Settings) -> AsyncGenerator[bytes, None]:
    most, nbytes = settings.most_file_bytes, 0
    async for piece in request.stream():
        nbytes += len(piece)
        if nbytes > most + MOST_FORM_BYTES:
            raise too_long(settings)
        yield piece


def too_long(settings: Settings) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"a file may have up to {settings.most_file_bytes:,} bytes",
        "file",
    )
