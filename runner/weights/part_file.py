"""The files of weights: the one place where the runner reads them, and notices that one has changed."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runner.errors import BloomdeskError, in_shell, reading
from runner.system import files, platform
from runner.weights.mapping import Mapping

# Bytes of the largest page that the page cache has on most systems.
LARGE_PAGE = 2**21


@dataclass(eq=False)
class PartFile:
    """A part as it was when the model was opened; once it has changed, nothing is read from it.

    `disk` is the number of its disk if a model is spread over several.
    """

    path: Path
    size: int
    changed_ns: int
    disk: int = 0
    _mapping: Mapping | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @classmethod
    def of(cls, path: Path, disk: int = 0) -> PartFile:
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns, disk)

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

    def read_pages(self, start: int, nbytes: int, view: memoryview) -> None:
        """Read the pages that bytes `start` to `start + nbytes` lie in into page-aligned memory.

        They leave nothing in the page cache. Raises `BloomdeskError` if they cannot be read, or the file has changed.
        """
        first = start - start % platform.PAGE
        wanted = start + nbytes - first
        with self._reading(start, nbytes):
            pages = view[: files.whole_pages(wanted)]
            files.read_uncached(self.path, first, pages, wanted, self.check_unchanged)

    def page_in(self, start: int, nbytes: int) -> None:
        """Bring bytes `start` to `start + nbytes` into RAM as part of the page cache, for `mapped` to show them.

        Raises `BloomdeskError` if they cannot be read, or the file has changed.
        """
        with self._reading(start, nbytes):
            self.check_unchanged()
            if not self._whole_mapping().page_in(start, nbytes):
                files.bring_into_cache(self.path, start, nbytes)

    def mapped(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The bytes from `start` as a tensor, which shows the file; `page_in` must have been called before."""
        return self._mapping.tensor(start, dtype, shape)

    def check_mapping(self) -> None:
        """Raise `BloomdeskError` if bytes could not be had when `mapped` tensors were used; these are then void."""
        if self._mapping is None or not self._mapping.has_failed:
            return
        self._mapping = None
        self.check_unchanged()
        with reading(self.path, self.hint, " while it is in use"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def drop(self, start: int, nbytes: int) -> None:
        """Free the RAM of the pages in this range, unless another process has them mapped, too."""
        if self._mapping is not None:
            self._mapping.drop(start, nbytes)
        # What is no longer there takes no RAM.
        with suppress(OSError), files.open_for_rows(self.path) as file:
            # Large pages reach beyond it; of what lies there nothing goes that is mapped.
            first = max(0, start - LARGE_PAGE)
            files.forget(file, first, start + nbytes + LARGE_PAGE - first)

    def _whole_mapping(self) -> Mapping:
        """The mapping of the file, made by the first reader that needs it."""
        with self._lock:
            if self._mapping is None:
                with files.open_for_rows(self.path) as file:
                    self.check_unchanged(file.fileno())
                    self._mapping = Mapping(file)
            return self._mapping

    def _reading(self, start: int, nbytes: int) -> AbstractContextManager[None]:
        return reading(self.path, self.hint, f" at bytes {start:,} to {start + nbytes:,}")

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
