"""Bytes of many files, read by several threads in large pieces and handed over in order.

One reader alone waits while its bytes are copied and hashed, so the disk idles; several keep it busy, within a
large file as well as from one file to the next. The page cache lets go of what has been read: a check of 352 GB
leaves there what other programs have.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType

from runner.format.safetensors import open_regular

PIECE = 8 * 2**20
# More threads than cores only get into each other's way: they copy as much as they wait.
READ_THREADS = min(4, os.cpu_count() or 1)
PIECES_PER_THREAD = 2  # one that is read into, one that waits for its turn


@dataclass(frozen=True)
class Run:
    """The bytes `[start, start + nbytes)` of a file."""

    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class _Read:
    """A piece on its way: of the run at `index`, into `buffer`; the result is how many bytes there were."""

    index: int
    nbytes: int
    file: _File
    buffer: memoryview
    count: Future[int]


class ReadAhead:
    """Reads `runs` in their order, a few pieces ahead of who takes them; memory is bounded by those pieces."""

    def __init__(self, runs: Sequence[Run], threads: int = READ_THREADS) -> None:
        self._runs = runs
        self._wanted = 0
        self._ahead = self._places()
        # Never larger than the work: most tests and all small models read less than one piece.
        largest = min(PIECE, max((run.nbytes for run in runs), default=0))
        self._free = [memoryview(bytearray(largest)) for _ in range(threads * PIECES_PER_THREAD)]
        self._reads: deque[_Read] = deque()
        self._files: deque[_File] = (
            deque()
        )  # the last one is being read, and those before it that are still awaited
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        for file in self._files:
            file.close()

    def pieces(self, index: int) -> Iterator[memoryview]:
        """The bytes of the run at `index`, which must be after that of the last call; runs may be left out.

        A piece holds until the next one is asked for. Raises `OSError` where the file can't be read, and
        `EOFError` where it ends within the run, after the bytes that are there.
        """
        self._wanted = index
        self._begin()
        while self._reads and self._reads[0].index <= index:
            read = self._reads.popleft()
            while self._files[0] is not read.file:  # all that was asked of it has come
                self._files.popleft().close()
            try:
                count = read.count.result()
                if read.index == index:
                    yield read.buffer[:count]
                    if count < read.nbytes:
                        raise EOFError(f"it ends {read.nbytes - count:,} bytes too early")
            except OSError:
                if read.index == index:
                    raise  # what was read ahead of a file that is given up is nobody's error
            finally:
                self._free.append(read.buffer)
            self._begin()

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Index of the run, first byte and length of each piece that is still wanted when its turn comes."""
        for index, run in enumerate(self._runs):
            for start in range(run.start, run.start + run.nbytes, PIECE):
                if index >= self._wanted:
                    yield index, start, min(PIECE, run.start + run.nbytes - start)

    def _begin(self) -> None:
        """Have as much on its way as there are buffers for."""
        while self._free and (piece := next(self._ahead, None)):
            index, start, nbytes = piece
            if not self._files or self._files[-1].path != self._runs[index].path:
                self._files.append(_File(self._runs[index].path))
            file, buffer = self._files[-1], self._free.pop()
            count = self._threads.submit(_read, file, start, buffer[:nbytes])
            self._reads.append(_Read(index, nbytes, file, buffer, count))


class _File:
    """A file that is opened by the first thread that reads from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: FileIO | None = None

    def read(self, start: int, buffer: memoryview) -> int:
        """One read into `buffer` from the byte `start` on; the GIL is free meanwhile."""
        with self._lock:
            if self._file is None:
                self._file = open_regular(self.path).detach()
                self.advise(0, 0, "SEQUENTIAL")  # the kernel then reads further ahead
            if not hasattr(os, "preadv"):
                self._file.seek(start)
                return self._file.readinto(buffer)
        return os.preadv(self._file.fileno(), [buffer], start)

    def advise(self, start: int, nbytes: int, advice: str) -> None:
        """Tell the page cache, where there is one that listens."""
        if self._file is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, nbytes, getattr(os, f"POSIX_FADV_{advice}"))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _read(file: _File, start: int, buffer: memoryview) -> int:
    """Fill `buffer` from the file's byte `start` on, and let the page cache forget that; the bytes that were there."""
    done = 0
    while done < len(buffer) and (count := file.read(start + done, buffer[done:])):
        done += count
    file.advise(start, done, "DONTNEED")
    return done
