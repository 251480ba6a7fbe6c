"""Weight matrices cut into chunks of rows: what is read, kept and multiplied at a time."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from runner.format.coded import ROW_GROUP_ROWS, row_group_count
from runner.format.quantised import Coding
from runner.format.safetensors import TensorEntry
from runner.system import files, platform
from runner.weights.part_file import PartFile

# Large enough for a disk's full speed and for Python to cost nothing, small enough that 1 GB of RAM holds a few.
LARGEST_CHUNK = 32 * 2**20
# Of integers and scales.
STORED_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "BF16": torch.bfloat16}


class Quantised(NamedTuple):
    """Rows of a matrix in fewer bits: integers and scales, in the shapes of `coding`."""

    data: torch.Tensor
    scales: torch.Tensor


# What a product takes of a chunk.
Loaded = torch.Tensor | Quantised


@dataclass(frozen=True)
class Scales:
    """The scales of a chunk's rows: a tensor of `dtype` and `shape`, in the file from byte `start`."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows `first` to `last` of a matrix: `own_nbytes` bytes of the file, from byte `start`.

    In memory they are a tensor of `dtype` and `shape`: [last - first, K]; or the bytes of a coded matrix, in which the
    int64 `row_groups` are the offsets of the row groups and their end; or the integers of one in fewer bits, stored as
    `coding` says, to which `scales` belong that lie elsewhere in the file.
    """

    file: PartFile
    start: int
    first: int
    last: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    row_groups: torch.Tensor | None = None
    coding: Coding | None = None
    scales: Scales | None = None

    @property
    def own_nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """All bytes that it takes of the file."""
        return self.own_nbytes + (self.scales.nbytes if self.scales else 0)

    @property
    def scales_place(self) -> int:
        """Where in a buffer the pages of the scales begin: after its own."""
        return files.whole_pages(self.start % platform.PAGE + self.own_nbytes)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Where its bytes lie in the file, as starts and numbers of bytes."""
        own = (self.start, self.own_nbytes)
        return (own, (self.scales.start, self.scales.nbytes)) if self.scales else (own,)

    def read(self, view: memoryview | None) -> None:
        """Read the pages that the chunk lies in into the page-aligned `view`; without one page in the mapped file."""
        places = 0, self.scales_place
        for place, (start, nbytes) in zip(places, self.ranges, strict=False):
            if view is None:
                self.file.page_in(start, nbytes)
            else:
                self.file.read_pages(start, nbytes, view[place:])

    def in_buffer(self, memory: mmap.mmap) -> Loaded:
        """What was read into a buffer's memory."""
        own = _tensor(memory, self.start % platform.PAGE, self.dtype, self.shape)
        if self.scales is None:
            return own
        place = self.scales_place + self.scales.start % platform.PAGE
        return Quantised(own, _tensor(memory, place, self.scales.dtype, self.scales.shape))

    def mapped(self) -> Loaded:
        """What was paged in, as views of the file."""
        own = self.file.mapped(self.start, self.dtype, self.shape)
        if self.scales is None:
            return own
        return Quantised(own, self.file.mapped(self.scales.start, self.scales.dtype, self.scales.shape))

    def drop(self) -> None:
        """Free the RAM of what was paged in."""
        for start, nbytes in self.ranges:
            self.file.drop(start, nbytes)


def buffer_bytes(nbytes: int) -> int:
    """Size of a buffer for a chunk of `nbytes`: whole pages, wherever in its first page each of two ranges begins."""
    return files.whole_pages(nbytes + 3 * platform.PAGE)


def _tensor(memory: mmap.mmap, place: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=place).view(shape)


def interleaved(of_disks: Sequence[Sequence[Chunk]]) -> tuple[Chunk, ...]:
    """The chunks of a matrix's rows on each disk, in an order in which all disks are always as far as one another."""
    placed = []
    for disk, chunks in enumerate(of_disks):
        whole, position = sum(chunk.nbytes for chunk in chunks), 0
        for chunk in chunks:
            placed.append(((position + chunk.nbytes / 2) / whole, disk, chunk))
            position += chunk.nbytes
    return tuple(chunk for *_, chunk in sorted(placed, key=lambda each: each[:2]))


def row_ranges(rows: int, nbytes: int) -> list[tuple[int, int]]:
    """Rows (first, last) of the chunks of a matrix of `nbytes` bytes, all of about one size."""
    count = min(rows, -(-nbytes // LARGEST_CHUNK))
    return list(pairwise(rows * index // max(1, count) for index in range(count + 1)))


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


def cut_quantised(
    file: PartFile, entry: TensorEntry, scales: TensorEntry, coding: Coding, rows: int
) -> tuple[Chunk, ...]:
    """The chunks of a matrix of `rows` rows in fewer bits: the tensors `entry` and `scales` of `file`."""
    dtype, scales_dtype = STORED_DTYPES[coding.dtype], STORED_DTYPES[coding.scale_dtype]
    row, scales_row = entry.nbytes // max(1, rows), scales.nbytes // max(1, rows)
    return tuple(
        Chunk(
            file,
            entry.start + first * row,
            first,
            last,
            dtype,
            (last - first, row // dtype.itemsize),
            coding=coding,
            scales=Scales(
                scales.start + first * scales_row,
                scales_dtype,
                (last - first, scales_row // scales_dtype.itemsize),
            ),
        )
        for first, last in row_ranges(rows, entry.nbytes + scales.nbytes)
    )
