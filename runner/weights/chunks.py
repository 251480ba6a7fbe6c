"""Weight matrices cut into chunks of rows: what is read, kept or let go, and multiplied at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from runner.format.coded import ROW_GROUP_ROWS, row_group_count
from runner.format.safetensors import TensorEntry

# Long enough for a disk's full speed and for Python to cost nothing, short enough for a few of them in 1 GB of RAM.
LARGEST_CHUNK = 32 * 2**20


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
class Chunk:
    """Rows `first` to `last` of a matrix: `nbytes` from byte `start` of the file on.

    In memory they are a tensor of `dtype` and `shape`: [last - first, K], or [nbytes] bytes of a coded matrix, of
    which `row_groups` int64 says where each row group of the rows begins, and where the last one ends.
    """

    file: FileState
    start: int
    first: int
    last: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    row_groups: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def row_ranges(rows: int, nbytes: int) -> list[tuple[int, int]]:
    """Where a matrix of `rows` rows and `nbytes` bytes is cut: (first, last) of chunks of about one size."""
    count = min(rows, -(-nbytes // LARGEST_CHUNK))
    return list(pairwise(rows * index // count for index in range(count + 1)))


def cut(file: FileState, entry: TensorEntry, dtype: torch.dtype) -> tuple[Chunk, ...]:
    """The matrix [N, K] of `dtype` that is `entry` of `file`, in chunks."""
    rows, columns = entry.shape
    row_bytes = columns * dtype.itemsize
    return tuple(
        Chunk(file, entry.start + first * row_bytes, first, last, dtype, (last - first, columns))
        for first, last in row_ranges(rows, entry.nbytes)
    )


def cut_coded(file: FileState, entry: TensorEntry, row_groups: torch.Tensor, rows: int) -> tuple[Chunk, ...]:
    """The coded matrix of `rows` rows that is `entry` of `file`, in chunks of whole row groups."""
    found = []
    for begin, end in row_ranges(row_group_count(rows), entry.nbytes):
        own = row_groups[begin : end + 1]
        start, stop = own[0].item(), own[-1].item()
        first, last = begin * ROW_GROUP_ROWS, min(end * ROW_GROUP_ROWS, rows)
        found.append(Chunk(file, entry.start + start, first, last, torch.uint8, (stop - start,), own - start))
    return tuple(found)
