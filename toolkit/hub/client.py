"""Requests to the Hub: where they go, what is tried again, and the one sentence that each failure becomes.

huggingface_hub gives the session, the URLs, the token and the errors; it is imported inside the functions, so
that `bloomdesk --help` does not pay for it. Its own transfer, `http_get`, is not used: it gathers 10 MiB
before it writes (a line that drops sooner never gets on), takes a 206 that begins elsewhere, waits as long as
any Retry-After says, and starts over for ever where a server ignores ranges and drops.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from runner.errors import BloomdeskError

# Seconds before each new try after a failure that brought nothing new; as many tries as there are numbers.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
# A Hub that asks for a longer pause than this is not waited for: the user decides.
LONGEST_PAUSE = 300.0
GO_ON = "run the same command again: it goes on where this one stopped"
TRUE = {"1", "ON", "YES", "TRUE"}
# huggingface_hub reads this when it is first imported. Its telemetry would make a request of its own, for a
# list of programs that it might be running in, before the first one that we ask for.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@dataclass(frozen=True)
class Asked:
    """What a request is about, so that its failure can be worded."""

    repo: str
    revision: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.path} of {self.repo}" if self.path else self.repo


@dataclass(frozen=True)
class Location:
    """Where a file's bytes are, and what the Hub says of it; `content_id` is a sha256 or a git blob sha1."""

    url: str
    headers: dict[str, str]
    commit: str | None
    size: int | None
    content_id: str | None
    elsewhere: bool


class CutShort(Exception):
    """An answer that ended early or is not the one that was asked for; another try may bring the rest."""


class Unreachable(CutShort):
    """A connection that could not be made, broke or fell silent."""


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT as it is now, whenever huggingface_hub was imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE, as in huggingface_hub) forbids every request."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in TRUE


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers, logging

    if not (os.environ.get("HF_DEBUG") or os.environ.get("HF_HUB_VERBOSITY")):
        logging.set_verbosity_error()  # its warnings do not belong on our terminal

    # Compressed answers could neither be resumed nor measured.
    headers = build_hf_headers(headers={"user-agent": "bloomdesk", "accept-encoding": "identity"})
    if not headers.get("authorization", "").isascii():
        raise BloomdeskError("HF_TOKEN holds characters that no token has", "set HF_TOKEN to the token alone")
    return headers


def network_errors() -> tuple[type[Exception], ...]:
    """Everything that a request can raise for reasons of the network or of the Hub."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return (httpx2.HTTPError, httpx2.InvalidURL, HfHubHTTPError, OfflineModeIsEnabled, CutShort)


def fetch_json(path: str, asked: Asked) -> Iterator[Any]:
    """The JSON answer to an API path, one page after another where the Hub gives it in pages.

    Raises `BloomdeskError` where the Hub refuses, cannot be reached, or answers with something else.
    """
    from huggingface_hub.utils import get_session, hf_raise_for_status

    url: str | None = endpoint() + path
    asked_for = set()
    patience = Patience(asked)
    while url is not None:
        try:
            headers = _headers()
            response = get_session().get(url, headers=headers, timeout=silence(short_answer=True))
            hf_raise_for_status(response)
        except network_errors() as error:
            patience.bear(error)
            continue
        try:
            page = response.json()
        except ValueError:
            raise BloomdeskError(
                f"{endpoint()} does not answer as a Hub does: {urlsplit(url).path} gave no JSON",
                "check HF_ENDPOINT, the proxy and the network's sign-in page",
            ) from None
        yield page
        patience.calm()
        asked_for.add(url)
        url = _following(response, asked)
        if url in asked_for:
            raise BloomdeskError(f"{endpoint()} gives the list of {asked}'s files without an end")


def _following(response: Any, asked: Asked) -> str | None:
    """The address of an answer's next page."""
    import httpx2

    link = None
    try:
        link = response.links.get("next", {}).get("url")
        url = str(response.url.join(link)) if link else None
        elsewhere = url is not None and _origin(url) != _origin(str(response.url))
    except (httpx2.InvalidURL, ValueError):
        raise _no_address(asked, link) from None
    if elsewhere:  # the token goes there too
        raise BloomdeskError(f"{endpoint()} sends the list of {asked}'s files to another host: {url}")
    return url


def _no_address(asked: Asked, given: object) -> BloomdeskError:
    where = f": {given!r}" if given else ""
    return BloomdeskError(
        f"{endpoint()} does not answer as a Hub does: it sends {asked} to an address that is none{where}",
        "check HF_ENDPOINT, the proxy and the network's sign-in page",
    )


def locate(asked: Asked) -> Location:
    """Ask the Hub for a file's place.

    Raises one of `network_errors`, and `BloomdeskError` where the place has no address that makes sense.
    """
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    headers, hub = _headers(), endpoint()
    url = hf_hub_url(asked.repo, asked.path, revision=asked.revision, endpoint=hub)
    place = None
    try:
        found = get_hf_file_metadata(url, headers=headers, timeout=silence(short_answer=True), endpoint=hub)
        place = found.location
        if httpx2.URL(place).scheme not in ("http", "https") or not _origin(place)[1]:
            raise ValueError(place)
        elsewhere = _origin(place) != _origin(hub)
    except ValueError:
        raise _no_address(asked, place) from None
    if elsewhere:  # a CDN gets the signed address and never the token
        headers.pop("authorization", None)
    return Location(place, headers, found.commit_hash, found.size, found.etag, elsewhere)


@contextmanager
def stream(location: Location, start: int, stop: int | None = None) -> Iterator[tuple[int, Iterator[bytes]]]:
    """A file's bytes from `start` up to `stop` or its end, as they arrive, with the position at which the answer
    really begins: 0 if the server ignored the range. Raises one of `network_errors`."""
    from huggingface_hub.utils import get_session

    headers = location.headers
    if start or stop is not None:
        headers = {**headers, "range": f"bytes={start}-{'' if stop is None else stop - 1}"}
    with get_session().stream("GET", location.url, headers=headers, timeout=silence()) as response:
        yield beginning(response, location, start), response.iter_bytes()


def beginning(response: Any, location: Location, start: int) -> int:
    """The position at which an answer (an httpx2 response) begins: `start`, or 0 where the range was ignored.

    Raises one of `network_errors` where the answer is a refusal or begins elsewhere.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import hf_raise_for_status

    try:
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        if location.elsewhere and response.status_code in (400, 401, 403, 404, 410):
            # Signed addresses run out; the next try asks the Hub for a new one.
            raise CutShort(f"the file's store answered {response.status_code}") from error
        raise
    if response.status_code != 206:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    if match is None or int(match[1]) != start:
        raise CutShort(f"asked for bytes from {start}, got {response.headers.get('content-range')!r}")
    return start


def silence(*, short_answer: bool = False) -> float:
    """Seconds of silence that are borne within a file's bytes, or in a short answer."""
    from huggingface_hub import constants

    return constants.HF_HUB_ETAG_TIMEOUT if short_answer else constants.HF_HUB_DOWNLOAD_TIMEOUT


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class Patience:
    """How many failures in a row are borne, and how long each is waited for."""

    def __init__(self, asked: Asked, pause: Callable[[float], object] | None = None) -> None:
        """`pause` waits so many seconds; it may raise to end the wait."""
        self._asked, self._pause = asked, pause or time.sleep
        self._failures = 0

    def calm(self) -> None:
        """Something new came: earlier failures no longer count."""
        self._failures = 0

    def bear(self, error: Exception) -> None:
        """Wait before the next try; `BloomdeskError` where the error will not pass or has come too often."""
        if not _may_pass(error) or self._failures >= len(WAITS):
            raise explain(error, self._asked) from error
        pause = max(WAITS[self._failures], _asked_pause(error))
        if pause > LONGEST_PAUSE:
            raise BloomdeskError(
                f"the Hub takes no more requests for {self._asked} for {pause:.0f} seconds",
                f"wait that long, then {GO_ON}; a token in HF_TOKEN raises the limit",
            ) from error
        self._failures += 1
        self._pause(pause)


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    import httpx2

    status = _status(error)
    if status is not None:
        return status in (408, 416, 429) or status >= 500
    if isinstance(error, httpx2.TransportError):
        return not isinstance(error, (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError))
    return isinstance(error, CutShort)


def _asked_pause(error: Exception) -> float:
    """Seconds for which the Hub asks to be left alone: Retry-After, or its own rate limit headers."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if _status(error) not in (429, 503):
        return 0.0
    headers = error.response.headers  # type: ignore[attr-defined]
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    wait = headers.get("retry-after", "").strip()
    return float(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else 0.0


def explain(error: Exception, asked: Asked) -> BloomdeskError:
    """The sentence for a failed request, and what to do about it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return offline_error(f"{asked} cannot be asked for")
    if _status(error) is not None:
        return _explain_answer(error, asked)
    detail = str(error).strip() or type(error).__name__
    if isinstance(error, CutShort) and not isinstance(error, Unreachable):
        return BloomdeskError(f"the Hub at {endpoint()} does not give {asked} whole: {detail}", GO_ON)
    return BloomdeskError(
        f"the Hub at {endpoint()} cannot be reached for {asked}: {detail}",
        f"check the network and HF_ENDPOINT, then {GO_ON}",
    )


def offline_error(what: str) -> BloomdeskError:
    """The error for something that needs the Hub while requests are forbidden."""
    return BloomdeskError(
        f"{what}: offline mode is on (HF_HUB_OFFLINE)", "unset HF_HUB_OFFLINE and run the command again"
    )


def _explain_answer(error: Exception, asked: Asked) -> BloomdeskError:
    from huggingface_hub import errors, get_token

    status, hub = _status(error), endpoint()
    page = f"{hub}/{quote(asked.repo)}"
    kept = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of your login"
    token = kept if get_token() else ""
    if isinstance(error, errors.GatedRepoError):
        who = f"{token} has not been given access" if token else "no token was sent"
        return BloomdeskError(
            f"{asked.repo} is gated, and {who}",
            f"accept its licence at {page}, then set HF_TOKEN to a token of that account",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BloomdeskError(
            f"{asked.repo} has no revision {asked.revision!r}",
            f"check --revision against {page}/commits/main, or leave it out",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return BloomdeskError(
            f"{asked.repo} has no {asked.path} at revision {asked.revision}",
            f"see its files: {page}/tree/main",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "if it is private, set HF_TOKEN to a token that may read it"
        why = f"or {token} may not read it" if token else "or it is private"
        return BloomdeskError(f"{hub} has no repository {asked.repo}, {why}", f"check the name; {hint}")
    if status == 401:
        hint = "set HF_TOKEN to a valid token, or unset it"
        return BloomdeskError(
            f"{hub} does not accept {token or 'a request without a token'} for {asked}", hint
        )
    if status == 403:
        return BloomdeskError(
            f"{hub} refuses access to {asked}", f"see {page}; HF_TOKEN may need more permissions"
        )
    said = f"{hub} answered {status} for {asked}"
    return BloomdeskError(said, f"wait a while, then {GO_ON}" if _may_pass(error) else "check HF_ENDPOINT")
