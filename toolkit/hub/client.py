"""Requests to the Hub: its JSON, where a file's bytes are, and those bytes as one stream.

huggingface_hub gives the session, the URLs, the token and the errors; it is imported inside the functions, so
that `bloomdesk --help` stays fast. Its own transfer, `http_get`, is not used: it collects 10 MiB before it writes
(a line that drops sooner makes no progress), accepts a 206 that begins at another byte, waits as long as any
Retry-After says, and starts over without limit if a server ignores ranges and drops.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from runner.errors import BloomdeskError
from toolkit.hub.environment import check_environment
from toolkit.hub.failures import (
    ConnectionFailed,
    Resource,
    WrongAnswer,
    endpoint,
    host_of,
    network_errors,
    not_a_hub,
)
from toolkit.hub.line import Line
from toolkit.hub.retry import RetryPolicy

# huggingface_hub reads this when it is first imported. Its telemetry would send a request before our first one.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Seconds for all of a short answer, name look-up and header included: one byte now and then is no answer.
SECONDS_OF_A_SHORT_ANSWER = 60.0
# An answer that does not say its length is held in memory until more has come than a proxy's page has.
LARGEST_PAGE = 2**20


Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Location:
    """Where a file's bytes are, and what the Hub says of it; `content_id` is a sha256 or a git blob sha1."""

    url: str
    headers: dict[str, str]
    commit: str | None
    size: int | None
    content_id: str | None
    cross_origin: bool


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers, logging

    if not (os.environ.get("HF_DEBUG") or os.environ.get("HF_HUB_VERBOSITY")):
        logging.set_verbosity_error()

    # Compressed answers could neither be resumed nor measured.
    headers = build_hf_headers(headers={"user-agent": "bloomdesk", "accept-encoding": "identity"})
    if not headers.get("authorization", "").isascii():
        raise BloomdeskError("HF_TOKEN holds characters that no token has", "set HF_TOKEN to the token alone")
    return headers


def fetch_json(path: str, resource: Resource, line: Line) -> Iterator[Any]:
    """The JSON answer to an API path, page after page.

    Raises `BloomdeskError` if the Hub refuses, cannot be reached, or answers with something else.
    """
    check_environment()
    from huggingface_hub.utils import hf_raise_for_status

    url: str | None = endpoint() + path
    seen = set()
    retries = RetryPolicy(resource, line)
    while url is not None:
        try:
            ask = partial(_get, url, _headers())
            response = _in_time(ask, host_of(url))
            hf_raise_for_status(response)
        except network_errors() as error:
            retries.backoff(error)
            continue
        try:
            page = response.json()
        except ValueError:
            kind = _kind(response)
            raise not_a_hub(f"{urlsplit(url).path} gave no JSON but {kind} of {response.url.host}") from None
        line.came()
        yield page
        retries.reset()
        seen.add(url)
        url = _next_page(response, resource)
        if url in seen:
            raise BloomdeskError(f"{endpoint()} gives the list of {resource}'s files without an end")


def _next_page(response: Any, resource: Resource) -> str | None:
    """The address of an answer's next page, or None after the last."""
    import httpx2

    link = None
    try:
        link = response.links.get("next", {}).get("url")
        url = str(response.url.join(link)) if link else None
        cross_origin = url is not None and _origin(url) != _origin(str(response.url))
    except (httpx2.InvalidURL, ValueError):
        raise _bad_address(resource, link) from None
    # The token is sent there too.
    if cross_origin:
        raise BloomdeskError(f"{endpoint()} sends the list of {resource}'s files to another host: {url}")
    return url


def _bad_address(resource: Resource, address: object) -> BloomdeskError:
    detail = f": {address!r}" if address else ""
    return not_a_hub(f"it sends {resource} to an invalid address{detail}")


def locate(resource: Resource) -> Location:
    """The location of a file, by a request to the Hub.

    Raises one of `network_errors`, and `BloomdeskError` if the location is no valid address.
    """
    check_environment()
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    headers, hub = _headers(), endpoint()
    url = hf_hub_url(resource.repo, resource.path, revision=resource.revision, endpoint=hub)
    timeout, address = read_timeout(short_answer=True), None
    try:
        ask = partial(get_hf_file_metadata, url, headers=headers, timeout=timeout, endpoint=hub)
        found = _in_time(ask, host_of(url))
        address = found.location
        if httpx2.URL(address).scheme not in ("http", "https") or not _origin(address)[1]:
            raise ValueError(address)
        cross_origin = _origin(address) != _origin(hub)
    except ValueError:
        raise _bad_address(resource, address) from None
    if found.commit_hash is None and found.etag is None:
        host = host_of(address)
        raise WrongAnswer(f"{host} answers as no Hub does, without a commit and a hash", host)
    # A CDN gets the signed address and never the token.
    if cross_origin:
        headers.pop("authorization", None)
    return Location(address, headers, found.commit_hash, found.size, found.etag, cross_origin)


@contextmanager
def stream(location: Location, start: int, stop: int | None = None) -> Iterator[tuple[int, Iterator[bytes]]]:
    """A file's bytes from `start`, up to `stop` or the end, and the position at which the answer begins.

    That is 0 if the server ignored the range; then all of the file comes. Raises one of `network_errors`.
    """
    whole = start == 0 and stop is None
    asked = {} if whole else {"range": f"bytes={start}-{'' if stop is None else stop - 1}"}
    host = host_of(location.url)
    response = _in_time(partial(_open, location.url, {**location.headers, **asked}), host)
    try:
        position = first_byte(response, location, start)
        total = response.headers.get("content-range", "").rpartition("/")[2]
        if stop is not None and total.isdecimal() and location.size not in (None, int(total)):
            raise WrongAnswer(f"asked for bytes of {location.size:,}, got bytes of {int(total):,}", host)
        blocks = response.iter_bytes()
        if response.status_code != 206 and "content-length" not in response.headers:
            blocks = _beyond_a_page(blocks, response, location)
        yield position, blocks
    finally:
        response.close()


def _beyond_a_page(blocks: Iterator[bytes], response: Any, location: Location) -> Iterator[bytes]:
    """The bytes of an answer that does not say its length, once it is longer than a page, or as long as the file.

    Raises `WrongAnswer` if it ends before or goes on beyond.
    """
    held, size = bytearray(), location.size
    for block in blocks:
        held += block
        if len(held) > LARGEST_PAGE and (size is None or size > LARGEST_PAGE):
            yield bytes(held)
            yield from blocks
            return
        if size is not None and len(held) > size:
            break
    if size is not None and len(held) != size:
        kind, host = _kind(response), response.url.host
        raise WrongAnswer(f"{host} sent {len(held):,} bytes of {kind} in place of the file's {size:,}", host)
    yield bytes(held)


def first_byte(response: Any, location: Location, start: int) -> int:
    """The position at which an answer (an httpx2 response) begins: `start`, or 0 if the range was ignored.

    Raises one of `network_errors` if the answer is a refusal, begins at another byte, or is not the file's: a proxy's
    page is HTML, or has another length.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import hf_raise_for_status

    host, size = response.url.host, location.size
    try:
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        # Signed addresses expire; the next try asks the Hub for a new one.
        if location.cross_origin and response.status_code in (400, 401, 403, 404, 410):
            raise WrongAnswer(f"{host}, the file's store, answered {response.status_code}", host) from error
        raise
    kind = _kind(response)
    if "html" in kind.lower():
        raise WrongAnswer(f"{host} sent a page ({kind}) in place of the file", host)
    if response.status_code != 206:
        length = response.headers.get("content-length", "")
        if length.isdecimal() and size not in (None, int(length)):
            raise WrongAnswer(
                f"{host} sent {int(length):,} bytes of {kind} in place of the file's {size:,}", host
            )
        return 0
    found = response.headers.get("content-range")
    match = re.match(r"bytes (\d+)-", found or "")
    if match is None or int(match[1]) != start:
        raise WrongAnswer(f"asked for bytes from {start}, got {found!r} from {host}", host)
    return start


def _kind(response: Any) -> str:
    """What an answer says that it is."""
    return response.headers.get("content-type", "unknown type")[:60]


def _get(url: str, headers: dict[str, str]) -> Any:
    from huggingface_hub.utils import get_session

    return get_session().get(url, headers=headers, timeout=read_timeout(short_answer=True))


def _open(url: str, headers: dict[str, str]) -> Any:
    """The answer to a request with its header; its bytes are still to come."""
    from huggingface_hub.utils import get_session

    session = get_session()
    request = session.build_request("GET", url, headers=headers, timeout=read_timeout())
    return session.send(request, stream=True)


def _in_time(ask: Callable[[], Answer], host: str) -> Answer:
    """What `ask` gets over the session; raises `ConnectionFailed` if that takes longer than any short answer.

    After a failed connection the session is made anew: another address, proxy or certificate may be right by now.
    """
    import httpx2
    from huggingface_hub.utils import close_session

    answers: list[Answer] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True, name=f"request to {host}")
    thread.start()
    thread.join(SECONDS_OF_A_SHORT_ANSWER)
    if answers:
        return answers[0]
    if failures:
        if isinstance(failures[0], httpx2.TransportError):
            close_session()
        raise failures[0]
    close_session()
    raise ConnectionFailed(f"no whole answer within {SECONDS_OF_A_SHORT_ANSWER:.0f} seconds", host)


def read_timeout(*, short_answer: bool = False) -> float:
    """Seconds without a byte after which a request fails, within a file's bytes or in a short answer."""
    from huggingface_hub import constants

    return constants.HF_HUB_ETAG_TIMEOUT if short_answer else constants.HF_HUB_DOWNLOAD_TIMEOUT


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
