"""Whole shards between the network and the parts that are made from them.

    DST/.source/
      bloomdesk-download.json     which shards have been checked
      SHARD                       arrived, sound, waiting for the parts that are made from it
      SHARD.incomplete            on its way

`.source` is on the same disk as the prepared directory. Only these files are ever removed from it; it goes when the
directory is complete and it is empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.part_record import SourceShard
from runner.format.slices import Slice
from runner.system.atomic import TEMPORARY_SUFFIX
from toolkit.commands.download import bytes_begun, fetch_recorded
from toolkit.hub.excerpts import RECORD_SUFFIX as ROWS_RECORD_SUFFIX
from toolkit.hub.excerpts import SUFFIX as ROWS_SUFFIX
from toolkit.hub.excerpts import load_record as load_excerpt_record
from toolkit.hub.line import Line
from toolkit.hub.place import check, look, set_aside, whose
from toolkit.hub.record import RECORD, DownloadRecord, RecordedFile, load_record, save_record
from toolkit.hub.revision import Revision
from toolkit.hub.transfer import Transfer
from toolkit.io.disk import disk_errors
from toolkit.io.hasher import ShardHashes
from toolkit.io.progress import Progress, silent
from toolkit.parts.destination import STAGING
from toolkit.source.index import FORMS, ShardList
from toolkit.source.shards import read_member
from toolkit.source.tensor import SourceTensor

MOVE_STAGING = "move what is there out of the directory, and run the same command again"
SUFFIXES = tuple(suffix for *_, suffix in FORMS)


def staged_bytes(destination: Path, names: Iterable[str]) -> int:
    """Bytes of these shards that earlier runs have left on the disk, whole or not."""
    suffixes = "", TEMPORARY_SUFFIX, ROWS_SUFFIX
    paths = [destination / STAGING / (name + suffix) for name in names for suffix in suffixes]
    return sum(path.stat().st_size for path in paths if path.is_file())


def load_staging(destination: Path, revision: Revision, needed: Iterable[str]) -> DownloadRecord:
    """What is known of the shards that earlier runs have left.

    Raises `BloomdeskError` if the staging directory is something else, or has other files in the places of `needed`
    shards.
    """
    directory, record = destination / STAGING, None
    if not is_staging(directory):
        raise BloomdeskError(f"{directory} is in the way: it is no directory", MOVE_STAGING)
    # A damaged record is no error: what is there is known by its content.
    with suppress(BloomdeskError):
        record = load_record(directory)
    known = DownloadRecord.of(revision, record)
    foreign = [name for name in needed if look(directory, known.files[name]) == "foreign"]
    for name in needed:
        bytes_begun(directory, known.files[name], recorded=os.path.lexists(directory / RECORD))
    if foreign:
        raise in_the_way(directory, revision, foreign)
    return known


def is_staging(directory: Path) -> bool:
    """False if something else has the staging directory's name; a link may lead to somebody's files."""
    return not os.path.lexists(directory) or (directory.is_dir() and not directory.is_symlink())


def in_the_way(directory: Path, revision: Revision, names: Sequence[str]) -> BloomdeskError:
    """The error for files in the places of shards that this program did not fetch."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return BloomdeskError(
        f"{directory} has other files in the place of shards of {revision}, not from this program: "
        f"{', '.join(names[:3])}{more}",
        MOVE_STAGING,
    )


class StagedShards:
    """The shards of a revision that are among `needed`, in the staging directory of `destination`."""

    own: Slice | None = None

    def __init__(
        self,
        destination: Path,
        revision: Revision,
        needed: Sequence[str],
        index: ShardList,
        connections: int,
        line: Line,
    ) -> None:
        self._destination, self._directory = destination, destination / STAGING
        self._revision, self._needed, self._index = revision, needed, index
        self._connections, self._line = connections, line
        self._record = DownloadRecord.of(revision, None)
        # Without a record, whatever is there was not brought by this program: shards that are right are used, and stay.
        self._begun = os.path.lexists(self._directory / RECORD)
        self._adopted: dict[str, RecordedFile] = {}
        self._fetched: set[str] = set()
        self._hashes = ShardHashes()
        # Names of shards that stay in the directory: not from this program, or it can't delete them.
        self._spared: set[str] = set()
        self._undeletable: set[str] = set()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._record.files)

    def hashing(self) -> ShardHashes:
        return self._hashes

    def load(self) -> None:
        if self._needed or is_staging(self._directory):
            self._record = load_staging(self._destination, self._revision, self._needed)

    def hashes(self, name: str) -> Mapping[str, str]:
        """None: whole tensors are hashed when parts are made from them."""
        return {}

    def note(self) -> None:
        """Write to the directory whose files it has."""
        with disk_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            save_record(self._directory, self._record)

    def begin(self, name: str) -> None:
        self._hashes.begin(self._directory / name)

    def tensors(self, name: str) -> dict[str, SourceTensor]:
        return read_member(self._index, self._directory / name)

    def fetch(self, name: str, progress: Progress) -> Transfer:
        """Fetch one shard, or keep the one that an earlier run has fetched and checked."""
        known, path = self._record.files[name], self._directory / name
        finding = look(self._directory, known, everything=True)
        if finding == "unchecked":
            # It may have decayed since it came, and an earlier run may have ended before it could be recorded.
            found = check(self._directory, known, progress)
            if found is not None and not self._begun:
                self._spared.add(name)
                self._adopted[name] = self._record.with_file(name, *found).files[name]
                return Transfer(found[0], known.size, 0)
            if found is not None:
                self._record = self._record.with_file(name, *found)
                if self._record.files[name] != known:
                    save_record(self._directory, self._record)
                return Transfer(found[0], known.size, 0)
            finding = whose(self._directory, known)
        if finding == "foreign":
            raise in_the_way(self._directory, self._revision, [name])
        with disk_errors(path):
            self._directory.mkdir(parents=True, exist_ok=True)
            if finding == "changed":
                set_aside(path)
            # It is this program's, and of no use.
            path.unlink(missing_ok=True)
            save_record(self._directory, self._record)
            self._fetched.add(name)
            transfer, self._record = fetch_recorded(
                self._revision,
                known,
                self._directory,
                self._record,
                progress,
                self._connections,
                self._line,
            )
        return transfer

    def checked(self, shard: Path) -> SourceShard:
        """The shard with the sha256 that was taken while parts were made from it.

        Raises `BloomdeskError`, after deleting a shard that was fetched, if that is not the one with which it arrived.
        """
        found, adopted = self._hashes.result(shard), self._adopted.get(shard.name)
        known = adopted or self._record.files[shard.name]
        if found != known.sha256:
            if adopted is None:
                with disk_errors(shard):
                    shard.unlink()
            raise BloomdeskError(
                f"{shard} has changed on the disk since it arrived: its sha256 is {found}, expected {known.sha256}",
                "check the disk, and run the same command again: it fetches this shard anew",
            )
        if not known.sound_in(self._directory):
            raise BloomdeskError(
                f"{shard} was written to while parts were made from it",
                "leave the directory alone, and run the same command again",
            )
        return SourceShard(shard.name, found, known.size)

    def release(self, name: str, delete: Callable[[Path, str | None], None], *, last: bool) -> None:
        if self._is_ours(name):
            self.delete(name, delete, last=last)

    def _is_ours(self, name: str) -> bool:
        """True if a shard is there that this program has fetched."""
        path, known = self._directory / name, self._record.files[name]
        if name in self._spared or not name.endswith(SUFFIXES):
            return False
        is_from_here = self._begun or name in self._fetched
        try:
            if path.is_symlink() or not path.is_file():
                return False
            if known.sound_in(self._directory):
                return True
            # The run that fetched it may have been ended before it could be recorded.
            if is_from_here and path.stat().st_size == known.size and check(self._directory, known, silent):
                return True
        except (OSError, BloomdeskError):
            # What cannot be looked at or read stays; the next run may be told of it.
            if is_from_here:
                self._undeletable.add(name)
        self._spared.add(name)
        return False

    def delete(self, name: str, delete: Callable[[Path, str | None], None], *, last: bool) -> None:
        """Delete a file of the directory; after the last part it is no failure if that is impossible."""
        shard = self._directory / name
        try:
            delete(shard, None)
        except BloomdeskError as error:
            cause = error.__cause__
            of_shard = isinstance(cause, OSError) and cause.filename in (shard, str(shard))
            if not last or not of_shard:
                raise
            self._undeletable.add(name)

    def remove(self) -> tuple[str, ...]:
        """Remove what else is ours, then the directory if it is empty; that it can't be is no failure."""
        if not os.path.lexists(self._directory):
            return ()
        if not is_staging(self._directory):
            return (f"{self._directory} stays: this program did not make it",)
        ours = [name + TEMPORARY_SUFFIX for name in self._record.files if name.endswith(SUFFIXES)]
        for name in self._record.files:
            if load_excerpt_record(self._directory, name) is not None:
                ours += [name + ROWS_SUFFIX, name + ROWS_RECORD_SUFFIX]
            ours.append(name + ROWS_RECORD_SUFFIX + TEMPORARY_SUFFIX)
        if not self._undeletable:
            ours += [RECORD, RECORD + TEMPORARY_SUFFIX]
        try:
            for path in (self._directory / name for name in ours):
                if path.is_symlink() or path.is_file():
                    path.unlink()
            left = sorted(path.name for path in self._directory.iterdir())
            if not left:
                self._directory.rmdir()
                return ()
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            why = f"it holds {', '.join(left[:3])}{more}"
        except OSError as error:
            why = f"it cannot be removed: {error.strerror or error}"
        return (f"{self._directory} stays: {why}; nothing in it is needed any more",)
