"""Reading from and writing to a disk: one writer to a directory, and what went wrong in one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.safetensors import read_small
from runner.system.disk import free_bytes
from runner.system.lock import sole_writer


def reason(error: Exception) -> str:
    """What the error says, short and without control characters: it may quote a file."""
    return str(error)[:200].encode("unicode_escape").decode()


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError or EOFError of reading `path` into an error that says what went wrong."""
    try:
        yield
    except OSError as error:
        raise BloomdeskError(f"{path}: cannot be read: {error.strerror}") from error
    except EOFError as error:
        raise BloomdeskError(f"{path}: {error}") from None


def read_if_exists(path: Path, largest: int) -> bytes | None:
    """All bytes of a small file, or None if there is none; `BloomdeskError` if it can't be read."""
    with read_errors(path):
        try:
            return read_small(path, largest)
        except (FileNotFoundError, NotADirectoryError):
            return None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into an error that says what went wrong."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BloomdeskError(
                f"{path}: the disk is full: {free_bytes(path):,} bytes are free",
                "make room and run the same command again: it resumes where it stopped",
            ) from error
        raise BloomdeskError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def sole_writer_of(destination: Path) -> Iterator[None]:
    """Make the directory and hold its lock; `BloomdeskError` if another process writes there."""
    with disk_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
    with sole_writer(destination):
        yield
