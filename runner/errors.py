"""The base of all errors that users see: what went wrong, and what to do next.

What the system refuses is worded here, too, in one table: `explained`.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AGAIN = "then run the same command again"
_ROOM = "make room and run the same command again: it resumes where it stopped"
_INODES = "delete or move away files, however small they are, and run the same command again"
_RIGHTS = "give this user the right to it, or use another path"
_MOUNT = f"see whether the disk is connected and mounted, {AGAIN}"
# The next step after an error number.
_STEPS = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "remove the link that leads back to itself",
    errno.ENOTDIR: "give another path: a name in this one is a file, not a directory",
    errno.EEXIST: "give another path: something else has this name",
    errno.EISDIR: "give the path of a file: this is a directory",
    errno.EMFILE: f"raise the number of files that a process may open (ulimit -n), {AGAIN}",
    errno.ENFILE: f"end programs that hold many files open, {AGAIN}",
    errno.ENOMEM: f"end other programs, or raise the limit on memory (ulimit -v), {AGAIN}",
    errno.EAGAIN: f"end other programs, or raise the number of processes (ulimit -u), {AGAIN}",
    errno.EROFS: "give a path on a disk that can be written, or mount this one so",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "use another file system (FAT32 ends at 4 GiB a file), or raise the limit (ulimit -f)",
    errno.EIO: f"see the system's log: the disk, its cable or its network may be failing; {AGAIN}",
    errno.ESTALE: _MOUNT,
    errno.ENODEV: _MOUNT,
    errno.ENXIO: _MOUNT,
    errno.ENOTCONN: _MOUNT,
    errno.ETIMEDOUT: _MOUNT,
    errno.EBUSY: f"end the program that uses it, {AGAIN}",
}


class BloomdeskError(Exception):
    """A failure that the user can understand and act on.

    `message` is one sentence: what, where, expected against found. `hint` is the next command to run, or empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        # Names from files may be quoted in it: they must not control the terminal, nor break the line.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        # An address may hold a password.
        message = re.sub(r"(\w://)[^/@\s]*@", r"\1...@", message)
        super().__init__(message)
        self.message = message
        self.hint = hint

    def worded(self) -> str:
        """The text that is shown to the user."""
        return f"error: {self.message}" + (f"\n  next: {self.hint}" if self.hint else "")


class LastingFailure(BloomdeskError):
    """One after which this process can make no pass any more."""


def in_shell(path: Path) -> str:
    """The path as an argument of a command that the user is told to type."""
    text = str(path)
    # What begins with a hyphen would be an option.
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def explained(error: OSError | MemoryError, path: Path | None = None) -> tuple[str, str]:
    """Why the system refused, and what to do next, or ""; `path` is the file, if `error` does not name it."""
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM), _STEPS[errno.ENOMEM]
    why, number = error.strerror or str(error) or type(error).__name__, error.errno
    # Some are raised by this program with a text of its own, which says all there is to say.
    if number is None or (getattr(error, "winerror", None) is None and why != os.strerror(number)):
        return why, ""
    if number == errno.ENOENT and not _current_directory_exists():
        return "the current directory has been deleted", "change to a directory that exists"
    step = _STEPS.get(number, "")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return _full(number, path or Path(error.filename or "."), step)
    if number == errno.EFBIG:
        why = "the file system, or a limit of this process, takes no larger file"
    return why, step


def refused(error: OSError | MemoryError, doing: str = "") -> BloomdeskError:
    """The error for whatever the system refused, by the files that it names; `doing` is like "cannot be written"."""
    files = [getattr(error, name, None) for name in ("filename", "filename2")]
    # A number is the descriptor of an open file.
    where = " -> ".join(os.fsdecode(file) for file in files if isinstance(file, str | bytes | os.PathLike))
    why, hint = explained(error)
    return BloomdeskError(": ".join(filter(None, (where or "the system refuses", doing, why))), hint)


@contextmanager
def reading(path: Path, hint: str = "", place: str = "") -> Iterator[None]:
    """Raise `BloomdeskError` in place of an OSError: the file at `path` is missing, or cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise BloomdeskError(f"{path} is missing", hint) from None
    except OSError as error:
        why, step = explained(error, path)
        # What the caller knows of this file says more than the system's log.
        step = hint or step if error.errno == errno.EIO else step or hint
        raise BloomdeskError(f"{path} cannot be read{place}: {why}", step) from error


def _full(number: int, path: Path, step: str) -> tuple[str, str]:
    """What a disk lacks that takes no more: bytes, the number of files, or what its user may have."""
    lack = "this user's quota is used up" if number == errno.EDQUOT else "the disk is full"
    try:
        place = path.absolute()
        while not place.is_dir() and place != place.parent:
            place = place.parent
        disk = shutil.disk_usage(place)
        inodes = os.statvfs(place) if hasattr(os, "statvfs") else None
    except OSError:
        return lack, step
    # A file system that cannot tell says 0 of 0.
    if number == errno.ENOSPC and inodes and inodes.f_files and not inodes.f_favail:
        lack, step = "no inodes are free, so the disk takes no more files", _INODES
    return f"{lack}: {disk.free:,} bytes are free" if disk.free or disk.total else lack, step


def _current_directory_exists() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True
