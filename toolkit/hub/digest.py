"""The hashes by which the Hub knows a file, taken of bytes that go by or of a file on the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

from toolkit.hub.revision import HubFile
from toolkit.io.progress import FileProgress, Progress

PIECE = 2**20


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


def hash_file(path: Path, file: HubFile, progress: Progress) -> Digest:
    """The digest of a file on the disk, taken as `file`."""
    digest, reports, done = Digest(file), FileProgress(progress, file.path, file.size), 0
    with path.open("rb", buffering=0) as source:
        while piece := source.read(PIECE):
            digest.update(piece)
            done += len(piece)
            reports(done)
    return digest
