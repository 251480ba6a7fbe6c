"""What a request to the Hub can fail with, and the sentence that each failure becomes.

huggingface_hub gives the errors. It is imported inside the functions, so that `bloomdesk --help` stays fast.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, urlsplit

from runner.errors import BloomdeskError

RESUME = "run the same command again: it resumes where this one stopped"
TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class Resource:
    """What a request asks for: a file of a revision, or without `path` the revision itself.

    `named` if the revision is what the user has named, and not the one that a directory was begun from.
    """

    repo: str
    revision: str
    path: str = ""
    named: bool = False

    def __str__(self) -> str:
        return f"{self.path} of {self.repo}" if self.path else self.repo


class IncompleteAnswer(Exception):
    """An answer that ended early; another try may succeed. `host` is where it came from, if that is known."""

    def __init__(self, detail: str, host: str = "") -> None:
        super().__init__(detail)
        self.host = host


class ConnectionFailed(IncompleteAnswer):
    """A connection that could not be made, broke, or timed out."""


class WrongAnswer(IncompleteAnswer):
    """An answer that is not the one requested, like the page of a proxy; nothing of it was kept."""


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT as it is now, whenever huggingface_hub was imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def offline() -> bool:
    """True if HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE, as in huggingface_hub) forbids every request."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in TRUE


def network_errors() -> tuple[type[Exception], ...]:
    """Every exception that a request can raise because of the network or the Hub."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return (httpx2.HTTPError, httpx2.InvalidURL, HfHubHTTPError, OfflineModeIsEnabled, IncompleteAnswer)


def status_of(error: Exception) -> int | None:
    """The HTTP status of a failed request, or None if no answer came."""
    return getattr(getattr(error, "response", None), "status_code", None)


# passing: another try may succeed, also in an hour. wrong: somebody else answers, so a few tries must do.
Verdict = Literal["passing", "wrong", "final"]


def verdict(error: Exception) -> Verdict:
    """What another try may give; the one place that decides it."""
    import httpx2

    status = status_of(error)
    if isinstance(error, WrongAnswer) or status == 416:
        return "wrong"
    if status is not None:
        return "passing" if status in (408, 429) or status >= 500 else "final"
    if _distrusted(error) or _refused_by_proxy(error):
        return "final"
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return "final"
    return "passing" if isinstance(error, httpx2.TransportError | IncompleteAnswer) else "final"


def explain(error: Exception, resource: Resource) -> BloomdeskError:
    """The sentence for a failed request, and what to do about it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return offline_error(f"{resource} cannot be requested")
    if status_of(error) is not None:
        return _explain_status(error, resource)
    detail = str(error).strip() or type(error).__name__
    host = _host(error)
    distrusted = _distrusted(error)
    if distrusted is not None:
        why = distrusted.verify_message or "it cannot be checked"
        return BloomdeskError(
            f"the certificate of {host or endpoint()} is not trusted: {why}",
            "if a proxy inspects TLS here, set SSL_CERT_FILE to a file with its certificate too; "
            "else check this machine's clock and the network's sign-in page",
        )
    if _refused_by_proxy(error):
        return BloomdeskError(
            f"the proxy refuses {host or endpoint()}: {detail}",
            "check the proxy in HTTPS_PROXY or ALL_PROXY, and the name and password in it",
        )
    if isinstance(error, WrongAnswer):
        return BloomdeskError(
            f"{resource} does not come: {detail}",
            f"check the proxy, HF_ENDPOINT and the network's sign-in page, then {RESUME}",
        )
    if isinstance(error, IncompleteAnswer) and not isinstance(error, ConnectionFailed):
        return BloomdeskError(f"{_teller(host)} does not give {resource} whole: {detail}", RESUME)
    return BloomdeskError(
        f"{_teller(host)} cannot be reached for {resource}: {detail}",
        f"check the network and HF_ENDPOINT, then {RESUME}",
    )


def _host(error: Exception) -> str:
    """The host that a failed request went to, with its port if that is unusual, or "" if that is not known."""
    response = getattr(error, "response", None)
    try:
        request = error.request if response is None else response.request  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return getattr(error, "host", "")
    return host_of(str(request.url)) if request is not None else ""


def host_of(address: str) -> str:
    """ "huggingface.co", or "127.0.0.1:8000"."""
    return urlsplit(address).netloc.rpartition("@")[2]


def _teller(host: str) -> str:
    """The Hub, or the host that keeps its files."""
    hub = endpoint()
    return (
        f"the Hub at {hub}"
        if host in ("", host_of(hub))
        else f"{host}, where the Hub at {hub} sends for files,"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _distrusted(error: Exception) -> ssl.SSLCertVerificationError | None:
    """The reason if the other side's certificate is not trusted."""
    found = (each for each in _causes(error) if isinstance(each, ssl.SSLCertVerificationError))
    return next(found, None)


def _refused_by_proxy(error: Exception) -> bool:
    """True if the proxy wants a password, or lets nobody through."""
    import httpx2

    is_from_proxy = isinstance(error, httpx2.ProxyError) or "Tunnel connection failed" in str(error)
    return is_from_proxy and re.search(r"\b(403|407)\b", str(error)) is not None


def offline_error(what: str) -> BloomdeskError:
    """The error for something that needs the Hub while requests are forbidden."""
    return BloomdeskError(
        f"{what}: offline mode is on (HF_HUB_OFFLINE)", "unset HF_HUB_OFFLINE and run the command again"
    )


def not_a_hub(what: str) -> BloomdeskError:
    """The error for an answer that no Hub gives."""
    return BloomdeskError(
        f"{endpoint()} does not answer as a Hub does: {what}",
        "check HF_ENDPOINT, the proxy and the network's sign-in page",
    )


def _explain_status(error: Exception, resource: Resource) -> BloomdeskError:
    from huggingface_hub import errors, get_token

    status, hub, repo = status_of(error), endpoint(), resource.repo
    host = _host(error)
    page = f"{hub}/{quote(repo)}"
    origin = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of your login"
    token = origin if get_token() else ""
    if isinstance(error, errors.GatedRepoError):
        reason = f"{token} has not been given access" if token else "no token was sent"
        message = f"{repo} is gated, and {reason}"
        hint = f"accept its licence at {page}, then set HF_TOKEN to a token of that account"
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"{repo} has no revision {resource.revision!r}"
        hint = f"check --revision against {page}/commits/main, or leave it out"
        if not resource.named:
            message = f"{hub}: {message}, from which this is made"
            hint = f"if HF_ENDPOINT names a mirror, it may lack this commit; see {page}/commits/main"
    elif isinstance(error, errors.EntryNotFoundError):
        message = f"{repo} has no {resource.path} at revision {resource.revision}"
        hint = f"see its files: {page}/tree/main"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = f"{hub} has no repository {repo}, {f'or {token} may not read it' if token else 'or it is private'}"
        hint = "check the name; if it is private, set HF_TOKEN to a token that may read it"
    elif status == 401:
        message = f"{hub} does not accept {token or 'a request without a token'} for {resource}"
        hint = "set HF_TOKEN to a valid token, or unset it"
    elif status == 403:
        message = f"{hub} refuses access to {resource}"
        hint = f"see {page}; HF_TOKEN may need more permissions"
    elif status == 416:
        message = f"{host} ends {resource} before the bytes that the Hub says it has"
        hint = f"{RESUME}; if HF_ENDPOINT names a mirror, it may lack a part of the file"
    else:
        message = f"{hub if host in ('', host_of(hub)) else host} answered {status} for {resource}"
        hint = f"wait a while, then {RESUME}" if verdict(error) == "passing" else "check HF_ENDPOINT"
    return BloomdeskError(message, hint)
