"""Faults in the local hub's answers: set by a test, or drawn at random from a seed."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

# How often each kind is drawn among the random faults of a file's bytes. A flipped byte is rare: it makes the
# client fetch a whole file again, which the others never do.
KINDS = {"drop": 8, "reset": 3, "stall": 3, "late": 2, "refuse": 6, "flip": 1}


@dataclass
class Fault:
    """A fault in the answers to requests for a path, `times` times or (None) always."""

    # Only requests with this method, and for ranges that begin at `since` or later.
    method: str = "GET"
    since: int = 0
    times: int | None = None
    # An error as the answer; a list of files takes `headers` also without it.
    status: int | None = None
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    # The connection ends after this many bytes of the body, by RST with `reset`.
    drop_after: int | None = None
    reset: bool = False
    # Seconds without data before the answer, or at `drop_after`.
    stall: float = 0.0
    # This byte of the file arrives changed.
    flip: int | None = None
    # The answer is 200 with all bytes.
    ignore_range: bool = False
    # The file arrives with this size, cut off or followed by zeros.
    size: int | None = None
    # The answer is 200 with this page of a proxy, of a type, in chunks without a length or with its length.
    page: bytes | None = None
    kind: str = "text/html"
    chunked: bool = False
    # The header of the answer comes byte by byte, after this many seconds each, and never ends.
    trickle: float = 0.0
    # In the answer to HEAD: another size, ETag or address.
    announce: int | None = None
    etag: str | None = None
    location: str | None = None

    @property
    def spares_body(self) -> bool:
        """Whether the requested bytes arrive unchanged."""
        return self.drop_after is None and self.flip is None and self.size is None


class RandomFaults:
    """Faults for a share of all answers, the same sequence for the same seed.

    Which request gets which fault still depends on the order of a client's threads.
    """

    def __init__(self, seed: int, share: float = 0.1, longest_stall: float = 2.0) -> None:
        """`longest_stall` is in seconds."""
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._share, self._longest_stall = share, longest_stall

    def draw(self, start: int, stop: int, *, body: bool) -> Fault:
        """The fault of an answer with a file's bytes from `start` to `stop`, or of a short one without a `body`."""
        with self._lock:
            if self._random.random() >= self._share:
                return Fault()
            kinds = KINDS if body and stop > start else {"late": 1, "refuse": 2}
            (kind,) = self._random.choices(list(kinds), list(kinds.values()))
            return self._fault(kind, start, stop)

    def _fault(self, kind: str, start: int, stop: int) -> Fault:
        pause = self._random.uniform(0, self._longest_stall)
        if kind == "late":
            return Fault(stall=pause)
        if kind == "refuse":
            status = self._random.choice((429, 500, 502, 503))
            return Fault(status=status, headers={"Retry-After": f"{pause:.0f}"} if status == 429 else {})
        if kind == "flip":
            return Fault(flip=self._random.randrange(start, stop))
        after = self._random.randrange(stop - start)
        return Fault(drop_after=after, reset=kind == "reset", stall=pause if kind == "stall" else 0.0)
