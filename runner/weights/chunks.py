"""Weight matrices cut into pieces of rows: what is read, kept or let go, and multiplied at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from runner.format.coded import STRIP_ROWS, strip_count
from runner.format.safetensors import TensorEntry

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

    In memory they are a tensor of `dtype` and `shape`: [last - first, K], or [nbytes] bytes of a coded matrix, of
    which `strips` int64 says where each strip of the rows begins, and where the last one ends.
    """

    file: FileState
    start: int
    first: int
    last: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strips: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def row_ranges(rows: int, nbytes: int) -> list[tuple[int, int]]:
    """Where a matrix of `rows` rows and `nbytes` bytes is cut: (first, last) of pieces of about one size."""
    count = min(rows, -(-nbytes // LARGEST_PIECE))
    return list(pairwise(rows * index // count for index in range(count + 1)))


def cut(file: FileState, entry: TensorEntry, dtype: torch.dtype) -> tuple[Piece, ...]:
    """The matrix [N, K] of `dtype` that is `entry` of `file`, in pieces."""
    rows, columns = entry.shape
    row_bytes = columns * dtype.itemsize
    return tuple(
        Piece(file, entry.start + first * row_bytes, first, last, dtype, (last - first, columns))
        for first, last in row_ranges(rows, entry.nbytes)
    )


def cut_coded(file: FileState, entry: TensorEntry, strips: torch.Tensor, rows: int) -> tuple[Piece, ...]:
    """The coded matrix of `rows` rows that is `entry` of `file`, in pieces of whole strips."""
    found = []
    for begin, end in row_ranges(strip_count(rows), entry.nbytes):
        own = strips[begin : end + 1]
        start, stop = own[0].item(), own[-1].item()
        first, last = begin * STRIP_ROWS, min(end * STRIP_ROWS, rows)
        found.append(Piece(file, entry.start + start, first, last, torch.uint8, (stop - start,), own - start))
    return tuple(found)
