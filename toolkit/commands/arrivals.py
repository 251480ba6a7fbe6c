"""Shards that arrive from the Hub in one thread while parts are made from them in another, at most two at a time.

    Hub ──> shard on its way ──> shard, sound ──> parts made from it, hashed again ──> read back ──> shard deleted
            └─ calling thread ─┘                  └────── threads "parts" and "sha256" ──────┘

The network stays in the calling thread, so that Ctrl-C ends a read that waits. What arrives, and where it waits, is
said by staged_shards.py or, if only the rows of a slice are fetched, staged_rows.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from runner.format.layout import part_specs
from runner.format.manifest import Manifest
from runner.format.part_record import SourceShard, TensorRecord
from runner.format.quantised import QUANTISED_FORMS
from runner.format.slices import Slice
from toolkit.commands.build import Manifests, plan_source_part
from toolkit.commands.schedule import SHARDS_AT_A_TIME, Schedule
from toolkit.hub.transfer import Transfer
from toolkit.io.progress import Progress
from toolkit.parts.part import PlannedPart
from toolkit.source.dtype import in_dtype, rounding_notes
from toolkit.source.index import ShardList
from toolkit.source.key_map import Assignment, assign
from toolkit.source.tensor import SourceTensor


class Staging(Protocol):
    """The place of shards while parts are made from them, by name; the names that it knows are `names`.

    If it has the rows of a slice alone, that is its `own`.
    """

    own: Slice | None

    @property
    def names(self) -> Collection[str]: ...

    def hashing(self) -> AbstractContextManager[object]:
        """What hashes shards in the background while it is open."""

    def load(self) -> None:
        """Look at what earlier runs have left; `BloomdeskError` if something else is there."""

    def fetch(self, name: str, progress: Progress) -> Transfer:
        """Fetch a shard, or keep what an earlier run has fetched."""

    def begin(self, name: str) -> None:
        """Start to hash a shard that is there."""

    def tensors(self, name: str) -> dict[str, SourceTensor]:
        """The tensors of a shard that is there."""

    def hashes(self, name: str) -> Mapping[str, str]:
        """The xxh3-128 of whole tensors of which only rows are there, by key, if they are known."""

    def checked(self, shard: Path) -> SourceShard:
        """What the manifest says of a shard; `BloomdeskError` if it is not as it came."""

    def release(self, name: str, delete: Callable[[Path, str | None], None], *, last: bool) -> None:
        """Delete a shard if it is there and this program's."""

    def remove(self) -> tuple[str, ...]:
        """Remove the place, if nothing else is in it; sentences for the user."""


def _wholes(part: PlannedPart, manifest: Manifest, known: Mapping[str, str]) -> tuple[TensorRecord, ...]:
    """The records of a slice's whole matrices, if all of them are stored as in the source, and `known` by key."""
    whole = next(spec for spec in part_specs(manifest.model) if spec.file == part.spec.file)
    found = [
        TensorRecord(name, tensor.dtype, whole.tensors[name], known[tensor.key])
        for name, tensor in part.named
        if name in whole.matrices and tensor.key in known and tensor.stored == tensor.dtype
    ]
    is_known = len(found) == len(whole.matrices) and manifest.form not in QUANTISED_FORMS
    return tuple(found) if is_known else ()


class _Stopped(Exception):
    """The other thread has failed or was interrupted."""


class ArrivingShards:
    """The needed shards of a revision; `_changed` guards which are there and what the current part waits for."""

    def __init__(
        self, staging: Staging, manifest: Manifest, schedule: Schedule, index: ShardList, why: str = ""
    ) -> None:
        """`index` says which shard has each key, or names the single file; `why` tensors are rounded, if any are."""
        self.received = self.resumed = self.cached = 0
        self.notes: tuple[str, ...] = ()
        self._staging, self._manifest, self._schedule, self._index = staging, manifest, schedule, index
        self._changed = threading.Condition()
        self._there: set[str] = set()
        self._awaited: tuple[str, ...] = ()
        self._stopped = False
        self._tensors: dict[str, dict[str, SourceTensor]] = {}
        self._assignment: Assignment | None = None
        self._why = why
        self._rounded: dict[str, SourceTensor] = {}

    def run(self, make: Callable[[Progress], Manifests], progress: Progress) -> Manifests:
        """The manifests that `make` returns in its own thread; this one fetches shard after shard meanwhile."""
        self._staging.load()
        # The hashes end first, so that no part waits for one.
        with (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="parts") as thread,
            self._staging.hashing(),
        ):
            making = thread.submit(make, _checking(self._raise_if_stopped, progress))
            making.add_done_callback(self._wake)
            try:
                for name in self._schedule.shards:
                    self._wait_for_turn(name, making)
                    transfer = self._staging.fetch(name, _checking(lambda: _raise_failure(making), progress))
                    self.received += transfer.received
                    self.resumed += transfer.resumed
                    self.cached += transfer.cached
                    with self._changed:
                        self._there.add(name)
                        self._changed.notify_all()
                manifests = making.result()
            finally:
                self._stopped = True
                self._wake()
        self.notes = (*rounding_notes(self._rounded.values(), self._why), *self._staging.remove())
        return manifests

    def part(self, file: str) -> PlannedPart:
        """The part `file`, as soon as its shards are there."""
        shards, manifest = self._schedule.needs[file], self._manifest
        with self._changed:
            self._awaited = shards
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or self._there >= set(shards))
            self._awaited = ()
        self._raise_if_stopped()
        for name in shards:
            self._staging.begin(name)
        tensors: dict[str, SourceTensor] = {}
        for name in shards:
            if name not in self._tensors:
                self._tensors[name] = self._staging.tensors(name)
            tensors |= self._tensors[name]
        if self._assignment is None:
            # Without an index the one shard holds every tensor.
            self._assignment = assign(self._index.weight_map or tensors, manifest.model)
        tensors = in_dtype(tensors, self._assignment.keys, manifest.model.dtype)
        self._rounded |= {tensor.key: tensor for tensor in tensors.values() if tensor.stored != tensor.dtype}
        part = plan_source_part(file, manifest, self._assignment, tensors, self._staging.own)
        if self._staging.own is None:
            return part
        known = {key: each for name in shards for key, each in self._staging.hashes(name).items()}
        return replace(part, wholes=_wholes(part, manifest, known))

    def checked(self, shard: Path) -> SourceShard:
        """What the manifest says of a shard that parts were made from; `BloomdeskError` if it is not as it came."""
        return self._staging.checked(shard)

    def release(self, needed: frozenset[str], delete: Callable[[Path, str | None], None]) -> None:
        """Delete what is not among `needed`, also shards that an earlier run has left, but nothing else."""
        for name in self._staging.names - needed:
            self._staging.release(name, delete, last=not needed)
            with self._changed:
                self._there.discard(name)
                self._tensors.pop(name, None)
                self._changed.notify_all()

    def _wait_for_turn(self, name: str, making: Future[Manifests]) -> None:
        """Wait until one more shard may come: the bound holds, or the current part needs this one."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._there) < SHARDS_AT_A_TIME or name in self._awaited or making.done()
            )
        _raise_failure(making)

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise _Stopped

    def _wake(self, *_: object) -> None:
        with self._changed:
            self._changed.notify_all()


def _raise_failure(making: Future[Manifests]) -> None:
    if making.done():
        making.result()


def _checking(check: Callable[[], None], progress: Progress) -> Progress:
    """`progress` after `check`, which raises to end a thread soon after the other one has failed."""

    def report(file: str, done: int, total: int) -> None:
        check()
        progress(file, done, total)

    return report
