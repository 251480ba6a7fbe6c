"""What a request to the Hub can fail with, and the sentence that each failure becomes.

huggingface_hub gives the errors. It is imported inside the functions, so that `bloomdesk --help` stays fast.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import quote

from runner.errors import BloomdeskError

RESUME = "run the same command again: it resumes where this one stopped"
TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class Resource:
    """What a request asks for: a file of a revision, or without `path` the revision itself."""

    repo: str
    revision: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.path} of {self.repo}" if self.path else self.repo


class IncompleteAnswer(Exception):
    """An answer that ended early or is not the one requested; another try may succeed."""


class ConnectionFailed(IncompleteAnswer):
    """A connection that could not be made, broke, or timed out."""


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


def is_transient(error: Exception) -> bool:
    """True if another try may succeed."""
    import httpx2

    status = status_of(error)
    if status is not None:
        return status in (408, 416, 429) or status >= 500
    if isinstance(error, httpx2.TransportError):
        return not isinstance(error, (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError))
    return isinstance(error, IncompleteAnswer)


def explain(error: Exception, resource: Resource) -> BloomdeskError:
    """The sentence for a failed request, and what to do about it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return offline_error(f"{resource} cannot be requested")
    if status_of(error) is not None:
        return _explain_status(error, resource)
    detail = str(error).strip() or type(error).__name__
    if isinstance(error, IncompleteAnswer) and not isinstance(error, ConnectionFailed):
        return BloomdeskError(f"the Hub at {endpoint()} does not give {resource} whole: {detail}", RESUME)
    return BloomdeskError(
        f"the Hub at {endpoint()} cannot be reached for {resource}: {detail}",
        f"check the network and HF_ENDPOINT, then {RESUME}",
    )


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
    else:
        message = f"{hub} answered {status} for {resource}"
        hint = f"wait a while, then {RESUME}" if is_transient(error) else "check HF_ENDPOINT"
    return BloomdeskError(message, hint)
