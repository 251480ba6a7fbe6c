"""Where the pass is: what clients that wait are told every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from runner.units import duration, rate


@dataclass(frozen=True)
class Progress:
    """Pass number `number`, from 1, after `part` of its `parts`; 0 before the first.

    `bytes_per_second` of weights are read in it, and `seconds_left` are expected to its end. `active` sequences share
    it, and `waiting` ones join later.
    """

    number: int = 0
    part: int = 0
    parts: int = 0
    bytes_per_second: float = 0.0
    seconds_left: float = 0.0
    active: int = 0
    waiting: int = 0

    @property
    def blocks(self) -> int:
        """Number of blocks; the embedding and the head are the other parts."""
        return max(0, self.parts - 2)

    @property
    def block(self) -> int:
        """Number of blocks that are done."""
        return min(self.blocks, max(0, self.part - 1))

    @property
    def words(self) -> str:
        """Like "pass 3, block 41 of 70, 2.1 GB/s, 22 s to the next token"."""
        if not self.active:
            return f"{self.waiting} waiting for a pass"
        found = (
            f"pass {self.number}, block {self.block} of {self.blocks}"
            if self.parts
            else f"pass {self.number}"
        )
        if self.bytes_per_second:
            found += f", {rate(self.bytes_per_second)}"
        if self.part:
            found += f", {duration(self.seconds_left)} to the next token"
        return found


class PassWatch:
    """Makes a `Progress` of each part of a pass; `bytes_read` gives the bytes of weights that were read so far."""

    def __init__(self, bytes_read: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_read, self._clock = bytes_read, clock
        self._number = 0
        self._began, self._read = clock(), 0

    def begin(self, active: int, waiting: int) -> Progress:
        """At the start of the next pass."""
        self._number += 1
        self._began, self._read = self._clock(), self._bytes_read()
        return Progress(self._number, active=active, waiting=waiting)

    def after(self, part: int, parts: int, active: int, waiting: int) -> Progress:
        """After `part` of the `parts` of the pass."""
        seconds, nbytes = self._clock() - self._began, self._bytes_read() - self._read
        speed = nbytes / seconds if seconds else 0.0
        return Progress(self._number, part, parts, speed, seconds / part * (parts - part), active, waiting)
