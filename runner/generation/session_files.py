"""A session on disk: what was asked, and the KV cache of each position so far, appended as passes end.

    SESSION/
      session.json     the model's fingerprint, the prompt's token ids, and how tokens are chosen
      cache.bin        records, one or more for each pass

    record    magic, number of positions, bytes of keys and values, bytes of text (4 little-endian 64-bit numbers)
              text: JSON with "ids" of the positions, and "next", the tokens that the pass gave
              keys and values
              BLAKE2b of 16 bytes of all before it

A record whose checksum is wrong, or that ends too early, is what a kill or a power cut has left; it counts as nothing,
with what follows it. So does the temporary file of a session.json that was never finished.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError, explained, reading
from runner.format.digest import digest
from runner.format.safetensors import read_small
from runner.system.atomic import TEMPORARY_SUFFIX, write_atomically
from runner.system.clutter import is_clutter

SESSION, CACHE = "session.json", "cache.bin"
FORMAT, FORMAT_VERSION = "bloomdesk-session", 1
MAGIC = 0x6B6365645F6D6F6C  # "lom_deck"
HEAD = struct.Struct("<4Q")
CHECKSUM_BYTES = 16
LARGEST_REQUEST = 2**28


@dataclass(frozen=True)
class SessionRequest:
    """What a session is of: the model's `fingerprint`, the prompt, and the `options` that decide its tokens."""

    fingerprint: str
    prompt_ids: tuple[int, ...]
    options: Mapping[str, Any]

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "prompt_ids": list(self.prompt_ids),
            "options": dict(self.options),
        }
        return json.dumps({**body, "sha256": digest(body)}) + "\n"


@dataclass(frozen=True)
class Record:
    """Positions that a pass added: their token `ids`, what they gave, and where their keys and values lie.

    `start` is the first position, `offset` and `nbytes` the place of the record in cache.bin, `data` that of the keys
    and values; `next_ids` are the tokens that the pass gave, and `scores` what was recorded of them.
    """

    start: int
    ids: tuple[int, ...]
    next_ids: tuple[int, ...]
    scores: tuple[Any, ...]
    offset: int
    nbytes: int
    data: tuple[int, int]

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)


@dataclass
class SessionFiles:
    """The files of a session; `records` are the sound ones, in their order."""

    directory: Path
    request: SessionRequest | None = None
    records: list[Record] = field(default_factory=list)
    # What the system says of session.json as this process knows it.
    _known: tuple[int, int, int] | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids of all positions in the cache."""
        return tuple(token for record in self.records for token in record.ids)

    @property
    def positions(self) -> int:
        """Number of positions in the cache."""
        return self.records[-1].stop if self.records else 0

    @property
    def nbytes(self) -> int:
        """Bytes of sound records."""
        return self.records[-1].offset + self.records[-1].nbytes if self.records else 0

    @property
    def new_ids(self) -> tuple[int, ...]:
        """The tokens that followed the prompt."""
        return tuple(token for record in self._after_prompt for token in record.next_ids)

    @property
    def scores(self) -> tuple[Any, ...]:
        """What was recorded of `new_ids`."""
        return tuple(score for record in self._after_prompt for score in record.scores)

    @property
    def _after_prompt(self) -> Iterator[Record]:
        """Records whose tokens follow the prompt; those of a shorter prompt were another text's."""
        prompt = len(self.request.prompt_ids) if self.request else 0
        return (record for record in self.records if record.stop >= prompt)

    @classmethod
    def load(cls, directory: Path) -> SessionFiles:
        """The session in `directory`, empty if that is new or empty.

        Raises `BloomdeskError` if it holds something else, or its session.json is damaged.
        """
        found = cls(directory)
        if os.path.lexists(directory) and not directory.is_dir():
            raise BloomdeskError(
                f"{directory} is not a directory", "give a new directory, or one of a session"
            )
        path = directory / SESSION
        try:
            text = read_small(path, LARGEST_REQUEST)
        except FileNotFoundError:
            if directory.exists() and any(not _is_expected(path.name) for path in directory.iterdir()):
                raise BloomdeskError(
                    f"{directory} is no session and is not empty", "give a new directory, or one of a session"
                ) from None
            return found
        except OSError as error:
            why, step = explained(error, path)
            raise BloomdeskError(f"{path} cannot be read: {why}", step) from error
        found.request, found._known = _decode(text, path), _identity(path)
        cache = directory / CACHE
        if os.path.lexists(cache):
            # A pipe would be waited for, and a device read without an end.
            if not cache.is_file():
                raise BloomdeskError(f"{cache} is not a regular file", "give another directory")
            with reading(cache):
                found.records = list(_records(cache))
        return found

    def begin(self, request: SessionRequest, keep: int) -> None:
        """Make this a session of `request`, with the records of the first `keep` positions, or fewer.

        Raises `OSError` if the disk fails. Then this object is of `request` all the same, and the files are not.
        """
        self.request = request
        self._keep(keep)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.truncate(keep)
        # After that: what was generated otherwise must never count for this request.
        write_atomically(self.directory / SESSION, request.to_json().encode())
        self._known = _identity(self.directory / SESSION)

    def _keep(self, keep: int) -> None:
        self.records = [record for record in self.records if record.stop <= keep]

    def truncate(self, keep: int) -> None:
        """Drop records beyond the first `keep` positions, and everything that is no sound record."""
        self._keep(keep)
        path = self.directory / CACHE
        if path.exists() and path.stat().st_size == self.nbytes:
            return
        with path.open("ab") as file:
            file.truncate(self.nbytes)
            os.fsync(file.fileno())

    def append(
        self, ids: Sequence[int], next_ids: Sequence[int], scores: Sequence[Any], data: bytes | memoryview
    ) -> None:
        """Add a record; it is on the disk when this returns.

        Raises `OSError` if the disk fails, or another process has written there, and adds nothing.
        """
        self._require_own_files()
        text = json.dumps({"ids": list(ids), "next": list(next_ids), "scores": list(scores)}).encode()
        head = HEAD.pack(MAGIC, len(ids), len(data), len(text))
        checksum = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
        offset = self.nbytes
        try:
            with (self.directory / CACHE).open("r+b", buffering=0) as file:
                file.seek(offset)
                for block in (head, text, data):
                    checksum.update(block)
                    _write(file, block)
                _write(file, checksum.digest())
                file.truncate()
                os.fsync(file.fileno())
        except OSError:
            self.truncate(self.positions)
            raise
        start = offset + len(head) + len(text)
        nbytes = len(head) + len(text) + len(data) + CHECKSUM_BYTES
        place = (start, len(data))
        self.records.append(
            Record(self.positions, tuple(ids), tuple(next_ids), tuple(scores), offset, nbytes, place)
        )

    def _require_own_files(self) -> None:
        """Raise `OSError` unless the files are as this process left them: two texts in one cache would be none."""
        size = (self.directory / CACHE).stat().st_size
        if _identity(self.directory / SESSION) != self._known or size != self.nbytes:
            raise OSError(errno.EBUSY, "another process has written there")


def _is_expected(name: str) -> bool:
    """Whether a session that was only just begun may hold a file of this name, and so may a new directory."""
    return name in (CACHE, SESSION + TEMPORARY_SUFFIX) or is_clutter(name)


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _write(file: Any, block: bytes | memoryview) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


def _decode(data: bytes, path: Path) -> SessionRequest:
    try:
        body = json.loads(data)
        if body["format"] != FORMAT or body["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is not {FORMAT} {FORMAT_VERSION}")
        if body.pop("sha256") != digest(body):
            raise ValueError("its own checksum does not match: it was edited or damaged")
        return SessionRequest(body["fingerprint"], tuple(body["prompt_ids"]), body["options"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BloomdeskError(
            f"{path} is not sound: {str(error)[:200]}", "delete it, or give another directory"
        ) from None


def _records(path: Path) -> Iterator[Record]:
    """The records up to the first that is not whole."""
    offset = position = 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            file.seek(offset)
            head = file.read(HEAD.size)
            if len(head) < HEAD.size:
                return
            magic, count, data_bytes, text_bytes = HEAD.unpack(head)
            nbytes = HEAD.size + text_bytes + data_bytes + CHECKSUM_BYTES
            if magic != MAGIC or offset + nbytes > size:
                return
            checksum = hashlib.blake2b(head, digest_size=CHECKSUM_BYTES)
            text = file.read(text_bytes)
            checksum.update(text)
            left = data_bytes
            while left and (block := file.read(min(left, 2**20))):
                checksum.update(block)
                left -= len(block)
            if left or file.read(CHECKSUM_BYTES) != checksum.digest():
                return
            try:
                body = json.loads(text)
                ids, following, scores = (tuple(body[name]) for name in ("ids", "next", "scores"))
            except (ValueError, KeyError, TypeError, RecursionError):
                return
            if len(ids) != count:
                return
            place = (offset + HEAD.size + text_bytes, data_bytes)
            yield Record(position, ids, following, scores, offset, nbytes, place)
            offset, position = offset + nbytes, position + count
