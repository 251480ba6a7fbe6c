"""What a pass takes, learned from those before: the longer of what the disk and what computing needs."""

from __future__ import annotations

# What a further row adds to the computing of one row, until it is known better: measured with the kernel and weights
# far larger than a processor's caches.
SLOPE = 0.3
# Of what earlier passes say, how much counts beside the latest.
MEMORY = 0.9


class Pace:
    """Seconds of a pass by its number of rows.

    Computing is taken as a + b * (rows - 1), fitted by least squares to the passes seen, each relative to what it is
    expected to take, the later ones counting more, and to b = `SLOPE` * a as if it had been seen once.
    """

    def __init__(self) -> None:
        self._squares = [0.0, 0.0, 0.0]  # sums of the weights, times v, times v * v, where v is rows - 1
        self._products = [0.0, 0.0]  # sums of the seconds, times v
        self.disk_seconds = 0.0
        self._one_row, self._further = 0.0, 0.0

    @property
    def known(self) -> bool:
        return self._one_row > 0

    def learn(self, rows: int, computing: float, disk_seconds: float) -> None:
        """A pass of `rows` rows computed for so many seconds; the disk needs `disk_seconds` for what is streamed."""
        v = rows - 1
        weight = 1 / (1 + SLOPE * v) ** 2
        self._squares = [
            MEMORY * old + weight * new for old, new in zip(self._squares, (1, v, v * v), strict=True)
        ]
        self._products = [
            MEMORY * old + weight * new
            for old, new in zip(self._products, (computing, v * computing), strict=True)
        ]
        self.disk_seconds = disk_seconds
        self._fit()

    def _fit(self) -> None:
        ones, vs, squares = self._squares
        ones, vs, squares = ones + SLOPE * SLOPE, vs - SLOPE, squares + 1
        first, second = self._products
        further = max(0.0, (ones * second - vs * first) / (ones * squares - vs * vs))
        self._one_row, self._further = max(1e-9, (first - vs * further) / ones), further

    def computing(self, rows: int) -> float:
        """Seconds of computing; 0 before anything is known."""
        return self._one_row + self._further * (rows - 1)

    def seconds(self, rows: int) -> float:
        """Seconds of a pass that streams: reading and computing go on side by side."""
        return max(self.disk_seconds, self.computing(rows))
