"""The retry policy: which failed requests are tried again, after which wait, and how often."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from runner.errors import BloomdeskError
from toolkit.hub.failures import RESUME, Resource, explain, is_transient, status_of

# Seconds to wait before each retry; a request that fails once more than there are numbers is given up.
BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0)
# If the Hub asks for a longer wait in seconds, the command ends and the user decides.
LONGEST_WAIT = 300.0


class RetryPolicy:
    """Counts consecutive failures of requests for one resource, and waits longer after each."""

    def __init__(self, resource: Resource, wait: Callable[[float], object] | None = None) -> None:
        """`wait` waits that many seconds; it may raise to end the wait."""
        self._resource, self._wait = resource, wait or time.sleep
        self._failures = 0

    def reset(self) -> None:
        """Forget earlier failures: new bytes came."""
        self._failures = 0

    def backoff(self, error: Exception) -> None:
        """Wait before the next try; `BloomdeskError` if `error` is permanent or one failure too many."""
        if not is_transient(error) or self._failures >= len(BACKOFF):
            raise explain(error, self._resource) from error
        seconds = max(BACKOFF[self._failures], retry_after(error))
        if seconds > LONGEST_WAIT:
            raise BloomdeskError(
                f"the Hub takes no more requests for {self._resource} for {seconds:.0f} seconds",
                f"wait that long, then {RESUME}; a token in HF_TOKEN raises the limit",
            ) from error
        self._failures += 1
        self._wait(seconds)


def retry_after(error: Exception) -> float:
    """Seconds that the Hub asks us to wait, by Retry-After or its rate limit headers; else 0."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if status_of(error) not in (429, 503):
        return 0.0
    headers = error.response.headers  # type: ignore[attr-defined]
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    wait = headers.get("retry-after", "").strip()
    return float(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else 0.0
