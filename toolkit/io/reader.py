"""Byte ranges of files, read ahead by threads into a few buffers and handed over in order.

    ranges ──> threads read into free buffers ──> blocks in order ──> consumer hashes, writes, compares ──> free buffers

A single reader waits while its bytes are copied and hashed, so the disk idles. Several keep it busy, within a large
file as well as from one file to the next.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self, TypeVar

from runner.format.safetensors import open_regular

BLOCK = 8 * 2**20
# More threads than cores slow each other down: they copy as much as they wait.
READ_THREADS = min(4, os.cpu_count() or 1)
# One that is read into, one that waits for the consumer.
BUFFERS_PER_THREAD = 2
# Seconds before each further try of a read that fails with EIO: a cable, a bus or a drive may recover.
PAUSES = (0.1, 0.3, 1.0)
# Error numbers of what is there in place of a file: nothing, a directory, a pipe or a device, a loop of links.
NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP})

Result = TypeVar("Result")
Block = bytes | bytearray | memoryview


def retried(read: Callable[[], Result]) -> Result:
    """What `read` returns. If it fails with EIO, it is tried again after each of `PAUSES` before the error goes up."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            time.sleep(pause)
    return read()


def joined(blocks: Iterator[Block], nbytes: int) -> Block:
    """All bytes of `blocks`, which are `nbytes`, in place if they are one block, else a copy."""
    first = next(blocks, memoryview(b""))
    if len(first) == nbytes:
        return first
    data = bytearray(first)
    for block in blocks:
        data += block
    return data


@dataclass(frozen=True)
class ByteRange:
    """The bytes `[start, start + nbytes)` of a file."""

    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class _Read:
    """A read in progress for the range at `index`; its result is the number of bytes before the end of the file."""

    index: int
    nbytes: int
    file: OpenedFile
    buffer: memoryview
    count: Future[int]


class ReadAhead:
    """Reads `ranges` in order, a few blocks ahead of the consumer; memory is bounded by those blocks."""

    def __init__(
        self,
        ranges: Sequence[ByteRange],
        threads: int = READ_THREADS,
        *,
        held: int = 1,
        keep_cached: bool = False,
    ) -> None:
        """A block stays valid until `held` further ones are requested.

        Unless `keep_cached` is set, the page cache drops what was read: a check of 352 GB leaves there what other
        programs have.
        """
        self.ranges = ranges
        self._held, self._keep_cached = held, keep_cached
        self._wanted = 0
        self._ahead = self._places()
        # Never larger than the work: most tests and all small models read less than one block.
        largest = min(BLOCK, max((each.nbytes for each in ranges), default=0))
        count = threads * BUFFERS_PER_THREAD + held - 1
        self._free = [memoryview(bytearray(largest)) for _ in range(count)]
        self._given: deque[memoryview] = deque()
        self._reads: deque[_Read] = deque()
        # The last one is being read; blocks of those before it are still awaited.
        self._files: deque[OpenedFile] = deque()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for file in self._files:
            file.close()

    def blocks(self, index: int) -> Iterator[memoryview]:
        """The bytes of the range at `index`, which must be after that of the last call; ranges may be left out.

        Raises `OSError` if the file can't be read, and `EOFError` after its last bytes if it ends within the range.
        """
        self._wanted = index
        while self._request_ahead() and self._reads[0].index <= index:
            read = self._reads.popleft()
            self._given.append(read.buffer)
            # Every block of the files before this one has come.
            while self._files[0] is not read.file:
                self._files.popleft().close()
            if read.index < index:
                # Read ahead of a file that the consumer gave up: an error there is none.
                read.count.exception()
                continue
            count = read.count.result()
            yield read.buffer[:count]
            if count < read.nbytes:
                raise EOFError(f"it ends {read.nbytes - count:,} bytes too early")

    def whole(self, index: int) -> Block:
        """All bytes of the range at `index`, in place if they are one block, else a copy; raises as `blocks` does."""
        return joined(self.blocks(index), self.ranges[index].nbytes)

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Index of the range, first byte and length of each block that is still wanted when its turn comes."""
        for index, each in enumerate(self.ranges):
            for start in range(each.start, each.start + each.nbytes, BLOCK):
                if index >= self._wanted:
                    yield index, start, min(BLOCK, each.start + each.nbytes - start)

    def _request_ahead(self) -> bool:
        """Start a read for every free buffer; False if no read is in progress."""
        while len(self._given) >= self._held:
            self._free.append(self._given.popleft())
        while self._free and (place := next(self._ahead, None)):
            index, start, nbytes = place
            if not self._files or self._files[-1].path != self.ranges[index].path:
                self._files.append(OpenedFile(self.ranges[index].path))
            file, buffer = self._files[-1], self._free.pop()
            count = self._threads.submit(read_block, file, start, buffer[:nbytes], self._keep_cached)
            self._reads.append(_Read(index, nbytes, file, buffer, count))
        return bool(self._reads)


class OpenedFile:
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
                # The kernel then reads further ahead.
                self.advise(0, 0, "SEQUENTIAL")
            if not hasattr(os, "preadv"):
                self._file.seek(start)
                return self._file.readinto(buffer)
        return os.preadv(self._file.fileno(), [buffer], start)

    def advise(self, start: int, nbytes: int, advice: str) -> None:
        """Advise the page cache, on systems that have such a call."""
        if self._file is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, nbytes, getattr(os, f"POSIX_FADV_{advice}"))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_block(file: OpenedFile, start: int, buffer: memoryview, keep_cached: bool = False) -> int:
    """Number of bytes read into `buffer` from the file's byte `start` on, fewer only at the end of the file."""
    done = 0

    def read() -> int:
        return file.read(start + done, buffer[done:])

    while done < len(buffer) and (count := retried(read)):
        done += count
    if not keep_cached:
        file.advise(start, done, "DONTNEED")
    return done
