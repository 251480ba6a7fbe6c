"""Bytes written to a file in a thread, while the next ones are read and hashed."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

from toolkit.io import hasher as checksum

WRITE_BACK = 64 * 2**20


class WriteBehind:
    """Writes to `file` in a thread, so that the next piece is read and hashed meanwhile.

    A piece from `buffers` is written before its buffer's turn comes again. Leaving the block waits for all.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.buffers = checksum.new_buffers(3)  # one is read into, one waits, one is written
        self._file = file
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._pending: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if kind is None and self._pending is not None:
            self._pending.result()

    def write(self, piece: bytes | memoryview) -> None:
        """Have `piece` written; raises what went wrong with the one before."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._thread.submit(self._write, piece)

    def _write(self, piece: bytes | memoryview) -> None:
        self._file.write(piece)
        self._unsynced += len(piece)
        if self._unsynced >= WRITE_BACK and hasattr(os, "posix_fadvise"):
            # The disk starts now on what it has not, and the page cache forgets what it has; without this all
            # is left to fsync, and the part pushes out the shard that two readers share. It changes no bytes.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsynced = 0
