"""Where `prepare` keeps source shards on their way, and the bound on how many there are.

    DST/.source/
      bloomdesk-download.json     which of them have been checked
      SHARD                       arrived, sound, waiting for the parts that are made from it
      SHARD.incomplete            on its way

It is on the same disk as the prepared directory, and gone when that is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError
from runner.system.atomic import TEMPORARY_SUFFIX
from toolkit.hub.record import DownloadRecord, load_record, save_record
from toolkit.hub.revision import Revision
from toolkit.hub.transfer import fetch
from toolkit.io.disk import disk_errors
from toolkit.io.progress import Progress

SHARDS_AT_A_TIME = 2  # one that parts are made from, and one on its way


class Staging:
    """The directory of shards on their way for one revision."""

    def __init__(self, directory: Path, revision: Revision) -> None:
        """Takes up what an earlier run has left; it writes nothing."""
        self.directory, self._revision = directory, revision
        self._record = DownloadRecord.of(revision, _readable_record(directory))

    def arrived(self, name: str) -> bool:
        """Whether the shard is there, as it was when its hash was checked."""
        return self._record.files[name].sound_in(self.directory)

    def present_bytes(self, names: Iterable[str]) -> int:
        """Bytes of these shards that are on the disk already, whole or not."""
        paths = [self.directory / name for name in names]
        paths += [path.with_name(path.name + TEMPORARY_SUFFIX) for path in paths]
        return sum(path.stat().st_size for path in paths if path.is_file())

    def fetch(self, name: str, progress: Progress, connections: int) -> tuple[str, int, int]:
        """Have the shard there: its sha256, the bytes that came, and those that an earlier run had left."""
        file = self._record.files[name]
        if self.arrived(name):
            progress(name, file.size, file.size)
            return file.sha256 or "", 0, file.size
        wanted = self._revision.find(name)
        if wanted is None:
            raise BloomdeskError(f"{self._revision} has no {name}")
        with disk_errors(self.directory / name):
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / name).unlink(missing_ok=True)  # not known to be sound
            transfer = fetch(self._revision, wanted, self.directory, progress, connections)
            modified = (self.directory / name).stat().st_mtime_ns
            self._record = self._record.with_file(name, transfer.sha256, modified)
            save_record(self.directory, self._record)
        return transfer.sha256, transfer.received, transfer.resumed

    def discard(self, names: Iterable[str]) -> None:
        """Delete what is there of shards that nothing needs any more."""
        for name in names:
            path = self.directory / name
            path.unlink(missing_ok=True)
            path.with_name(name + TEMPORARY_SUFFIX).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all of it."""
        if self.directory.is_dir():
            shutil.rmtree(self.directory)


def _readable_record(directory: Path) -> DownloadRecord | None:
    try:
        return load_record(directory)
    except BloomdeskError:
        return (
            None  # the shards are then fetched again: it is ours alone, and nothing else knows what they are
        )


@dataclass(frozen=True)
class Schedule:
    """In which order shards come and parts are made, and what that takes of the disk.

    `needs` gives for each part that is to be made the shards that it is made from, in the order of a pass.
    """

    needs: Mapping[str, tuple[str, ...]]

    @property
    def shards(self) -> tuple[str, ...]:
        """Every shard that is needed, in the order in which they come."""
        return tuple(dict.fromkeys(name for shards in self.needs.values() for name in shards))

    def needed_after(self, part: str) -> frozenset[str]:
        """Shards that parts after `part` need."""
        parts = list(self.needs)
        return frozenset(name for later in parts[parts.index(part) + 1 :] for name in self.needs[later])

    def peak(self, part_size: Callable[[str], int], shard_size: Callable[[str], int]) -> tuple[int, int]:
        """(bytes of disk at the fullest moment, the most shards at any moment).

        While a part is made its shards are there and, where that is one alone, the next is on its way.
        """
        written = fullest = most = 0
        order, arrived = self.shards, set[str]()
        for part, shards in self.needs.items():
            arrived |= set(shards)
            held = set(arrived)
            if len(held) < SHARDS_AT_A_TIME:
                last = max(map(order.index, held))
                held |= set(order[last + 1 : last + 2])
            written += part_size(part)
            fullest = max(fullest, written + sum(map(shard_size, held)))
            most = max(most, len(held))
            arrived &= self.needed_after(part)
        return fullest, most
