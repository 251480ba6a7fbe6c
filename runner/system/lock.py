"""One writer at a time for a file or a directory; the lock goes with the process, however that ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import BloomdeskError

_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}  # what systems say of another's lock


def lock(descriptor: int, path: Path) -> None:
    """Hold the open file `path` until it is closed. Raises `BloomdeskError` where another process holds it.

    On a file system that knows no locks this does nothing.
    """
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _HELD:
            raise BloomdeskError(
                f"{path}: another bloomdesk is writing there",
                "wait until it has ended, or end it, and run this again",
            ) from None


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Hold `directory`, which exists, for this process. Raises `BloomdeskError` where another one holds it.

    The lock is on the directory itself, so it leaves nothing behind; where directories can't be locked
    (Windows), on a file in it.
    """
    descriptor = _open(directory)
    try:
        lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


if os.name == "nt":
    import msvcrt

    # Of the byte that is locked, beyond all that is in the file: nobody could write it, the holder included.
    _PLACE = 2**31 - 2

    def _open(directory: Path) -> int:
        return os.open(directory / ".bloomdesk.lock", os.O_RDWR | os.O_CREAT)

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, _PLACE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _open(directory: Path) -> int:
        return os.open(directory, os.O_RDONLY)

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
