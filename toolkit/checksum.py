"""Hashes of files and tensors, computed while their bytes stream by in pieces of a few megabytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash

from runner.errors import BloomdeskError

PIECE = 8 * 2**20


class Stopped(Exception):
    """The hash is not wanted any more."""


def pieces(file: BinaryIO, offset: int, nbytes: int, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes `[offset, offset + nbytes)` of an unbuffered `file`, read into `buffer` a piece at a time.

    Each piece is a view of `buffer` and holds until the next is asked for. Raises `EOFError` where the file
    ends too early. Seeks once, so no other reader may use the same file object meanwhile.
    """
    file.seek(offset)
    left = nbytes
    while left:
        count = file.readinto(buffer[: min(left, len(buffer))])
        if not count:
            raise EOFError(f"it ends {left:,} bytes too early")
        yield buffer[:count]
        left -= count


def new_buffer() -> memoryview:
    """A buffer for `pieces`; one for a whole run is enough."""
    return memoryview(bytearray(PIECE))


def xxh3_128(path: Path) -> str:
    """Hexadecimal xxh3-128 of a file; `OSError` where it can't be read."""
    digest = xxhash.xxh3_128()
    buffer = new_buffer()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """Hexadecimal sha256 of a file; `OSError` where it can't be read, `Stopped` soon after `stop` is set."""
    digest = hashlib.sha256()
    buffer = new_buffer()
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
