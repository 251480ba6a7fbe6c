"""What a pass takes, learned from those before: the longer of what the disk and what computing needs."""

from __future__ import annotations

# What a further row adds to the computing of one row, until it is known better: measured with the kernel and weights
# far larger than a processor's caches.
SLOPE = 0.3
SLOPE_WEIGHT = 0.05  # against a measurement; it decides only where there are none
# How much a pass counts beside those before it with as many rows.
NEWEST = 0.3


class Pace:
    """Seconds of a pass by its number of rows.

    Computing is taken as a + b * (rows - 1): the least squares over what each number of rows took, relative to what it
    is expected to take, and, a little, over b = `SLOPE` * a.
    """

    def __init__(self) -> None:
        self.disk_seconds = 0.0
        self._seen: dict[int, float] = {}  # seconds by rows
        self._is_rough = False
        self._one_row, self._further = 0.0, 0.0

    def learn(self, rows: int, computing: float, disk_seconds: float, *, is_rough: bool = False) -> None:
        """A pass of `rows` rows computed for so many seconds; the disk needs `disk_seconds` for what is streamed.

        A rough measurement, as that of a pass that did other things as well, counts until there is a better one.
        """
        self.disk_seconds = disk_seconds
        if is_rough and self._seen and not self._is_rough:
            return
        if self._is_rough:
            self._seen.clear()
        self._is_rough = is_rough
        before = self._seen.get(rows, computing)
        self._seen[rows] = before + NEWEST * (computing - before)
        self._fit()

    def _fit(self) -> None:
        # Sums of the weights, times v, times v * v, where v is rows - 1; sums of the seconds, times v.
        ones, vs, squares = (SLOPE_WEIGHT * each for each in (SLOPE * SLOPE, -SLOPE, 1.0))
        first = second = 0.0
        for rows, seconds in self._seen.items():
            v = rows - 1
            weight = 1 / (1 + SLOPE * v) ** 2
            ones, vs, squares = ones + weight, vs + weight * v, squares + weight * v * v
            first, second = first + weight * seconds, second + weight * v * seconds
        self._further = max(0.0, (ones * second - vs * first) / (ones * squares - vs * vs))
        self._one_row = max(0.0, (first - vs * self._further) / ones)

    def computing(self, rows: int) -> float:
        """Seconds of computing; 0 before anything is known."""
        return self._one_row + self._further * (rows - 1)

    def seconds(self, rows: int) -> float:
        """Seconds of a pass that streams: reading and computing go on side by side."""
        return max(self.disk_seconds, self.computing(rows))
