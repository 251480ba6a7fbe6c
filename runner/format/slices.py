"""Slices: which rows of every matrix a directory holds if a model is spread over several disks or machines.

    rows of a matrix     0 ......................................... N
    shares 2, 1, 1       |      slice 0       | slice 1  | slice 2  |

Each output of a product is summed whole in one place, so the results are those of one disk, to the bit. Vectors are in
every slice.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.errors import BloomdeskError

# More machines than this would have no row group each.
MOST_SLICES = 1024
LARGEST_SHARE = 2**31


@dataclass(frozen=True)
class Slice:
    """Slice number `index`, from 0, of `len(shares)`; each has rows in proportion to its share, a positive integer.

    Raises `BloomdeskError` for shares or an index that cannot be.
    """

    index: int
    shares: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.shares) <= MOST_SLICES:
            raise BloomdeskError(f"there must be 1 to {MOST_SLICES:,} slices, found {len(self.shares):,}")
        for share in self.shares:
            if type(share) is not int or not 0 < share <= LARGEST_SHARE:
                raise BloomdeskError(f"a slice's share must be from 1 to {LARGEST_SHARE:,}, found {share!r}")
        if type(self.index) is not int or not 0 <= self.index < self.count:
            raise BloomdeskError(f"there is no slice {self.index!r} of {self.count}")

    def __str__(self) -> str:
        """As people count: "2/4" is the second of four."""
        return f"{self.index + 1}/{self.count}"

    @property
    def described(self) -> str:
        """ "slice 2/4", and the shares if they differ."""
        shares = f" of the shares {','.join(map(str, self.shares))}" if len(set(self.shares)) > 1 else ""
        return f"slice {self}{shares}"

    @property
    def count(self) -> int:
        """Number of slices."""
        return len(self.shares)

    def rows(self, count: int, unit: int = 1) -> range:
        """Its rows of a matrix of `count` rows, which is cut at multiples of `unit`; there may be none.

        Those of all slices follow one another, from the first row to the last.
        """
        return range(self._boundary(self.index, count, unit), self._boundary(self.index + 1, count, unit))

    def _boundary(self, slices: int, count: int, unit: int) -> int:
        """The row at which the first `slices` slices end: their part of the units, rounded, halves down."""
        units, held, total = -(-count // unit), sum(self.shares[:slices]), sum(self.shares)
        return min(count, unit * -((total - 2 * units * held) // (2 * total)))


def even(count: int) -> tuple[int, ...]:
    """Equal shares for `count` slices."""
    return (1,) * count
