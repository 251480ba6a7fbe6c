"""Reading from and writing to a disk: one writer to a directory, and what went wrong in one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from runner.errors import AGAIN, BloomdeskError, explained
from runner.format.safetensors import read_small
from runner.system.disk import largest_file
from runner.system.lock import sole_writer


def reason(error: Exception) -> str:
    """What the error says, short and without control characters: it may quote a file."""
    return str(error)[:200].encode("unicode_escape").decode()


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError or EOFError of reading `path` into an error that says what went wrong."""
    with _errors(path, "cannot be read"):
        try:
            yield
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
def disk_errors(path: Path, action: str = "written") -> Iterator[None]:
    """Turn an OSError of writing `path` into an error that says what went wrong; `action` is like "deleted"."""
    with _errors(path, f"cannot be {action}"):
        yield


@contextmanager
def sole_writer_of(destination: Path) -> Iterator[None]:
    """Make the directory and hold its lock; `BloomdeskError` if another process writes there."""
    with disk_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
    with sole_writer(destination):
        yield


def require_large_files(directory: Path, sizes: Mapping[str, int]) -> None:
    """Raise `BloomdeskError` if the file system, or a limit, takes no file as large as the largest of `sizes`."""
    name = max(sizes, key=sizes.__getitem__, default="")
    most, why = largest_file(directory)
    if name and sizes[name] > most:
        step = "give a directory on another file system: exFAT, NTFS, ext4 or APFS"
        if why != "FAT":
            step = f"raise the limit: {why} unlimited"
        raise BloomdeskError(
            f"{directory} takes no file of more than {most:,} bytes ({why}), and {name} has {sizes[name]:,}",
            step,
        )


@contextmanager
def _errors(path: Path, problem: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why, step = explained(error, path)
        # Around work on a whole directory: the file in it; around that on a file: the one beside it, under its suffix.
        if isinstance(error.filename, str | os.PathLike) and error.filename2 is None:
            named = Path(error.filename)
            if path in named.parents or (named.parent == path.parent and named.stem == path.name):
                path = named
        if error.errno == errno.EISDIR:
            why, step = "a directory has its name", f"move {path} away, {AGAIN}"
        # A full disk is the same for whatever was to be written.
        problem = "" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{problem}: "
        raise BloomdeskError(f"{path}: {problem}{why}", step) from error
