"""Bytes that stream by in pieces of a few megabytes, and the hashes of source shards beside other work."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from runner.errors import BloomdeskError

PIECE = 8 * 2**20


class Stopped(Exception):
    """The hash is not wanted any more."""


def pieces(file: BinaryIO, offset: int, nbytes: int, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
    """The bytes `[offset, offset + nbytes)` of an unbuffered `file`, each piece read into the next of `buffers`.

    A piece holds until its buffer's turn comes again. Raises `EOFError` where the file ends too early. Seeks
    once, so no other reader may use the same file object meanwhile.
    """
    file.seek(offset)
    left = nbytes
    while left:
        buffer = next(buffers)
        count = file.readinto(buffer[: min(left, len(buffer))])
        if not count:
            raise EOFError(f"it ends {left:,} bytes too early")
        yield buffer[:count]
        left -= count


def new_buffers(count: int = 1) -> Iterator[memoryview]:
    """That many buffers of `PIECE` bytes in endless turns."""
    return cycle([memoryview(bytearray(PIECE)) for _ in range(count)])


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """Hexadecimal sha256 of a file; `OSError` where it can't be read, `Stopped` soon after `stop` is set."""
    digest = hashlib.sha256()
    buffer = next(new_buffers())
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if stop is not None and stop.is_set():
                raise Stopped
    return digest.hexdigest()


class ShardHashes:
    """sha256 of source shards, each hashed once, in a thread beside the work on their bytes.

    The thread reads from front to back, faster than parts are written, so it also brings the shard into the
    page cache for the reader that gathers tensors from it.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._hashes: dict[Path, Future[str]] = {}

    def __enter__(self) -> ShardHashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def begin(self, path: Path) -> None:
        """Start on a shard, after those begun before it."""
        if path not in self._hashes:
            self._hashes[path] = self._thread.submit(sha256, path, self._stop)

    def result(self, path: Path) -> str:
        """The hash of a shard, once it is there; `BloomdeskError` where the shard can't be read."""
        self.begin(path)
        try:
            return self._hashes[path].result()
        except OSError as error:
            raise BloomdeskError(f"{path}: cannot be read: {error.strerror}") from error
