"""Files that clients have sent, and those that batches have left for them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.server.jobs.data import CONTENT, RECORD, new_id, records, write_record
from runner.system.atomic import atomic_file, sync_directory

# What a file is for: the requests of a batch, or what came of them.
INPUT, OUTPUT = "batch", "batch_output"
BLOCK = 2**20


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file; `created_at` is in seconds."""

    id: str
    filename: str
    purpose: str
    nbytes: int
    sha256: str
    created_at: float

    @property
    def document(self) -> dict[str, Any]:
        """As OpenAI has it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.nbytes,
            "created_at": int(self.created_at),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "expires_at": None,
        }


class Files:
    """The files in a directory. Any thread may call; what fails on the disk raises `OSError` and changes nothing."""

    def __init__(self, directory: Path, now: Callable[[], float]) -> None:
        """Raises `BloomdeskError` if a record is damaged."""
        self._directory, self._now = directory, now
        self._lock = threading.Lock()
        self._files = {file_id: StoredFile(**body) for file_id, body in records(directory)}
        for path in directory.glob(f"*{CONTENT}"):
            if path.stem not in self._files:
                path.unlink()

    def all(self) -> list[StoredFile]:
        """The oldest first."""
        # Replaced as a whole, so nobody waits for the lock.
        return sorted(self._files.values(), key=lambda file: (file.created_at, file.id))

    def get(self, file_id: str) -> StoredFile | None:
        return self._files.get(file_id)

    def path(self, file: StoredFile) -> Path:
        return self._directory / f"{file.id}{CONTENT}"

    def add(
        self,
        filename: str,
        purpose: str,
        blocks: Iterable[bytes],
        *,
        file_id: str | None = None,
        created_at: float | None = None,
    ) -> StoredFile:
        """A new file with the bytes of `blocks`, on the disk when this returns; it replaces one of the same id."""
        file_id = file_id or new_id("file-")
        sha256, nbytes = hashlib.sha256(), 0
        with atomic_file(self._directory / f"{file_id}{CONTENT}") as file:
            for block in blocks:
                file.write(block)
                sha256.update(block)
                nbytes += len(block)
        created_at = self._now() if created_at is None else created_at
        stored = StoredFile(file_id, filename, purpose, nbytes, sha256.hexdigest(), created_at)
        write_record(self._directory / f"{file_id}{RECORD}", asdict(stored))
        with self._lock:
            self._files = {**self._files, file_id: stored}
        return stored

    def delete(self, file: StoredFile) -> None:
        (self._directory / f"{file.id}{RECORD}").unlink(missing_ok=True)
        with self._lock:
            self._files = {name: other for name, other in self._files.items() if name != file.id}
        self.path(file).unlink(missing_ok=True)
        sync_directory(self._directory)

    def is_whole(self, file: StoredFile) -> bool:
        """Whether as many bytes are there as were stored."""
        path = self.path(file)
        return path.is_file() and path.stat().st_size == file.nbytes

    def is_sound(self, file: StoredFile) -> bool:
        """Whether the bytes are those that were stored."""
        if not self.is_whole(file):
            return False
        sha256 = hashlib.sha256()
        with self.path(file).open("rb") as data:
            while block := data.read(BLOCK):
                sha256.update(block)
        return sha256.hexdigest() == file.sha256
