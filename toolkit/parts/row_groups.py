"""Matrices into coded row groups or fewer bits and back, on several cores, in order and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from runner.format.coded import ROW_GROUP_ROWS
from runner.format.quantised import Coding
from runner.format.safetensors import Shape, tensor_nbytes
from toolkit.io.reader import Block

CHUNK = 2 * 2**20  # of decoded bytes; or one row group, where that is more
# Each gives more than 1 GB/s, and a disk takes no more than a few of them.
THREADS = min(8, os.cpu_count() or 1)
# Further requests for which a chunk must stay valid.
IN_PROGRESS = THREADS + 2

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class RowGroups:
    """Consecutive row groups that are read and decoded at a time.

    They have `rows` rows and lie in `[start, start + nbytes)` of the coded matrix; `offsets` count from `start`.
    """

    rows: int
    start: int
    nbytes: int
    offsets: tuple[int, ...]


def chunk_nbytes(columns: int) -> int:
    """Bytes of the rows of whole row groups that are coded at a time; it follows from the matrix alone."""
    row_group = ROW_GROUP_ROWS * columns * 2
    return row_group * max(1, CHUNK // row_group)


def batches_of_row_groups(offsets: Sequence[int], rows: int, columns: int) -> list[RowGroups]:
    """The coded matrix [rows, columns], whose row groups begin at `offsets`, in the order of its rows."""
    row_groups = chunk_nbytes(columns) // (ROW_GROUP_ROWS * columns * 2)
    groups = []
    for first in range(0, len(offsets) - 1, row_groups):
        own = offsets[first : first + row_groups + 1]
        count = min(rows, (first + row_groups) * ROW_GROUP_ROWS) - first * ROW_GROUP_ROWS
        groups.append(RowGroups(count, own[0], own[-1] - own[0], tuple(at - own[0] for at in own)))
    return groups


@dataclass(frozen=True)
class QuantisedRows:
    """Rows `first` to `last` of a matrix in fewer bits: their integers and scales, and the weights that they decode to.

    `data_nbytes` and `scales_nbytes` are those of the first two.
    """

    first: int
    last: int
    data_nbytes: int
    scales_nbytes: int
    data: Block = b""
    scales: Block = b""
    weights: Block = b""

    def holding(self, data: Block, scales: bytearray) -> QuantisedRows:
        """The same rows with their integers, and their share of the whole matrix's scales."""
        start = self.first * self.scales_nbytes // (self.last - self.first)
        return replace(self, data=data, scales=memoryview(scales)[start : start + self.scales_nbytes])


def row_batches(shape: Shape, coding: Coding) -> list[QuantisedRows]:
    """The rows of a matrix [N, K] in the batches in which they are read and decoded, in order."""
    rows, columns = shape
    step = chunk_nbytes(columns) // (columns * 2)
    found = []
    for first in range(0, rows, step):
        own = min(step, rows - first), columns
        sizes = (
            tensor_nbytes(coding.dtype, coding.shape(own)),
            tensor_nbytes(coding.scale_dtype, coding.scales_shape(own)),
        )
        found.append(QuantisedRows(first, first + own[0], *sizes))
    return found


class Coders:
    """Threads that encode and decode, up to `IN_PROGRESS` chunks at a time."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="code")

    def __enter__(self) -> Coders:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def encoded(self, chunks: Iterable[Block], columns: int) -> Iterator[tuple[bytes, list[int]]]:
        """For each chunk of whole row groups its coded bytes and the length of each row group, in order."""
        from runner.kernel.encode import encode_row_groups

        return self._in_order(lambda chunk: encode_row_groups(chunk, columns), chunks)

    def decoded(self, coded: Iterable[tuple[RowGroups, Block]], columns: int) -> Iterator[bytearray]:
        """The rows of each group from its coded bytes, bf16 bits, in order; `ValueError` if they are damaged."""
        from runner.kernel.decode import decode_row_groups

        def decode(given: tuple[RowGroups, Block]) -> bytearray:
            group, data = given
            rows = bytearray(group.rows * columns * 2)
            decode_row_groups(data, group.offsets, group.rows, columns, rows)
            return rows

        return self._in_order(decode, coded)

    def quantised(
        self, chunks: Iterable[Block], columns: int, coding: Coding, dtype: str
    ) -> Iterator[QuantisedRows]:
        """For each chunk of whole rows of `dtype` its integers, scales and what these decode to, in order.

        Raises `ValueError` if weights are infinite or not numbers.
        """
        from runner.kernel.quantised import dequantise_rows, quantise_rows

        def quantise(chunk: Block) -> QuantisedRows:
            data, scales = quantise_rows(chunk, columns, coding, dtype)
            weights = bytearray(len(chunk))
            rows = len(chunk) // tensor_nbytes(dtype, (columns,))
            dequantise_rows(data, scales, (rows, columns), coding, dtype, weights)
            return QuantisedRows(0, rows, len(data), len(scales), data, scales, weights)

        return self._in_order(quantise, chunks)

    def dequantised(
        self, given: Iterable[QuantisedRows], columns: int, coding: Coding, dtype: str
    ) -> Iterator[bytearray]:
        """The weights of each batch of rows, in order; `ValueError` if sizes do not fit."""
        from runner.kernel.quantised import dequantise_rows

        def dequantise(rows: QuantisedRows) -> bytearray:
            shape = rows.last - rows.first, columns
            weights = bytearray(tensor_nbytes(dtype, shape))
            dequantise_rows(rows.data, rows.scales, shape, coding, dtype, weights)
            return weights

        return self._in_order(dequantise, given)

    def _in_order(self, work: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
        on_their_way: deque[Future[Made]] = deque()
        for item in given:
            on_their_way.append(self._threads.submit(work, item))
            if len(on_their_way) == IN_PROGRESS:
                yield on_their_way.popleft().result()
        while on_their_way:
            yield on_their_way.popleft().result()
