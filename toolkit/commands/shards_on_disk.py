"""The shards of a checkpoint on disk, from which `convert` makes parts; those of the Hub are in arrivals.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.part_record import SourceShard
from toolkit.commands.build import Manifests
from toolkit.hub.hub_cache import blob_name
from toolkit.io.disk import read_errors
from toolkit.io.hasher import ShardHashes
from toolkit.io.progress import Progress
from toolkit.parts.part import PlannedPart
from toolkit.source.index import ShardList
from toolkit.source.lfs import fetch_command
from toolkit.source.torch_zip import names_beside_state

KEEP_SOURCE = "convert without --delete-source"
# Size, time of the last change, that of the last change of anything, and number in the file system.
State = tuple[int, int, int, int]


@dataclass
class ShardsOnDisk:
    """The shards of a checkpoint on disk, hashed in a thread while parts are made from them.

    `parts` are the planned parts by file name, in the order of a pass, `sha256` the hashes known beforehand,
    `deletable` the shards to delete once no part needs them, and `seen` each shard's state when its tensors were
    listed. `place` is where a shard's bytes lie.
    """

    parts: Mapping[str, PlannedPart]
    sha256: Mapping[Path, str]
    deletable: tuple[Path, ...]
    seen: Mapping[Path, State]
    place: Callable[[Path], Path]
    hashes: ShardHashes = field(default_factory=ShardHashes)
    done: set[Path] = field(default_factory=set)
    received: int = 0
    resumed: int = 0
    cached: int = 0
    notes: tuple[str, ...] = ()

    def run(self, make: Callable[[Progress], Manifests], progress: Progress) -> Manifests:
        """What `make` returns."""
        with self.hashes:
            return make(progress)

    def part(self, file: str) -> PlannedPart:
        """The part as it was planned; its shards and those of the next one are hashed from now on."""
        files = list(self.parts)
        position = files.index(file)
        for soon in files[position : position + 2]:
            for shard in self.parts[soon].sources:
                self.hashes.begin(self.place(shard))
        return self.parts[file]

    def checked(self, shard: Path) -> SourceShard:
        """The shard with its hash; `BloomdeskError` if that is not the one known beforehand, or it has changed."""
        found = self.hashes.result(self.place(shard))
        if state_of(self.place(shard)) != self.seen[shard]:
            raise BloomdeskError(
                f"{shard} changed while it was read",
                "wait until nothing writes to the source, and run the same command again",
            )
        expected = self.sha256.get(shard, found)
        if found != expected:
            again = "fetch it again with bloomdesk download --check"
            if blob_name(shard) is not None:
                again = f"delete {os.path.realpath(shard)}, and fetch it again: hf download"
            if self.place(shard) != shard:
                again = f"delete {self.place(shard)}, and fetch it again: {fetch_command([shard])}"
            raise BloomdeskError(
                f"{shard} is damaged or has changed: its sha256 is {found}, expected {expected}",
                f"{again}; then convert again: finished parts are kept",
            )
        return SourceShard(shard.name, found, self.seen[shard][0])

    def release(self, needed: frozenset[str], delete: Callable[[Path, str | None], None]) -> None:
        """Delete the deletable shards that are not among `needed`."""
        for shard in self.deletable:
            if shard.name not in needed and shard not in self.done and shard.exists():
                self.done.add(shard)
                delete(shard, self.checked(shard).sha256)


def state_of(shard: Path) -> State:
    """What changes when a shard is written to or another file takes its place; `BloomdeskError` if it can't be read."""
    with read_errors(shard):
        found = shard.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def deletable(shards: ShardList) -> tuple[Path, ...]:
    """All the shards; `BloomdeskError` if one of them can't be deleted, or more than weights would be lost with it."""
    if shards.objects:
        raise BloomdeskError(
            f"{next(iter(shards.objects))} is a pointer of Git LFS, whose object other branches may need",
            "convert without --delete-source, and delete the clone afterwards",
        )
    for path in shards.files:
        others = names_beside_state(path) if path.suffix == ".bin" else ()
        if others:
            raise BloomdeskError(
                f"{path} also holds {', '.join(others[:3])} beside the weights, which would be lost",
                KEEP_SOURCE,
            )
    links = [path for path in shards.files if path.is_symlink()]
    if links:
        raise BloomdeskError(
            f"{links[0]} is a link, as in a Hub cache: deleting it would free nothing",
            "convert without --delete-source, or download into a plain directory",
        )
    folder = shards.files[0].parent if shards.files else Path()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BloomdeskError(f"{folder}: its shards can't be deleted", KEEP_SOURCE)
    return shards.files
