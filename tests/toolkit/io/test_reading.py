"""Reads that fail or come short: what passes is not noticed, what lasts goes up."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from toolkit.io import hasher, reader
from toolkit.io.hasher import hash_file
from toolkit.io.reader import ByteRange, OpenedFile, ReadAhead
from toolkit.parts.part import is_in_place

DATA = bytes(range(256)) * 400
TRIES = len(reader.PAUSES) + 1


def failing(call: Callable, times: int, number: int) -> Callable:
    """`call`, which first fails so many times."""
    left = [times]

    def fail(*arguments: object, **named: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return call(*arguments, **named)

    return fail


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_bytes(DATA)
    monkeypatch.setattr(reader, "PAUSES", (0.0,) * (TRIES - 1))
    return tmp_path / "file"


def read_ahead(path: Path) -> bytes:
    with ReadAhead([ByteRange(path, 0, len(DATA))], threads=1) as ahead:
        return b"".join(map(bytes, ahead.blocks(0)))


def hashed(path: Path) -> bytes:
    digest = hashlib.sha256()
    hash_file(path, digest)
    return DATA if digest.digest() == hashlib.sha256(DATA).digest() else b""


class Raw(io.FileIO):
    """A file whose reads go through a replaceable function."""

    read_into = io.FileIO.readinto

    def readinto(self, buffer: memoryview) -> int:
        return Raw.read_into(self, buffer)


# How a file is read, and the calls that can fail then.
CALLS = [
    (read_ahead, reader, "open_regular"),
    (read_ahead, OpenedFile, "read"),
    (hashed, hasher, "open"),
    (hashed, Raw, "read_into"),
]


@pytest.mark.parametrize(("read", "owner", "name"), CALLS)
@pytest.mark.parametrize(
    ("times", "number", "passes"),
    [(1, errno.EIO, True), (TRIES - 1, errno.EIO, True), (TRIES, errno.EIO, False), (1, errno.EACCES, False)],
)
def test_a_passing_eio_is_read_again(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path], bytes],
    owner: object,
    name: str,
    times: int,
    number: int,
    passes: bool,
) -> None:
    monkeypatch.setattr(hasher, "open", lambda file, *_, **__: Raw(file), raising=False)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), times, number), raising=False)
    if passes:
        assert read(path) == DATA
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            read(path)


@pytest.mark.parametrize("read", [read_ahead, hashed])
def test_a_short_read_is_continued(
    path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], bytes]
) -> None:
    own, into = OpenedFile.read, io.FileIO.readinto
    monkeypatch.setattr(OpenedFile, "read", lambda self, start, buffer: own(self, start, buffer[:100]))
    monkeypatch.setattr(hasher, "open", lambda file, *_, **__: Raw(file), raising=False)
    monkeypatch.setattr(Raw, "read_into", lambda self, buffer: into(self, buffer[:100]))
    assert read(path) == DATA


NOT_THERE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "a loop of links": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("make", NOT_THERE.values(), ids=NOT_THERE)
def test_what_is_no_file_is_not_in_place(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)
    assert not is_in_place(path, DATA[:9], len(DATA))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_is_not_taken_as_missing(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    assert is_in_place(path, DATA[:9], len(DATA))
    monkeypatch.setattr("toolkit.parts.part.open_regular", failing(open, TRIES, number))
    with pytest.raises(BloomdeskError, match=f"{path.name}: cannot be read: {os.strerror(number)}"):
        is_in_place(path, DATA[:9], len(DATA))
