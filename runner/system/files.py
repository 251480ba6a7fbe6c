"""Reading and writing past the page cache, and advice to it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.system import platform

# Bytes that are read at a time if only the page cache wants them.
_STEP = 2**20


def whole_pages(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `PAGE`."""
    return -(-nbytes // platform.PAGE) * platform.PAGE


def open_for_streaming(path: Path, mode: str = "r", *, past_the_cache: bool) -> io.FileIO:
    """The file at `path`, opened for reads, or with "r+" for writes, of whole pages from and to aligned memory.

    Raises OSError with EINVAL if `past_the_cache` is asked for and the system, or the file system, cannot do that.
    """
    if not past_the_cache:
        return io.FileIO(path, mode)
    if not platform.LINUX_CALLS:
        raise OSError(errno.EINVAL, "this system has no reads past the page cache", str(path))
    return io.FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))


def past_the_cache_if_possible(action: Callable[[bool], None]) -> None:
    """Do `action(True)`; if the file system cannot go past the page cache, `action(False)`."""
    try:
        action(True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        action(False)


def read_uncached(
    path: Path, start: int, view: memoryview, wanted: int, check: Callable[[int], None] | None = None
) -> None:
    """Read `wanted` bytes from byte `start` of a file into `view`, leaving nothing in the page cache.

    `start`, the address of `view` and its length are multiples of `PAGE`. `check` gets the open file's descriptor
    before anything is read. Raises OSError, also if the file ends too early.
    """

    def read(past_the_cache: bool) -> None:
        with open_for_streaming(path, past_the_cache=past_the_cache) as file:
            if check:
                check(file.fileno())
            file.seek(start)
            done = 0
            while done < wanted:
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(errno.EIO, "the file ends too early", str(path))
                done += count
            # Reading ahead for something else may have left it there, even if this read went past it.
            forget(file, start, wanted)

    past_the_cache_if_possible(read)


def open_for_rows(path: Path) -> io.FileIO:
    """The file at `path`, to be read a few kilobytes here and there: nothing is read ahead."""
    file = io.FileIO(path, "r")
    if platform.LINUX_CALLS:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


@contextlib.contextmanager
def scratch_file(directory: Path) -> Iterator[Path]:
    """A path to a new, empty file in `directory`, deleted afterwards; on Linux however the process ends."""
    if platform.LINUX_CALLS:
        # Such a file never has a name in the directory.
        with tempfile.TemporaryFile(dir=directory) as file:
            yield Path(f"/proc/self/fd/{file.fileno()}")
        return
    descriptor, name = tempfile.mkstemp(prefix="bloomdesk-", dir=directory)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink()


def forget(file: io.FileIO, start: int, nbytes: int) -> None:
    """Have the page cache drop a range of a file, except what a process has mapped."""
    if platform.LINUX_CALLS:
        os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def bring_into_cache(path: Path, start: int, nbytes: int) -> None:
    """Have the page cache read a range of a file. Raises OSError, also if the file ends too early."""
    scratch = memoryview(bytearray(_STEP))
    with open_for_streaming(path, past_the_cache=False) as file:
        file.seek(start)
        while nbytes:
            count = file.readinto(scratch[:nbytes])
            if not count:
                raise OSError(errno.EIO, "the file ends too early", str(path))
            nbytes -= count
