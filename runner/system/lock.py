"""One writer at a time for a file or a directory; the lock ends with the process, however that ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import BloomdeskError, explained
from runner.system.platform import WINDOWS

# Error numbers of systems for a lock that another process holds.
_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
# Of Windows alone, which cannot lock a directory itself.
LOCK_FILE = ".bloomdesk.lock"
# Of file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def lock(descriptor: int, path: Path) -> None:
    """Lock the open file `path` until it is closed.

    Raises `BloomdeskError` if another process holds the lock, or the system fails to lock.
    On a file system without locks this does nothing.
    """
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _HELD:
            raise BloomdeskError(
                f"{path}: another bloomdesk is writing there",
                "wait until it has ended, or end it, and run this again",
            ) from None
        if error.errno not in _NO_LOCKS:
            why, step = explained(error, path)
            raise BloomdeskError(f"{path}: cannot be locked: {why}", step) from error


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Lock an existing directory. Raises `BloomdeskError` if another process holds the lock.

    The directory itself is locked, so no file is left behind; on Windows, where that is impossible, a file in it.
    """
    descriptor = _open(directory)
    try:
        lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


if WINDOWS:
    import msvcrt

    # The locked byte is beyond any content of the file: nobody could write that byte, the holder included.
    _PLACE = 2**31 - 2

    def _open(directory: Path) -> int:
        return os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT)

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, _PLACE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _open(directory: Path) -> int:
        return os.open(directory, os.O_RDONLY)

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
