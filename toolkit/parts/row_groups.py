"""Matrices into coded strips and back, on several cores, in order and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from runner.format.coded import STRIP_ROWS

CHUNK = 2 * 2**20  # of decoded bytes; or one strip, where that is more
# Each gives more than 1 GB/s, and a disk takes no more than a few of them.
THREADS = min(8, os.cpu_count() or 1)

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class StripGroup:
    """Consecutive strips that are read and decoded at a time.

    They have `rows` rows and lie in `[start, start + nbytes)` of the coded matrix; `offsets` count from `start`.
    """

    rows: int
    start: int
    nbytes: int
    offsets: tuple[int, ...]


def chunk_nbytes(columns: int) -> int:
    """Bytes of the rows of whole strips that are coded at a time; it follows from the matrix alone."""
    strip = STRIP_ROWS * columns * 2
    return strip * max(1, CHUNK // strip)


def strip_groups(offsets: Sequence[int], rows: int, columns: int) -> list[StripGroup]:
    """The coded matrix [rows, columns], whose strips begin at `offsets`, in the order of its rows."""
    strips = chunk_nbytes(columns) // (STRIP_ROWS * columns * 2)
    groups = []
    for first in range(0, len(offsets) - 1, strips):
        own = offsets[first : first + strips + 1]
        count = min(rows, (first + strips) * STRIP_ROWS) - first * STRIP_ROWS
        groups.append(StripGroup(count, own[0], own[-1] - own[0], tuple(at - own[0] for at in own)))
    return groups


class Coders:
    """Threads that encode and decode; as many chunks are on their way as they are, and two more."""

    def __init__(self) -> None:
        self._ahead = THREADS + 2
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="code")

    def __enter__(self) -> Coders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def encoded(self, chunks: Iterable[bytearray], columns: int) -> Iterator[tuple[bytes, list[int]]]:
        """For each chunk of whole strips its coded bytes and the length of each strip, in order."""
        from runner.kernel.encode import encode_strips  # compiles what a plain directory has no use for

        return self._in_order(lambda chunk: encode_strips(chunk, columns), chunks)

    def decoded(
        self, coded: Iterable[tuple[StripGroup, bytes | bytearray]], columns: int
    ) -> Iterator[bytearray]:
        """The rows of each group from its coded bytes, bf16 bits, in order; `ValueError` where they are damaged."""
        from runner.kernel.decode import decode_strips

        def decode(given: tuple[StripGroup, bytes | bytearray]) -> bytearray:
            group, data = given
            rows = bytearray(group.rows * columns * 2)
            decode_strips(data, group.offsets, group.rows, columns, rows)
            return rows

        return self._in_order(decode, coded)

    def _in_order(self, work: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
        on_their_way: deque[Future[Made]] = deque()
        for index, item in enumerate(given):
            on_their_way.append(self._threads.submit(work, item))
            # The first one alone: the first of all compiles, and several at once would do so each for itself.
            if index == 0 or len(on_their_way) == self._ahead:
                yield on_their_way.popleft().result()
        while on_their_way:
            yield on_their_way.popleft().result()
