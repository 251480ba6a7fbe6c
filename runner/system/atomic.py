"""Atomic writes: a file is written beside its place, fsynced, and renamed into it, so it is whole or absent."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from runner.system import platform

TEMPORARY_SUFFIX = ".incomplete"
# Of file systems that cannot sync a directory: FUSE, shared folders, some network disks.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# On Windows a scanner holds a new file for some tenths of a second, and nobody may rename it then.
_SECONDS_TO_RENAME, _SECONDS_BETWEEN_TRIES = 5.0, 0.1


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path`, safe from a power loss, when the block ends without an error.

    After an error the temporary file is gone and `path` is unchanged. After a kill the temporary file stays under
    `path` + `.incomplete`, a name that no reader looks for, and the next writer replaces it.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        # "x" creates the file: if that name were a link, its target would be overwritten.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, all or nothing."""
    with atomic_file(path) as file:
        file.write(data)


def replace_file(temporary: Path, path: Path) -> None:
    """Rename an fsynced file to `path`, so that the new name survives a power loss."""
    _renamed(temporary, path)
    sync_directory(path.parent)


def _renamed(temporary: Path, path: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_RENAME
    while True:
        try:
            temporary.replace(path)
            return
        except PermissionError:
            if not platform.WINDOWS or time.monotonic() > deadline:
                raise
        time.sleep(_SECONDS_BETWEEN_TRIES)


def sync_directory(directory: Path) -> None:
    """Make new names in a directory survive a power loss, if the system can open a directory to sync it."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
        finally:
            os.close(descriptor)
