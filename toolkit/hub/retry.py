"""The retry policy: which failed requests are tried again, after which pause, and for how long."""

from __future__ import annotations

import re
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from runner.errors import BloomdeskError
from toolkit.hub.failures import RESUME, Resource, Verdict, explain, status_of, verdict
from toolkit.hub.line import Line, nothing

# Seconds to pause before each retry; a request that fails once more than there are numbers is given up, or waits for
# the end of an outage.
BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0)
# Pauses within an outage begin with the first number, double, and end with the second one.
OUTAGE_BACKOFF = (15.0, 60.0)
# If the Hub asks for a longer pause than this and than patience allows, the command ends and the user decides.
LONGEST_WAIT = 300.0


class RetryPolicy:
    """Counts consecutive failures of requests for one resource, and pauses longer after each."""

    def __init__(self, resource: Resource, line: Line, check: Callable[[], None] = nothing) -> None:
        """`check` is called now and then during a pause; it may raise to end it."""
        self._resource, self._line, self._check = resource, line, check
        self._failures: dict[Verdict, int] = {}

    def reset(self) -> None:
        """Forget earlier failures: new bytes came."""
        self._failures = {}

    def backoff(self, error: Exception) -> None:
        """Pause before the next try; `BloomdeskError` if that can't help, or patience is used up."""
        kind, patience = verdict(error), self._line.patience_left()
        failures = self._failures[kind] = self._failures.get(kind, 0) + 1
        few = len(BACKOFF)
        if kind == "final" or (failures > few and (kind == "wrong" or patience <= 0)):
            raise explain(error, self._resource) from error
        asked = retry_after(error, self._line.clock.time())
        if asked > max(LONGEST_WAIT, patience):
            raise BloomdeskError(
                f"the Hub takes no more requests for {self._resource} for {asked:.0f} seconds",
                f"wait that long, then {RESUME}; a token in HF_TOKEN raises the limit",
            ) from error
        pause = BACKOFF[failures - 1] if failures <= few else min(_outage_pause(failures - few), patience)
        why = explain(error, self._resource).message
        self._line.pause(max(pause, asked), why, self._check, asked=asked > pause)


def _outage_pause(number: int) -> float:
    """Seconds of the first, second, ... pause after the few of `BACKOFF`."""
    first, longest = OUTAGE_BACKOFF
    return min(longest, first * 2.0 ** (min(number, 9) - 1))


def retry_after(error: Exception, now: float) -> float:
    """Seconds that the Hub asks us to wait, by Retry-After or its rate limit headers; else 0.

    `now` is in seconds since 1970: Retry-After may be a date.
    """
    from huggingface_hub.utils import parse_ratelimit_headers

    if status_of(error) not in (429, 503):
        return 0.0
    headers = error.response.headers  # type: ignore[attr-defined]
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    wait = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", wait):
        return float(wait)
    try:
        return max(0.0, parsedate_to_datetime(wait).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0
