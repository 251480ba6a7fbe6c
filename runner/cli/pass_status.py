"""What a status line says of a pass that takes a minute: where it is, how fast it reads, when the next token comes."""

from __future__ import annotations

import time
from collections.abc import Callable

from runner.units import duration, rate

# What is expected of less than this is not worth words.
SHORTEST_PASS = 2.0


class PassStatus:
    """Follows the parts of passes; `bytes_read` gives the bytes of weights that were read so far."""

    def __init__(self, bytes_read: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_read, self._clock = bytes_read, clock
        self._begin, self._read = clock(), bytes_read()
        self._last_pass = 0.0

    def of(self, part: int, parts: int, left: int | None = None) -> tuple[str, ...]:
        """Statuses after `part` of the `parts` of a pass, the longest first; `left` tokens may still come."""
        now, read = self._clock(), self._bytes_read()
        seconds, nbytes = now - self._begin, read - self._read
        where = f"part {part} of {parts}"
        if part == parts:
            self._begin, self._read, self._last_pass = now, read, seconds
        to_come = seconds / part * (parts - part)
        speed = f", {rate(nbytes / seconds)}" if nbytes and seconds else ""
        found = [f"[{where}{speed}]", f"[{where}]"]
        whole = max(self._last_pass, seconds / part * parts)
        if whole >= SHORTEST_PASS:
            following = f"next token in {duration(to_come)}"
            found.insert(0, f"[{where}{speed}, {following}]")
            if left:
                found.insert(
                    0,
                    f"[{where}{speed}, {following}, all in at most {duration(to_come + whole * (left - 1))}]",
                )
        return tuple(found)
