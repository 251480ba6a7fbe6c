"""Weight matrices cut into chunks of rows: what is read, kept and multiplied at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from runner.format.coded import ROW_GROUP_ROWS, row_group_count
from runner.format.safetensors import TensorEntry
from runner.weights.part_file import PartFile

# Large enough for a disk's full speed and for Python to cost nothing, small enough that 1 GB of RAM holds a few.
LARGEST_CHUNK = 32 * 2**20


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows `first` to `last` of a matrix: `nbytes` bytes of the file, from byte `start`.

    In memory they are a tensor of `dtype` and `shape`: [last - first, K]; or [nbytes] bytes of a coded matrix, in
    which the int64 `row_groups` are the offsets of the row groups and their end.
    """

    file: PartFile
    start: int
    first: int
    last: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    row_groups: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, view: memoryview | None) -> None:
        """Read the pages that the chunk lies in into the page-aligned `view`; without one page in the mapped file."""
        if view is None:
            self.file.page_in(self.start, self.nbytes)
        else:
            self.file.read_pages(self.start, self.nbytes, view)


def row_ranges(rows: int, nbytes: int) -> list[tuple[int, int]]:
    """Rows (first, last) of the chunks of a matrix of `nbytes` bytes, all of about one size."""
    count = min(rows, -(-nbytes // LARGEST_CHUNK))
    return list(pairwise(rows * index // count for index in range(count + 1)))


def cut(file: PartFile, entry: TensorEntry, dtype: torch.dtype) -> tuple[Chunk, ...]:
    """The chunks of a matrix [N, K] of `dtype`, the tensor `entry` of `file`."""
    rows, columns = entry.shape
    row_bytes = columns * dtype.itemsize
    return tuple(
        Chunk(file, entry.start + first * row_bytes, first, last, dtype, (last - first, columns))
        for first, last in row_ranges(rows, entry.nbytes)
    )


def cut_coded(file: PartFile, entry: TensorEntry, row_groups: torch.Tensor, rows: int) -> tuple[Chunk, ...]:
    """The chunks of a coded matrix of `rows` rows, the tensor `entry` of `file`, in whole row groups."""
    found = []
    for begin, end in row_ranges(row_group_count(rows), entry.nbytes):
        own = row_groups[begin : end + 1]
        start, stop = own[0].item(), own[-1].item()
        first, last = begin * ROW_GROUP_ROWS, min(end * ROW_GROUP_ROWS, rows)
        found.append(Chunk(file, entry.start + start, first, last, torch.uint8, (stop - start,), own - start))
    return tuple(found)
