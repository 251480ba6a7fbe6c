"""One file from the Hub onto the disk: resumed where it stopped, hashed as it arrives, in place when sound.

Its two states in a directory:

    model.bin               whole and checked
    model.bin.incomplete    what has come so far; the next run goes on at its end
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from runner.errors import BloomdeskError
from toolkit import wire
from toolkit.durable import TEMPORARY_SUFFIX, put_in_place
from toolkit.hub import HubFile, Revision
from toolkit.progress import Progress

PIECE = 2**20
SECONDS_BETWEEN_REPORTS = 0.1
# Flags that not every system has: write through no link, change no line endings.
NO_LINK, BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Transfer:
    """A file that came: its sha256, the bytes that an earlier run had left, and those over the network."""

    sha256: str
    resumed: int
    received: int


class Digest:
    """The hashes of a file that goes by: always sha256, and the git blob sha1 where only that is known."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._git = None
        if file.sha256 is None:
            self._git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)

    def update(self, piece: bytes | memoryview) -> None:
        self._sha256.update(piece)
        if self._git is not None:
            self._git.update(piece)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def difference(self) -> str:
        """Empty where the bytes are the file's, else what was expected and what was found."""
        kind, expected, found = "sha256", self._file.sha256, self.sha256
        if self._git is not None:
            kind, expected, found = "git blob sha1", self._file.git_sha1, self._git.hexdigest()
        return "" if found == expected else f"its {kind} should be {expected} and is {found}"


class Reports:
    """A file's progress, told at most ten times a second, and always at the end."""

    def __init__(self, progress: Progress, file: HubFile) -> None:
        self._progress, self._file = progress, file
        self._next = 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == self._file.size:
            self._next = now + SECONDS_BETWEEN_REPORTS
            self._progress(self._file.path, done, self._file.size)


def hash_file(path: Path, file: HubFile, progress: Progress) -> Digest:
    """The digest of a file on the disk, taken as `file`."""
    digest, reports, done = Digest(file), Reports(progress, file), 0
    with path.open("rb", buffering=0) as source:
        while piece := source.read(PIECE):
            digest.update(piece)
            done += len(piece)
            reports(done)
    return digest


def fetch(revision: Revision, file: HubFile, directory: Path, progress: Progress) -> Transfer:
    """Bring `file` of `revision` into `directory`, in place only when its size and hash are right.

    Raises `BloomdeskError` where the Hub refuses, stays away, or sends something else, and `OSError` where
    the disk does not take it. What has come stays for the next run; what is wrong is deleted.
    """
    path = directory / file.path
    asked = wire.Asked(revision.repo, revision.commit, file.path)
    try:
        with Incomplete(
            path.with_name(path.name + TEMPORARY_SUFFIX), file, Reports(progress, file)
        ) as incoming:
            resumed = incoming.position
            patience = wire.Patience(asked)
            while incoming.position < file.size:
                before = incoming.position
                try:
                    _receive(asked, file, incoming)
                except wire.network_errors() as error:
                    if incoming.position > before:
                        patience.calm()
                    patience.bear(error)
            incoming.finish()
            difference = incoming.digest.difference()
            if difference:
                raise Damaged(f"{file.path} of {revision} came damaged: {difference}")
    except Damaged:
        path.with_name(path.name + TEMPORARY_SUFFIX).unlink(missing_ok=True)
        raise
    put_in_place(incoming.path, path)
    return Transfer(incoming.digest.sha256, resumed, incoming.received)


class Damaged(BloomdeskError):
    """Bytes that are not the file's; they have been deleted."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "run the same command again: it fetches this file alone")


class Incomplete:
    """The part of a file that has come so far, on disk and hashed, ready for the next byte."""

    def __init__(self, path: Path, file: HubFile, reports: Reports) -> None:
        self.path, self._file, self._reports = path, file, reports
        self.position = self.received = 0
        self.digest = Digest(file)

    def __enter__(self) -> Incomplete:
        # Unbuffered: what has been hashed has been handed to the system, and a kill loses none of it.
        self._disk = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK | BINARY, 0o644)
        try:
            self._take_up()
        except BaseException:
            os.close(self._disk)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._disk)

    def _take_up(self) -> None:
        if os.fstat(self._disk).st_size > self._file.size:
            os.ftruncate(self._disk, 0)
        while piece := os.read(self._disk, PIECE):
            self.digest.update(piece)
            self.position += len(piece)
            self._reports(self.position)

    def write(self, piece: bytes) -> None:
        """Add what came; raises `Damaged` where it is more than the file has."""
        if self.position + len(piece) > self._file.size:
            raise Damaged(f"more came for {self._file.path} than its {self._file.size:,} bytes")
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(self._disk, rest) :]
        self.digest.update(piece)
        self.position += len(piece)
        self._reports(self.position)

    def finish(self) -> None:
        """Bring all of it onto the disk for good."""
        os.fsync(self._disk)
        self._reports(self.position)


def _receive(asked: wire.Asked, file: HubFile, incoming: Incomplete) -> None:
    """Take what one answer of the Hub brings; raises one of `wire.network_errors` where that is not all."""
    location = wire.locate(asked)
    _refuse_other(asked, file, location)
    with wire.stream(location, incoming.position) as (start, pieces):
        known = incoming.position - start  # not 0 where the server ignored the range and sends it all again
        for piece in pieces:
            incoming.received += len(piece)
            if known < len(piece):
                incoming.write(piece[known:])
            known = max(0, known - len(piece))
    if incoming.position < file.size:
        raise wire.CutShort(f"{incoming.position:,} of {file.size:,} bytes came")


def _refuse_other(asked: wire.Asked, file: HubFile, location: wire.Location) -> None:
    """Before gigabytes come: the Hub must speak of the commit, the size and the hash that are expected."""
    kinds = {64: ("sha256", file.sha256), 40: ("git blob sha1", file.git_sha1)}
    found = location.content_id or ""
    kind, expected = kinds.get(len(found), ("", None))  # mirrors may have marks of their own
    claims = [
        ("commit", asked.revision, location.commit),
        ("size in bytes", file.size, location.size),
        (kind, expected, found),
    ]
    for what, wanted, said in claims:
        if wanted is not None and said is not None and wanted != said:
            raise BloomdeskError(
                f"{asked} is another file: its {what} should be {wanted}, {wire.endpoint()} says {said}",
                "check HF_ENDPOINT: this Hub holds something else under that name",
            )
