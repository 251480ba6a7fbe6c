"""The files of weights: the one place where the runner reads them, and notices that one has changed."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError, in_shell, reading
from runner.system import files, platform


@dataclass(frozen=True)
class PartFile:
    """A part as it was when the model was opened; once it has changed, nothing is read from it."""

    path: Path
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> PartFile:
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)

    @property
    def hint(self) -> str:
        """The next command if it cannot be read."""
        return f"see what is damaged: bloomdesk verify {in_shell(self.path.parent)}"

    def check_unchanged(self, descriptor: int | None = None) -> None:
        """Raise `BloomdeskError` if the file, found by its path or already open, is not as it was."""
        with reading(self.path, self.hint):
            found = self.path.stat() if descriptor is None else os.fstat(descriptor)
        if (found.st_size, found.st_mtime_ns) != (self.size, self.changed_ns):
            raise BloomdeskError(
                f"{self.path} was changed while the model was in use: opened with {self.size:,} bytes, "
                f"now {found.st_size:,} bytes written at another time",
                f"check that it is whole, then run it again: bloomdesk verify {in_shell(self.path.parent)}",
            )

    def read_pages(self, start: int, nbytes: int, view: memoryview, *, stays: bool) -> None:
        """Read the pages that bytes `start` to `start + nbytes` lie in into page-aligned memory.

        They leave nothing in the page cache. With `stays`, what the page cache happens to have is taken from there.
        Raises `BloomdeskError` if they cannot be read, or the file has changed.
        """
        first = start - start % platform.PAGE
        wanted = start + nbytes - first
        with reading(self.path, self.hint, f" at bytes {start:,} to {start + nbytes:,}"):
            done = 0
            if stays:
                self.check_unchanged()
                done = files.read_cached(self.path, first, view[:wanted])
                if done == wanted:
                    return
                done -= done % platform.PAGE
            rest = view[done : files.whole_pages(wanted)]
            files.read_uncached(self.path, first + done, rest, wanted - done, self.check_unchanged)

    @contextmanager
    def opened(self) -> Iterator[io.FileIO]:
        """The file, to be read a few kilobytes here and there by `read_range`. Raises `BloomdeskError`, also inside."""
        with reading(self.path, self.hint), files.open_for_rows(self.path) as file:
            self.check_unchanged(file.fileno())
            yield file


def read_range(file: io.FileIO, start: int, nbytes: int) -> bytearray:
    """Bytes `start` to `start + nbytes` of an open file. Raises OSError if it ends before them."""
    data = bytearray(nbytes)
    file.seek(start)
    if file.readinto(data) != nbytes:
        raise OSError(errno.EIO, "the file ends too early")
    return data
