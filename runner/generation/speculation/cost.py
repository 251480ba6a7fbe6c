"""The cost model: seconds of a pass by its rows, learned from the passes before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from runner.weights.stream import Stream

# Prior for the cost of a further row, relative to that of the first: measured with the kernel and weights far larger
# than a processor's caches.
SLOPE = 0.3
# Weight of the prior against one measurement; it decides only while there are none.
SLOPE_WEIGHT = 0.05
# Weight of the newest pass against those before it with as many rows.
NEWEST = 0.3


class CostModel:
    """Seconds of a pass: the longer of what the disk needs and of what computing needs.

    Computing is `first_row + further_row * (rows - 1)`, fitted by weighted least squares to the seconds of each number
    of rows, relative to what they are expected to be, with `further_row = SLOPE * first_row` as a weak prior.
    """

    def __init__(self) -> None:
        self.disk_seconds = 0.0
        # Computing of all passes but rough ones.
        self.spent_seconds = 0.0
        self.first_row = self.further_row = 0.0
        self._seconds_by_rows: dict[int, float] = {}
        self._is_rough = False

    @contextmanager
    def measure(self, stream: Stream, rows: int) -> Iterator[None]:
        """Learn from the pass of `rows` rows that the block under this runs, with the weights of `stream`."""
        before, traffic = replace(stream.traffic), stream.traffic
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        computing = max(0.0, seconds - (traffic.waiting_seconds - before.waiting_seconds))
        disk_seconds, fetched = self.disk_seconds, traffic.bytes_read - before.bytes_read
        if fetched:
            reading = traffic.reading_seconds - before.reading_seconds
            disk_seconds = stream.streamed_bytes * reading / fetched
        # A pass that loads resident weights is slower than all later ones.
        is_rough = traffic.bytes_loaded > before.bytes_loaded
        self.spent_seconds += 0.0 if is_rough else computing
        self.learn(rows, computing, disk_seconds, is_rough=is_rough)

    def learn(self, rows: int, computing: float, disk_seconds: float, *, is_rough: bool = False) -> None:
        """A pass of `rows` rows computed for `computing` seconds; the disk needs `disk_seconds` to stream weights.

        A rough measurement, as of a pass that also loads weights, counts until there is a better one.
        """
        self.disk_seconds = disk_seconds
        if is_rough and self._seconds_by_rows and not self._is_rough:
            return
        if self._is_rough:
            self._seconds_by_rows.clear()
        self._is_rough = is_rough
        before = self._seconds_by_rows.get(rows, computing)
        self._seconds_by_rows[rows] = before + NEWEST * (computing - before)
        self._fit()

    def _fit(self) -> None:
        # With v = rows - 1: sums of weights w, w * v, w * v * v, and of w * seconds, w * v * seconds.
        w, wv, wvv = (SLOPE_WEIGHT * each for each in (SLOPE * SLOPE, -SLOPE, 1.0))
        ws = wvs = 0.0
        for rows, seconds in self._seconds_by_rows.items():
            v = rows - 1
            weight = 1 / (1 + SLOPE * v) ** 2
            w, wv, wvv = w + weight, wv + weight * v, wvv + weight * v * v
            ws, wvs = ws + weight * seconds, wvs + weight * v * seconds
        self.further_row = max(0.0, (w * wvs - wv * ws) / (w * wvv - wv * wv))
        self.first_row = max(0.0, (ws - wv * self.further_row) / w)

    def computing(self, rows: int) -> float:
        """Seconds of computing; 0 before the first measurement."""
        return self.first_row + self.further_row * (rows - 1)

    def seconds(self, rows: int) -> float:
        """Seconds of a pass; reading and computing overlap."""
        return max(self.disk_seconds, self.computing(rows))
