"""The part of a file that has come so far: on the disk, hashed, ready for the next byte, in any process."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from runner.errors import BloomdeskError
from toolkit.hub.digest import Digest
from toolkit.hub.revision import HubFile
from toolkit.io.progress import FileProgress

PIECE = 2**20
# So many bytes at a time are brought onto the disk for good and let out of the page cache: a power loss costs
# little more than that, and 352 GB that go by don't push out what other programs have there.
SETTLE = 256 * 2**20
# Pieces from this size on are hashed while they are written.
LARGE = 2**18
# Flags that not every system has: write through no link, change no line endings.
NO_LINK, BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)


class Damaged(BloomdeskError):
    """Bytes that are not the file's."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "run the same command again: it fetches this file alone")


class Incomplete:
    """A file's beginning on the disk; its length is all that a later process needs to go on.

    `position` is the bytes that are there, `received` those that came over the network in this process.
    """

    def __init__(self, path: Path, file: HubFile, reports: FileProgress) -> None:
        self.path, self._file, self._reports = path, file, reports
        self.position = self.received = self._settled = 0
        self.digest = Digest(file)

    def __enter__(self) -> Incomplete:
        # Unbuffered: what has been hashed has been handed to the system, and a kill loses none of it.
        self._disk = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK | BINARY, 0o644)
        self._hasher, self._settler = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._settling: Future[None] | None = None
        try:
            self._take_up()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._hasher.shutdown()
        self._settler.shutdown()
        os.close(self._disk)

    def _take_up(self) -> None:
        if os.fstat(self._disk).st_size > self._file.size:
            os.ftruncate(self._disk, 0)
        while piece := os.read(self._disk, PIECE):
            self.digest.update(piece)
            self._advance(len(piece))

    def write(self, piece: bytes | memoryview) -> None:
        """Add what came, which must not change until this returns.

        Raises `Damaged` where it is more than the file has, `OSError` where the disk does not take it.
        """
        if self.position + len(piece) > self._file.size:
            raise Damaged(f"more came for {self._file.path} than its {self._file.size:,} bytes")
        hashing = self._hasher.submit(self.digest.update, piece) if len(piece) >= LARGE else None
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(self._disk, rest) :]
        if hashing is None:
            self.digest.update(piece)
        else:
            hashing.result()
        self._advance(len(piece))

    def _advance(self, count: int) -> None:
        self.position += count
        self._reports(self.position)
        if self.position - self._settled >= SETTLE and (self._settling is None or self._settling.done()):
            self._wait_for_disk()
            # In a thread: while the disk works, the network goes on.
            self._settling = self._settler.submit(settle, self._disk, self._settled, self.position)
            self._settled = self.position

    def _wait_for_disk(self) -> None:
        """Until what was last sent to the disk is there; raises its `OSError`."""
        if self._settling is not None:
            self._settling.result()

    def finish(self) -> None:
        """Bring all of it onto the disk for good."""
        self._wait_for_disk()
        os.fsync(self._disk)
        self._reports(self.position)


def settle(disk: int, start: int, stop: int) -> None:
    """Bring a file's bytes onto the disk for good, and let those from `start` to `stop` out of the page cache."""
    getattr(os, "fdatasync", os.fsync)(disk)  # with the file's length, without its times
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(disk, start, stop - start, os.POSIX_FADV_DONTNEED)
