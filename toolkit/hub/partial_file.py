"""The part of a file that has come: on the disk, hashed, ready for the next byte in any process."""

from __future__ import annotations

import os
from pathlib import Path

from runner.errors import BloomdeskError
from toolkit.hub.revision import HubFile
from toolkit.io.hasher import hash_file
from toolkit.io.progress import FileProgress
from toolkit.io.writer import WriteBehind

# Flags that not every system has: write through no link, change no line endings.
NO_LINK, BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)


class Damaged(BloomdeskError):
    """Bytes that are not the file's."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "run the same command again: it fetches this file alone")


class PartialFile:
    """A file's beginning on the disk; its length is all that a later process needs to resume.

    `position` is the number of bytes there, `received` of those that came over the network in this process.
    """

    def __init__(self, path: Path, file: HubFile, progress: FileProgress) -> None:
        self.path, self._file, self._progress = path, file, progress
        self.position = self.received = 0
        self.digest = file.digest()

    def __enter__(self) -> PartialFile:
        if self.path.is_symlink() or (self.path.exists() and self.path.stat().st_nlink > 1):
            # It would write somewhere else.
            self.path.unlink()
        # Unbuffered: what has been hashed has been handed to the system, and a kill loses none of it.
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK | BINARY, 0o644)
        try:
            if os.fstat(self._descriptor).st_size > self._file.size:
                os.ftruncate(self._descriptor, 0)
            hash_file(self._descriptor, self.digest, self._advance)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._behind = WriteBehind(self._descriptor, self.position, durable=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._behind.__exit__(kind)
        finally:
            os.close(self._descriptor)

    def write(self, block: bytes | memoryview) -> None:
        """Append what came, which must not change until this returns.

        Raises `Damaged` if it is more than the file has, `OSError` if the disk does not take it.
        """
        if self.position + len(block) > self._file.size:
            raise Damaged(f"more came for {self._file.path} than its {self._file.size:,} bytes")
        self._behind.write(block)
        self.digest.update(block)
        self._behind.wait()
        self._advance(self._behind.position)

    def _advance(self, position: int) -> None:
        self.position = position
        self._progress(position)

    def report(self) -> None:
        """Tell the progress that nothing is new; it may raise to end the transfer."""
        self._progress(self.position)

    def finish(self) -> None:
        """Sync all of it to the disk."""
        self._behind.sync()
        self._progress(self.position)
