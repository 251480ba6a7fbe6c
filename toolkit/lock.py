"""One writer at a time for a directory; the lock goes with the process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import BloomdeskError


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Hold `directory`, which exists, for this process. Raises `BloomdeskError` where another one holds it.

    The lock is on the directory itself, so it leaves nothing behind; where directories can't be locked
    (Windows), on a file in it.
    """
    descriptor = _open(directory)
    try:
        try:
            _lock(descriptor)
        except OSError:
            raise BloomdeskError(
                f"{directory}: another bloomdesk is writing there",
                "wait until it has ended, or end it, and run this again",
            ) from None
        yield
    finally:
        os.close(descriptor)


if os.name == "nt":
    import msvcrt

    def _open(directory: Path) -> int:
        return os.open(directory / ".bloomdesk.lock", os.O_RDWR | os.O_CREAT)

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _open(directory: Path) -> int:
        return os.open(directory, os.O_RDONLY)

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
