"""Deletion of source shards that are no longer needed, once every part made from them has been read back from disk."""

from __future__ import annotations

from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.manifest import Manifest, PartRecord
from toolkit.io.disk import disk_errors
from toolkit.io.hasher import hash_file
from toolkit.io.writer import drop_cached


class Release:
    """Deletes shards and counts their bytes; each part is read back once before the first deletion that it allows."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self._proven: set[str] = set()
        self.bytes = 0

    def trust(self, record: PartRecord) -> None:
        """Count a part as proven that was read back from the disk when it was written."""
        self._proven.add(record.file)

    def delete(self, shard: Path, manifest: Manifest) -> None:
        """Delete `shard`, which no missing part needs.

        Raises `BloomdeskError`, and deletes nothing, if a part made from it does not read back as written.
        """
        for record in manifest.parts.values():
            made_from_it = shard.name in {source.file for source in record.sources}
            if made_from_it and record.file not in self._proven:
                read_back(self._destination / record.file, record)
                self._proven.add(record.file)
        with disk_errors(shard):
            self.bytes += shard.stat().st_size
            shard.unlink()


def read_back(path: Path, record: PartRecord) -> None:
    """Read a part from the disk, not from the page cache; `BloomdeskError` if it differs from its record."""
    whole = xxhash.xxh3_128()
    try:
        with path.open("rb", buffering=0) as file:
            drop_cached(file.fileno())
            hash_file(file.fileno(), whole)
        found = whole.hexdigest()
    except OSError as error:
        found = f"unreadable ({error})"
    if found != record.xxh3_128:
        raise BloomdeskError(
            f"{path} does not read back as it was written: its xxh3-128 is {found}, expected {record.xxh3_128}",
            f"check the disk; its source is still there: delete {path.name} and run the same command again",
        )
