"""Reading past the page cache, and advice to it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runner.system import platform

_CACHED_STEP = 2**20


def open_for_streaming(path: Path, *, past_the_cache: bool) -> io.FileIO:
    """The file at `path`, to be read in multiples of `PAGE` at multiples of `PAGE` into aligned memory.

    Raises OSError with EINVAL where `past_the_cache` is asked for and the system, or the file system, cannot do that.
    """
    return _opened(path, "r", past_the_cache)


def open_for_writing(path: Path, *, past_the_cache: bool) -> io.FileIO:
    """The file at `path`, which is there, to be written in the same way. Raises OSError as the other does."""
    return _opened(path, "r+", past_the_cache)


def _opened(path: Path, mode: str, past_the_cache: bool) -> io.FileIO:
    if not past_the_cache:
        return io.FileIO(path, mode)
    if not platform.LINUX_CALLS:
        raise OSError(errno.EINVAL, "nothing goes past the page cache here", str(path))
    return io.FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))


def open_for_rows(path: Path) -> io.FileIO:
    """The file at `path`, to be read a few kilobytes here and there: nothing is read ahead."""
    file = io.FileIO(path, "r")
    if platform.LINUX_CALLS:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


@contextlib.contextmanager
def scratch_file(directory: Path) -> Iterator[Path]:
    """A path to a new, empty file in `directory`, which is gone afterwards; on Linux however the process ends."""
    if platform.LINUX_CALLS:
        with tempfile.TemporaryFile(dir=directory) as file:  # it has no name from the beginning
            yield Path(f"/proc/self/fd/{file.fileno()}")
        return
    descriptor, name = tempfile.mkstemp(prefix="bloomdesk-", dir=directory)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink()


def forget(file: io.FileIO, start: int, nbytes: int) -> None:
    """Give the page cache's copy of a range back, where nobody has it mapped."""
    if platform.LINUX_CALLS:
        os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def read_cached(path: Path, start: int, view: memoryview) -> int:
    """Read what the page cache has of a range, from its beginning on, without waiting for the disk; the bytes read.

    A page that is looked for in vain is on its way into the page cache afterwards, so it begins with a single one.
    """
    if not platform.LINUX_CALLS:
        return 0
    done = 0
    with open_for_rows(path) as file, contextlib.suppress(OSError):  # it has no more, or cannot say
        while done < len(view):
            step = _CACHED_STEP if done else platform.PAGE
            count = os.preadv(file.fileno(), [view[done : done + step]], start + done, os.RWF_NOWAIT)
            if not count:
                break
            done += count
    return done
