"""A journal: records that are appended, each a checksum and a JSON object in a line.

    7d0a4c6be1f80b0a {"line": 3, "place": 0, "ids": [189, 2], ...}

A last line that has no end is what a kill or a power cut has left, and is removed. A line whose checksum is wrong
counts as nothing: what it held is done again, and comes out the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.system.atomic import sync_directory

CHECKSUM_BYTES = 8


@dataclass(frozen=True)
class Place:
    """Where a record lies."""

    offset: int
    nbytes: int


class Journal:
    """The journal at `path`, which is made if it is missing. Raises `OSError` if the disk fails, and adds nothing."""

    def __init__(self, path: Path, *, syncs: bool = True) -> None:
        """One that `syncs` is safe from a power cut, too."""
        is_new, self._syncs = not path.exists(), syncs
        self._file = path.open("a+b", buffering=0)
        try:
            if is_new and syncs:
                sync_directory(path.parent)
            self._cut()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def append(self, records: Iterable[dict[str, Any]]) -> list[Place]:
        """Where the records are; they are on the disk when this returns."""
        places, data = [], bytearray()
        for record in records:
            line = _line(record)
            places.append(Place(self._length + len(data), len(line)))
            data += line
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
            if self._syncs:
                os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._length)
            raise
        self._length += len(data)
        return places

    def read(self, place: Place) -> dict[str, Any] | None:
        """The record there, or None if it is damaged."""
        self._file.seek(place.offset)
        data = b""
        while len(data) < place.nbytes and (block := self._file.read(place.nbytes - len(data))):
            data += block
        return _record(data)

    def records(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """All sound records with their places."""
        return records(Path(self._file.name))

    def _cut(self) -> None:
        """Remove what follows the last whole line."""
        self._length = end = self._file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 2**16)
            self._file.seek(begin)
            block = self._file.read(end - begin)
            if (found := block.rfind(b"\n")) >= 0:
                end = begin + found + 1
                break
            end = begin
        if end < self._length:
            self._file.truncate(end)
            os.fsync(self._file.fileno())
            self._length = end


def records(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """All sound records of a journal with their places; nothing is changed."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if (record := _record(line)) is not None:
                yield Place(offset, len(line)), record
            offset += len(line)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
    return _checksum(text) + b" " + text + b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != _checksum(text):
        return None
    return json.loads(text.decode(errors="surrogatepass"))


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=CHECKSUM_BYTES).hexdigest().encode()
