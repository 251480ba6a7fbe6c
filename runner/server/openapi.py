"""`/openapi.json`: the description of all paths, made of the schemas that check the bodies."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

_REFERENCE = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS = {
    400: "A field is unknown, wrong or can't be done; the error names it",
    401: "The key is missing or wrong",
    403: "The server is not called by this name, or a page of another site asks",
    404: "There is no such thing",
    408: "The body took too long to come",
    409: "Something else needs it, or it has ended",
    413: "The body is too long",
    415: "The body is of another kind",
    429: "Too many wait; Retry-After says when to come again",
    500: "It was begun and could not be done",
    503: "The model is loading, the server ends, or too many connect or bring new schemas",
    507: "The server's disk takes no more",
}
# What any path may answer, and what one that takes a body may.
_ANYWHERE, _WITH_BODY = (401, 403, 500, 503), (400, 408, 413, 415)


@dataclass(frozen=True)
class Description:
    """What a route does, in one line; `body` is what it takes, `answers` the kinds of content that it gives.

    `sends` is the kind of content of the body, `query` has the schemas of what may follow the path, and `errors` are
    the statuses beside those of any such path.
    """

    summary: str
    body: type[BaseModel] | None = None
    answers: tuple[str, ...] = ("application/json",)
    sends: str = "application/json"
    errors: tuple[int, ...] = ()
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def description(routes: Iterable[tuple[Route, Description]]) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    routes = list(routes)
    bodies = sorted({each.body for _, each in routes if each.body}, key=lambda body: body.__name__)
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route, described in routes:
        path = route.path.replace(":path}", "}")
        for method in sorted(route.methods or ()):
            if method != "HEAD":
                paths.setdefault(path, {})[method.lower()] = _operation(route, described)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bloomdesk",
            "version": importlib.metadata.version("bloomdesk"),
            "description": "One BLOOM by OpenAI's protocol.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(route: Route, described: Description) -> dict[str, Any]:
    found: dict[str, Any] = {"summary": described.summary}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {**_TEXT, "minLength": 1}}
        for name in route.param_convertors
    ]
    parameters += [
        {"name": name, "in": "query", "schema": dict(schema)} for name, schema in described.query.items()
    ]
    if parameters:
        found["parameters"] = parameters
    if described.body:
        reference = {"$ref": _REFERENCE.format(model=described.body.__name__)}
        found["requestBody"] = {"required": True, "content": {described.sends: {"schema": reference}}}
    content = {
        kind: {"schema": {"type": "object"} if "json" in kind else _TEXT} for kind in described.answers
    }
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    found["responses"] = {
        "200": {"description": "OK", "content": content},
        **{
            str(status): {"description": _ERRORS[status], "content": error}
            for status in sorted({*_ANYWHERE, *(_WITH_BODY if described.body else ()), *described.errors})
        },
    }
    return found
