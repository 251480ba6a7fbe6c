"""Shards that arrive from the Hub in one thread while parts are made from them in another, at most two at a time.

    Hub ──> shard on its way ──> shard, sound ──> parts made from it ──> read back ──> shard deleted
            └─ calling thread ─┘                  └───────────── thread "parts" ──────────────┘

    DST/.source/
      bloomdesk-download.json     which shards have been checked
      SHARD                       arrived, sound, waiting for the parts that are made from it
      SHARD.incomplete            on its way

The network stays in the calling thread, so that Ctrl-C ends a read that waits. `.source` is on the same disk as the
prepared directory, and is deleted when that is complete.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.manifest import Manifest, SourceShard
from runner.system.atomic import TEMPORARY_SUFFIX
from toolkit.commands.build import plan_source_part
from toolkit.commands.download import fetch_recorded
from toolkit.commands.schedule import SHARDS_AT_A_TIME, Schedule
from toolkit.hub.record import DownloadRecord, load_record
from toolkit.hub.revision import Revision
from toolkit.hub.transfer import Transfer
from toolkit.io.disk import disk_errors
from toolkit.io.progress import Progress
from toolkit.parts.destination import STAGING
from toolkit.parts.part import PlannedPart
from toolkit.source.index import ShardList
from toolkit.source.key_map import Assignment, assign
from toolkit.source.shards import read_member
from toolkit.source.tensor import SourceTensor, common_dtype


def staged_bytes(destination: Path, names: Iterable[str]) -> int:
    """Bytes of these shards that earlier runs have left on the disk, whole or not."""
    paths = [destination / STAGING / (name + suffix) for name in names for suffix in ("", TEMPORARY_SUFFIX)]
    return sum(path.stat().st_size for path in paths if path.is_file())


class _Stopped(Exception):
    """The other thread has failed or was interrupted."""


class ArrivingShards:
    """The needed shards of a revision; `_changed` guards which are there and what the current part waits for."""

    def __init__(
        self,
        destination: Path,
        manifest: Manifest,
        schedule: Schedule,
        revision: Revision,
        index: ShardList,
        connections: int,
    ) -> None:
        """`index` says which shard has each key, or names the single file."""
        self.received = self.resumed = 0
        self._manifest, self._schedule, self._revision = manifest, schedule, revision
        self._index, self._connections = index, connections
        self._directory = destination / STAGING
        self._record = DownloadRecord.of(revision, None)
        self._changed = threading.Condition()
        self._sha256: dict[str, str] = {}  # of the shards that are there
        self._awaited: tuple[str, ...] = ()
        self._stopped = False
        self._tensors: dict[str, dict[str, SourceTensor]] = {}
        self._assignment: Assignment | None = None

    def run(self, make: Callable[[Progress], Manifest], progress: Progress) -> Manifest:
        """The manifest that `make` returns in its own thread; this one fetches shard after shard meanwhile."""
        # A damaged record is no error: the shards are then fetched again.
        with suppress(BloomdeskError):
            self._record = DownloadRecord.of(self._revision, load_record(self._directory))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="parts") as thread:
            making = thread.submit(make, _checking(self._raise_if_stopped, progress))
            making.add_done_callback(self._wake)
            try:
                for name in self._schedule.shards:
                    self._wait_for_turn(name, making)
                    transfer = self._fetch(name, _checking(lambda: _raise_failure(making), progress))
                    self.received += transfer.received
                    self.resumed += transfer.resumed
                    with self._changed:
                        self._sha256[name] = transfer.sha256
                        self._changed.notify_all()
                manifest = making.result()
            finally:
                self._stopped = True
                self._wake()
        if self._directory.is_dir():
            shutil.rmtree(self._directory)
        return manifest

    def part(self, file: str) -> PlannedPart:
        """The part `file`, as soon as its shards are there; they must be of the dtype that was planned."""
        shards, manifest = self._schedule.needs[file], self._manifest
        with self._changed:
            self._awaited = shards
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or self._sha256.keys() >= set(shards))
            self._awaited = ()
        self._raise_if_stopped()
        tensors: dict[str, SourceTensor] = {}
        for name in shards:
            if name not in self._tensors:
                self._tensors[name] = read_member(self._index, self._directory / name)
            tensors |= self._tensors[name]
        if self._assignment is None:
            # Without an index the one shard holds every tensor.
            self._assignment = assign(self._index.weight_map or tensors, manifest.model)
        dtype = common_dtype(self._assignment.used(tensors))
        if dtype != manifest.model.dtype:
            raise BloomdeskError(
                f"the source mixes dtypes: {shards[0]} is {dtype}, others are {manifest.model.dtype}"
            )
        return plan_source_part(file, manifest, self._assignment, tensors)

    def checked(self, shard: Path) -> SourceShard:
        """The shard with the sha256 that was taken as it arrived."""
        return SourceShard(shard.name, self._sha256[shard.name], self._record.files[shard.name].size)

    def release(self, needed: frozenset[str], delete: Callable[[Path, str | None], None]) -> None:
        """Delete what is not among `needed`, also shards that an earlier run has left."""
        for name in self._record.files.keys() - needed:
            if (self._directory / name).is_file():
                delete(self._directory / name, None)
            with self._changed:
                self._sha256.pop(name, None)
                self._tensors.pop(name, None)
                self._changed.notify_all()

    def _wait_for_turn(self, name: str, making: Future[Manifest]) -> None:
        """Wait until one more shard may come: the bound holds, or the current part needs this one."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._sha256) < SHARDS_AT_A_TIME or name in self._awaited or making.done()
            )
        _raise_failure(making)

    def _fetch(self, name: str, progress: Progress) -> Transfer:
        """Fetch one shard, or keep the one that an earlier run has fetched and checked."""
        known = self._record.files[name]
        if known.sound_in(self._directory):
            progress(name, known.size, known.size)
            return Transfer(known.sha256 or "", known.size, 0)
        with disk_errors(self._directory / name):
            self._directory.mkdir(parents=True, exist_ok=True)
            # It is not known to be sound.
            (self._directory / name).unlink(missing_ok=True)
            transfer, self._record = fetch_recorded(
                self._revision, known, self._directory, self._record, progress, self._connections
            )
        return transfer

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise _Stopped

    def _wake(self, *_: object) -> None:
        with self._changed:
            self._changed.notify_all()


def _raise_failure(making: Future[Manifest]) -> None:
    if making.done():
        making.result()


def _checking(check: Callable[[], None], progress: Progress) -> Progress:
    """`progress` after `check`, which raises to end a thread soon after the other one has failed."""

    def report(file: str, done: int, total: int) -> None:
        check()
        progress(file, done, total)

    return report
