"""Errors in OpenAI's shape: which status, which type, which field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from runner.errors import BloomdeskError
from runner.generation.grammar import GrammarError
from runner.server.engine import Stopped, Unavailable

# Characters of a client's own text that are quoted back.
LONGEST_QUOTE = 60
# From 0 to 1: how like a field's name an unknown one must be to count as misspelt.
LIKENESS = 0.75


class ApiError(Exception):
    """What a client is told instead of an answer; `param` is the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def document(self) -> dict[str, Any]:
        """{"error": {...}}, as openai-python reads it."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        return json.dumps(self.document).encode()


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, param)


def explained(error: BloomdeskError, param: str | None = None) -> ApiError:
    """The error for what the engine, or a check of the request, says."""
    message = error.message + (f": {error.hint}" if error.hint and isinstance(error, Stopped) else "")
    if isinstance(error, Stopped):
        return ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE, message, code="shutting_down", headers={"Retry-After": "30"}
        )
    if isinstance(error, Unavailable):
        return ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE, message, code="unavailable", headers={"Retry-After": "5"}
        )
    return bad_request(message, param)


def failed(error: BloomdeskError) -> ApiError:
    """The error for work that was begun and could not be ended."""
    if isinstance(error, Stopped):
        return explained(error)
    if isinstance(error, GrammarError):
        return bad_request(error.message, "response_format")
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, error.message, code="failed")


def of_validation(error: ValidationError, fields: Mapping[str, Any]) -> ApiError:
    """The error for the first thing that is wrong with a body, with the name of its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    # Inside a union, a location also names the alternatives.
    place = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        name = quoted(param or "")
        near = get_close_matches(place[-1], fields, 1, LIKENESS) if len(place) == 1 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return bad_request(f"unknown or unsupported field {name}{hint}", param)
    if first["type"] == "missing":
        return bad_request(f"{param} is required", param)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return bad_request(f"{param}: {message}" if param else message, param)


def quoted(text: str) -> str:
    """A client's text, short and without control characters, in quotes."""
    return ascii(text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}...")
