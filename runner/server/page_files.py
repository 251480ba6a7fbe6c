"""The page at `/`: a few files that a browser needs, and the rules that it is told to hold them to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
START = "index.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Whatever a text may hold, the page runs its own code alone, and asks nobody but this server.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.suffix in KINDS))
PATHS = frozenset({"/", *(f"/page/{name}" for name in NAMES if name != START)})


def page_routes() -> list[Route]:
    """A route for each file. No path that a client names is looked for on the disk."""
    return [
        Route("/" if name == START else f"/page/{name}", _endpoint(name), name=f"page/{name}")
        for name in NAMES
    ]


def _endpoint(name: str) -> Callable[[Request], Response]:
    path = FOLDER / name
    data = path.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": tag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=KINDS[path.suffix])

    return answer
