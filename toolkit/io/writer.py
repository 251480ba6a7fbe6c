"""Bytes written to a file in a thread, while the next ones are read and hashed, and brought to the disk as it grows."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

# The disk starts early on what it lacks, so the last fsync is short; and 352 GB that go by don't push out of the page
# cache what other programs have there.
SYNC_BYTES = 64 * 2**20
# Blocks from this size on are written in a thread.
LARGE = 2**18


class WriteBehind:
    """Appends to the file open at `descriptor`, each block while the caller prepares the next one.

    `position` is the number of bytes that the file has; `durable` if a power loss may cost little more than
    `SYNC_BYTES` of them. Leaving the block waits for all writes.
    """

    def __init__(self, descriptor: int, position: int = 0, *, durable: bool = False) -> None:
        self.position = self._synced = position
        self._descriptor, self._durable = descriptor, durable
        # One writes, one syncs.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        self._syncing: Future[None] | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown()
        if kind is None:
            self.wait()

    def write(self, block: bytes | bytearray | memoryview) -> None:
        """Append `block`, which must not change until `wait` or the next call returns.

        Raises `OSError` if the block before or a sync failed.
        """
        self.wait()
        if len(block) < LARGE:
            self._write(block)
        else:
            self._writing = self._threads.submit(self._write, block)

    def wait(self) -> None:
        """Wait until every block is handed to the system; raises its `OSError`."""
        if self._writing is not None:
            self._writing.result()

    def sync(self) -> None:
        """Wait until every block is on the disk; raises its `OSError`."""
        self.wait()
        if self._syncing is not None:
            self._syncing.result()
        os.fsync(self._descriptor)

    def _write(self, block: bytes | bytearray | memoryview) -> None:
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self.position += len(block)
        if self.position - self._synced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            # Parts are made again after a power loss, so for them nobody waits.
            range_behind = (sync_range, self._descriptor, self._synced, self.position)
            self._syncing = self._threads.submit(
                *(range_behind if self._durable else (drop_cached, self._descriptor))
            )
            self._synced = self.position


def sync_range(descriptor: int, start: int, stop: int) -> None:
    """Sync a file's bytes to the disk, and drop those from `start` to `stop` from the page cache."""
    # With the file's length, without its times.
    getattr(os, "fdatasync", os.fsync)(descriptor)
    drop_cached(descriptor, start, stop - start)


def drop_cached(descriptor: int, start: int = 0, nbytes: int = 0) -> None:
    """Drop a file's synced bytes, 0 for all, from the page cache, and start to write the others to the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)
