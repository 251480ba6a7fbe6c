"""Hashes of bytes that go by, of files, and of source shards in the background."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from toolkit.io.disk import read_errors
from toolkit.io.reader import retried

# Below this size, glibc returns the memory of every coded chunk to the system, and each new one is faulted in again.
BUFFER = 8 * 2**20


class Hash(Protocol):
    """A hash of hashlib or xxhash, or a `Digest`."""

    def update(self, block: bytes | memoryview, /) -> None: ...


class Digest:
    """The hashes by which the Hub knows a file: always sha256, and with `git_size` the blob sha1 of as many bytes."""

    def __init__(self, git_size: int | None = None) -> None:
        self._hashes = [hashlib.sha256()]
        if git_size is not None:
            self._hashes.append(hashlib.sha1(f"blob {git_size}\0".encode(), usedforsecurity=False))

    def update(self, block: bytes | memoryview, /) -> None:
        for each in self._hashes:
            each.update(block)

    @property
    def sha256(self) -> str:
        return self._hashes[0].hexdigest()

    @property
    def git_sha1(self) -> str | None:
        return self._hashes[1].hexdigest() if len(self._hashes) > 1 else None


def hash_file(file: Path | int, digest: Hash, seen: Callable[[int], object] = lambda position: None) -> None:
    """Update `digest` with the bytes of a path, or of a descriptor from where it stands.

    `seen` gets the number of bytes so far; it may raise to stop. Raises `OSError` if the file can't be read, with EIO
    after several tries.
    """
    buffer, position = memoryview(bytearray(BUFFER)), 0
    with retried(lambda: open(file, "rb", buffering=0, closefd=isinstance(file, Path))) as source:
        while count := retried(lambda: source.readinto(buffer)):
            digest.update(buffer[:count])
            position += count
            seen(position)


class _Stopped(Exception):
    """The hash is no longer wanted."""


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

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def begin(self, path: Path) -> None:
        """Start on a shard, after those begun before it."""
        if path not in self._hashes:
            self._hashes[path] = self._thread.submit(self._sha256, path)

    def result(self, path: Path) -> str:
        """The sha256 of a shard, waited for; `BloomdeskError` if the shard can't be read."""
        self.begin(path)
        with read_errors(path):
            return self._hashes[path].result()

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        hash_file(path, digest, self._check_stop)
        return digest.hexdigest()

    def _check_stop(self, position: int) -> None:
        if self._stop.is_set():
            raise _Stopped
