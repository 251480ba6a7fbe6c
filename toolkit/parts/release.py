"""Deletion of source shards that are no longer needed, once every part made from them has been read back from disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError, in_shell
from runner.format.manifest import Manifest
from runner.format.safetensors import open_regular
from toolkit.hub.excerpts import SUFFIX
from toolkit.io.disk import disk_errors, read_errors
from toolkit.io.hasher import hash_file
from toolkit.io.writer import drop_cached


class Release:
    """Deletes shards and counts their bytes; each part is read back once before the first deletion that it allows."""

    def __init__(self) -> None:
        self._proven: set[Path] = set()
        self.bytes = 0
        self.spared: list[Path] = []

    def trust(self, part: Path) -> None:
        """Count a part as proven that was read back from the disk when it was written."""
        self._proven.add(part)

    def delete(self, shard: Path, sha256: str | None, manifests: Mapping[Path, Manifest]) -> None:
        """Delete `shard`, which no missing part needs; a user's shard stays if no part was made from its bytes.

        `shard` may also be an excerpt of one.

        `sha256` is that of the user's shard as it is now, or None for one that this program has fetched; `manifests`
        are those of the directories that are made from it. Raises `BloomdeskError`, and deletes nothing, if a part
        made from it does not read back as written.
        """
        made = [
            (directory / record.file, record, source.sha256)
            for directory, manifest in manifests.items()
            for record in manifest.parts.values()
            for source in record.sources
            if source.file == shard.name.removesuffix(SUFFIX)
        ]
        if sha256 is not None and {known for *_, known in made} != {sha256}:
            self.spared.append(shard)
            return
        for part, record, _ in made:
            if part not in self._proven:
                again = f"bloomdesk repair {in_shell(part.parent)} --source {in_shell(shard.parent)}"
                read_back(part, record.xxh3_128, f"its source is still there: {again}")
                self._proven.add(part)
        with disk_errors(shard, "deleted"):
            self.bytes += shard.stat().st_size
            shard.unlink()


def read_back(path: Path, expected: str, hint: str) -> None:
    """Read a file from the disk, not from the page cache.

    Raises `BloomdeskError` with `hint` if its xxh3-128 is not the `expected` one.
    """
    found = file_hash(path, cached=False)
    if found != expected:
        raise BloomdeskError(
            f"{path} does not read back as it was written: its xxh3-128 is {found}, expected {expected}",
            f"check the disk; {hint}",
        )


def file_hash(path: Path, *, cached: bool = True) -> str:
    """The xxh3-128 of a file, read from the disk unless `cached`; `BloomdeskError` if it can't be read."""
    whole = xxhash.xxh3_128()
    with read_errors(path), open_regular(path) as file:
        if not cached:
            drop_cached(file.fileno())
        hash_file(file.fileno(), whole)
    return whole.hexdigest()
