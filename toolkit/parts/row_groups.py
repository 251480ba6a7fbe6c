"""Matrices into coded row groups and back, on several cores, in order and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from runner.format.coded import ROW_GROUP_ROWS

CHUNK = 2 * 2**20  # of decoded bytes; or one row group, where that is more
# Each gives more than 1 GB/s, and a disk takes no more than a few of them.
THREADS = min(8, os.cpu_count() or 1)
# Further requests for which a chunk must stay valid.
IN_PROGRESS = THREADS + 2

Block = bytes | bytearray | memoryview
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

    def _in_order(self, work: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
        on_their_way: deque[Future[Made]] = deque()
        for item in given:
            on_their_way.append(self._threads.submit(work, item))
            if len(on_their_way) == IN_PROGRESS:
                yield on_their_way.popleft().result()
        while on_their_way:
            yield on_their_way.popleft().result()
