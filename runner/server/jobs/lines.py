"""Lines: the requests of a batch, as they are in its file, checked one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, Field

from runner.generation.model import Model
from runner.server import chat, completions
from runner.server.bodies import checked, parsed
from runner.server.engine import Growth
from runner.server.errors import ApiError, bad_request, quoted
from runner.server.jobs.batches import Batch
from runner.server.orders import Order
from runner.server.schemas import Body, ChatBody, CompletionBody
from runner.server.settings import Settings

METHOD = "POST"
ID_CHARACTERS = 24
# What is for a client that waits.
WAITING_FIELDS = ("stream", "stream_options", "cache")
# A seed that is drawn is short enough to be typed again.
DRAWN_SEED_BYTES = 4


class LineBody(Body):
    """A line as OpenAI has it."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How the requests of an endpoint are checked, done and answered."""

    schema: type[BaseModel]
    order_of: Callable[[Any, Model, Settings], Order]
    document: Callable[[Order, Model, Sequence[Growth]], dict[str, Any]]


FORMS = MappingProxyType(
    {
        "/v1/completions": Form(CompletionBody, completions.order_of, completions.document),
        "/v1/chat/completions": Form(ChatBody, chat.order_of, chat.document),
    }
)


@dataclass(frozen=True)
class Line:
    """Line number `number` of a file, from 1, and where it is."""

    number: int
    offset: int
    nbytes: int

    def read(self, path: Path) -> bytes:
        with path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.nbytes)


def lines_of(path: Path, most_bytes: int) -> Iterator[tuple[Line, bytes]]:
    """The lines of a file that are not blank. Of one that is longer than `most_bytes`, more than these are given."""
    number = offset = 0
    with path.open("rb") as file:
        while data := file.readline(most_bytes + 1):
            nbytes, number = len(data), number + 1
            while not data.endswith(b"\n") and (rest := file.readline(most_bytes + 1)):
                nbytes += len(rest)
                if rest.endswith(b"\n"):
                    break
            if data.strip():
                yield Line(number, offset, nbytes), data
            offset += nbytes


def read_line(data: bytes, endpoint: str, most_bytes: int) -> LineBody:
    """Raises `ApiError` if it is not a line for `endpoint`."""
    if len(data) > most_bytes:
        raise bad_request(f"a line may have up to {most_bytes:,} bytes")
    try:
        found = parsed(data)
    except ValueError as error:
        raise ApiError(400, f"not valid JSON: {str(error)[:100]}", code="invalid_json_line") from None
    if not isinstance(found, dict):
        raise ApiError(400, "a line must be a JSON object", code="invalid_json_line")
    line = checked(found, LineBody)
    if line.method != METHOD:
        raise ApiError(
            400, f"method must be {METHOD}, found {quoted(line.method)}", "method", "invalid_method"
        )
    if line.url != endpoint:
        message = f"url must be the batch's endpoint, {endpoint}, found {quoted(line.url)}"
        raise ApiError(400, message, "url", "invalid_url")
    return line


def order_of(line: LineBody, number: int, batch: Batch, model: Model, settings: Settings) -> Order:
    """What a line asks for, always the same. Raises `ApiError` for what can't be done, with the field in its body."""
    form = FORMS[batch.order.endpoint]
    for name in WAITING_FIELDS:
        if line.body.get(name) not in (None, False):
            raise bad_request(f"{name} is not for a batch: nobody waits for a line", f"body.{name}")
    try:
        body = checked(line.body, form.schema)
        if body.seed is None:
            drawn = _hash(batch, number, "seed")[: 2 * DRAWN_SEED_BYTES]
            body = body.model_copy(update={"seed": int(drawn, 16)})
        order = form.order_of(body, model, settings)
    except ApiError as error:
        param = f"body.{error.param}" if error.param else "body"
        raise ApiError(error.status, error.message, param, error.code) from None
    if len(order.requests) > settings.most_waiting:
        most = f"at most {settings.most_waiting:,} texts of a line"
        raise bad_request(f"{most}, found {len(order.requests):,}", "body.n")
    return replace(
        order,
        requests=tuple(replace(request, gives_way=True) for request in order.requests),
        id=line_id(batch, number),
        created=int(batch.created_at),
    )


def line_id(batch: Batch, number: int) -> str:
    """What the ids of a line and of its answer are made of."""
    return _hash(batch, number, "id")[:ID_CHARACTERS]


def _hash(batch: Batch, number: int, use: str) -> str:
    return hashlib.sha256(f"{batch.id} {batch.seed} {number} {use}".encode()).hexdigest()
