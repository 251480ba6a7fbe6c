"""Weight matrices cut into pieces of rows: what is read, kept or let go, and multiplied at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from runner.header import TensorEntry
from runner.prepared import STRIP_ROWS, strip_count

# Long enough for a disk's full speed and for Python to cost nothing, short enough for a few of them in 1 GB of RAM.
LARGEST_PIECE = 32 * 2**20


@dataclass(frozen=True)
class FileState:
    """A part as it was when it was opened; a file that is another one later is not read on."""

    path: Path
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows `first` to `last` of a matrix: `nbytes` from byte `start` of the file on.

    Of a coded matrix `mapped` holds bytes, and `strips` int64 says where each strip of the rows begins in them, and
    where the last one ends.
    """

    file: FileState
    start: int
    first: int
    last: int
    mapped: torch.Tensor  # [last - first, K], or [nbytes] coded: a view of the mapped file
    strips: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.mapped.nbytes


def row_ranges(rows: int, nbytes: int) -> list[tuple[int, int]]:
    """Where a matrix of `rows` rows and `nbytes` bytes is cut: (first, last) of pieces of about one size."""
    count = min(rows, -(-nbytes // LARGEST_PIECE))
    return list(pairwise(rows * index // count for index in range(count + 1)))


def cut(file: FileState, entry: TensorEntry, mapped: torch.Tensor) -> tuple[Piece, ...]:
    """The matrix `mapped` [N, K], which is `entry` of `file`, in pieces."""
    rows = mapped.shape[0]
    row_bytes = entry.nbytes // rows
    return tuple(
        Piece(file, entry.start + first * row_bytes, first, last, mapped[first:last])
        for first, last in row_ranges(rows, entry.nbytes)
    )


def cut_coded(
    file: FileState, entry: TensorEntry, mapped: torch.Tensor, strips: torch.Tensor, rows: int
) -> tuple[Piece, ...]:
    """The coded matrix of `rows` rows in the bytes `mapped`, which are `entry` of `file`, in pieces of whole strips."""
    found = []
    for begin, end in row_ranges(strip_count(rows), entry.nbytes):
        own = strips[begin : end + 1]
        first, last = begin * STRIP_ROWS, min(end * STRIP_ROWS, rows)
        start, stop = int(own[0]), int(own[-1])
        found.append(Piece(file, entry.start + start, first, last, mapped[start:stop], own - start))
    return tuple(found)
