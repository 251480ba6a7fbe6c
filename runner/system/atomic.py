"""Files that are whole or absent: written beside their place, fsynced, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".incomplete"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path`, on disk for good, when the block ends without an error.

    After an error the temporary file is gone and `path` is as it was; after a kill the temporary file stays
    under `path` + `.incomplete`, which nothing ever takes for whole, and the next writer replaces it.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open(
            "xb"
        ) as file:  # a file of its own: if that name were a link, its target would be lost
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(temporary: Path, path: Path) -> None:
    """Rename an fsynced file to `path`, and make the rename itself survive a power loss."""
    temporary.replace(path)
    if os.name == "posix":  # elsewhere a directory can't be opened to be synced
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(data)
