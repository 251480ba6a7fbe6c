"""What can go wrong with an answer of the local hub: told by a test, or drawn at random from a seed."""

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
    """What goes wrong with the requests for a path, `times` times or (None) always.

    `method`: which requests. `status`, `code`, `headers`: an error instead of an answer (a list of
    files takes `headers` also without it). `drop_after`: so
    many bytes of the body, then the connection ends (by RST with `reset`). `stall`: seconds of silence before
    the answer, or at `drop_after`. `flip`: this byte of the file arrives changed. `ignore_range`: 200 and all
    of it. `size`: the file comes with so many bytes, cut off or followed by zeros. `announce`: another size,
    or `etag`, in the answer to HEAD; `location`: another address there. `since`: only requests for ranges
    that begin at this byte or later.
    """

    method: str = "GET"
    times: int | None = None
    status: int | None = None
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    reset: bool = False
    stall: float = 0.0
    flip: int | None = None
    ignore_range: bool = False
    size: int | None = None
    announce: int | None = None
    etag: str | None = None
    location: str | None = None
    since: int = 0

    @property
    def spares_body(self) -> bool:
        """Whether the bytes that were asked for come as they are."""
        return self.drop_after is None and self.flip is None and self.size is None


class RandomFaults:
    """Faults for a share of all answers, the same sequence for the same seed.

    Which request meets which fault still depends on the order in which a client's threads ask.
    """

    def __init__(self, seed: int, share: float = 0.1, longest_stall: float = 2.0) -> None:
        """`longest_stall` is in seconds; a client waits for most of them and gives up on none."""
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._share, self._longest_stall = share, longest_stall

    def draw(self, start: int, stop: int, *, body: bool) -> Fault:
        """For an answer with a file's bytes from `start` to `stop`, or for a short one without a `body`."""
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
