"""The disk that is written to: its room, and its failures in one sentence."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import BloomdeskError


def free_bytes(path: Path) -> int:
    """Bytes that the disk under `path` has free; `path` need not exist yet."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what went wrong with writing `path` in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BloomdeskError(
                f"{path}: the disk is full: {free_bytes(path):,} bytes are free",
                "make room and run the same command again: it goes on where it stopped",
            ) from error
        raise BloomdeskError(f"{path}: cannot be written: {error.strerror}") from error
