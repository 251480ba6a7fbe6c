"""The engine of convert, prepare and repair: makes the missing parts of a prepared directory, one at a time.

    locks ──> nothing changed since the plan? ──> does the source hold what the kept parts were made from?
    for each part:  plan it from its shards ──> gather ──> PART.incomplete ──> fsync ──> source hashes right?
                    ──> rename ──> record in the manifest ──> delete shards that no later part needs

`Shards` is one of two: files of a checkpoint on disk (convert.py), or shards that arrive from the Hub while parts are
made (arrivals.py). Every step survives a kill: the same command run again keeps the recorded parts and makes the rest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from runner.errors import BloomdeskError
from runner.format.layout import EMBEDDING, part_specs
from runner.format.manifest import Manifest
from runner.format.part_record import PartRecord, SourceShard
from runner.format.slices import Slice
from toolkit.commands.schedule import Schedule
from toolkit.hub.place import set_aside
from toolkit.io.disk import disk_errors, read_if_exists, sole_writer_of
from toolkit.io.progress import Progress, silent
from toolkit.parts import destination as target
from toolkit.parts.comparison import Comparison, compare
from toolkit.parts.manifest_backup import recover_manifest
from toolkit.parts.part import PlannedPart, check_shape, part_work, plan_part
from toolkit.parts.part_output import Output
from toolkit.parts.part_writer import check_lm_head, proven_part, write_part
from toolkit.parts.release import Release
from toolkit.parts.zeros import zero_notes
from toolkit.source.key_map import Assignment
from toolkit.source.tensor import SourceTensor

# Of the directories that are made, in their order.
Manifests = tuple[Manifest, ...]


class Shards(Protocol):
    """The source's shards while parts are made from them; `received`, `resumed` and `cached` are bytes from the Hub.

    `notes` are sentences for the summary.
    """

    received: int
    resumed: int
    cached: int
    notes: tuple[str, ...]

    def run(self, make: Callable[[Progress], Manifests], progress: Progress) -> Manifests:
        """What `make` returns, called once with a progress, while shards are hashed or fetched beside it."""

    def part(self, file: str) -> PlannedPart:
        """The part `file`, as soon as the shards that it is made from are there."""

    def checked(self, shard: Path) -> SourceShard:
        """The shard's name and sha256; `BloomdeskError` if that is not the expected one."""

    def release(self, needed: frozenset[str], delete: Callable[[Path, str | None], None]) -> None:
        """Call `delete` for every shard that may be deleted and is not among `needed`.

        It gets the sha256 of the user's shard as that is now, and None with a shard that this program has fetched.
        """


@dataclass(frozen=True)
class Destination:
    """A directory to make.

    `existing` is the manifest that it has now, if any, and `manifest` what is kept of it. `known` are the records of
    all parts that it has or had: made again, they must have the same tensors.
    """

    directory: Path
    existing: Manifest | None
    manifest: Manifest
    known: Mapping[str, PartRecord]


@dataclass(frozen=True)
class BuildPlan:
    """What `carry_out` will do, checked as far as possible before anything is written.

    `destinations` are one directory, or those of several slices. `comparisons` are of the kept parts with the source.
    `companions` are the small files' bytes. `shards` serve one run.
    `peak_bytes` is the most disk taken at any time: by `prepare` in all, by `convert` beyond what is taken now.
    `bytes_to_fetch` are those of all needed shards of the Hub. `notes` are sentences for the summary. Only a repair
    replaces files that hold something else than is recorded; it has read them whole. The parts `to_prove` are there: of
    the only directory, made from rows of shards whose sha256 is compared now.
    """

    destinations: tuple[Destination, ...]
    companions: Mapping[str, bytes]
    schedule: Schedule
    shards: Shards
    peak_bytes: int
    bytes_to_fetch: int = 0
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()
    is_repair: bool = False
    to_prove: frozenset[str] = frozenset()

    @property
    def destination(self) -> Path:
        """The only directory, or that of the first slice."""
        return self.destinations[0].directory

    @property
    def slice(self) -> Slice | None:
        """That of the only directory, if it gets one."""
        return self.manifest.slice if len(self.destinations) == 1 else None

    @property
    def manifest(self) -> Manifest:
        """What is kept of the first directory."""
        return self.destinations[0].manifest

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the parts; in a lossless directory an estimate from above."""
        return sum(map(self.schedule.part_sizes.__getitem__, self.schedule.needs))

    @property
    def work(self) -> int:
        """Bytes that progress counts in all, of compared tensors, of fetched shards and of parts."""
        model, form = self.manifest.model, self.manifest.form
        specs = (spec for spec in part_specs(model) if spec.file in self.schedule.needs)
        compared = sum(comparison.nbytes for comparison in self.comparisons)
        return compared + self.bytes_to_fetch + sum(part_work(spec, model.dtype, form) for spec in specs)


@dataclass(frozen=True)
class Summary:
    """What a command did: the files that it wrote, and kept from earlier runs, in the order of a pass.

    `bytes_deleted` are those of source shards; of the Hub's, `received` came now and `resumed` in earlier runs, and
    `cached` were copied from its cache.
    `notes` are sentences about what else the user should know.
    """

    written: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_written: int
    seconds: float
    bytes_deleted: int = 0
    received: int = 0
    resumed: int = 0
    notes: tuple[str, ...] = ()
    cached: int = 0


def plan_source_part(
    file: str,
    manifest: Manifest,
    assignment: Assignment,
    tensors: Mapping[str, SourceTensor],
    own: Slice | None = None,
) -> PlannedPart:
    """The part `file` made from source `tensors`, or, if these are rows of a slice `own` alone, what that has of it.

    Raises `BloomdeskError` if they do not fit, or the head is another matrix.
    """
    model = manifest.model
    spec = next(spec for spec in part_specs(model, own) if spec.file == file)
    part = plan_part(spec, model.dtype, assignment.parts[file], tensors, manifest.form)
    part = replace(part, is_sliced=own is not None)
    lm_head = tensors.get(assignment.lm_head or "")
    if file == EMBEDDING and lm_head is not None:
        check_shape(lm_head, part.tensors[0].shape)
        # What an adapter adds to the embedding is added to the head, which is the same matrix.
        check_lm_head(lm_head, replace(part.tensors[0], addition=None))
        part = replace(part, lm_head=lm_head)
    return part


def carry_out(plan: BuildPlan, progress: Progress = silent) -> Summary:
    """Hold the destinations' locks and `build`; raises what that raises, or if another process writes there."""
    with ExitStack() as locks:
        for each in plan.destinations:
            locks.enter_context(sole_writer_of(each.directory))
        return build(plan, progress)


def build(plan: BuildPlan, progress: Progress = silent) -> Summary:
    """Make what is missing, under the lock that the caller holds.

    `progress` is called for compared tensors, parts and fetched shards, from up to two threads. Raises
    `BloomdeskError` if the Hub, a shard or the disk fails, or if something is not what it should be. What is finished
    then stays, and the same call resumes from it.
    """
    start = time.monotonic()
    for each in plan.destinations:
        if target.load_existing(each.directory) != each.existing:
            raise BloomdeskError(f"{each.directory} has changed meanwhile", "run the same command again")
    compare(plan.destination, plan.comparisons, progress)
    manifests = tuple(_begun(plan, each) for each in plan.destinations)
    making = _Making(plan, manifests)
    whole = plan.shards.run(making.run, progress)
    return _summary(plan, making, whole, time.monotonic() - start)


def _begun(plan: BuildPlan, destination: Destination) -> Manifest:
    """The manifest of a directory whose small files are in place."""
    # What is to be made again stays recorded: its hashes are known nowhere else.
    manifest = destination.manifest
    for record in destination.known.values():
        manifest = manifest.with_part(record)
    if manifest != destination.existing or plan.schedule.needs or not _has_companions(plan, destination):
        return target.initialise(destination.directory, manifest, plan.companions)
    recover_manifest(destination.directory)
    return manifest


def _has_companions(plan: BuildPlan, destination: Destination) -> bool:
    """True if the directory's small files are as they should be."""
    return all(
        read_if_exists(destination.directory / name, target.LARGEST_COMPANION) == data
        for name, data in plan.companions.items()
    )


def _summary(plan: BuildPlan, making: _Making, whole: Manifests, seconds: float) -> Summary:
    written = tuple(file for file in plan.schedule.needs if file not in plan.to_prove)
    shards, release = plan.shards, making.release
    return Summary(
        written,
        tuple(file for file in whole[0].parts if file not in written),
        making.bytes,
        seconds,
        release.bytes,
        shards.received,
        shards.resumed,
        (
            *plan.notes,
            *shards.notes,
            *(zero_notes(whole[0].parts.values()) if written else ()),
            *(f"{path} holds what was there, and is no part of this checkpoint" for path in making.aside),
            *(f"{shard} stays: not all of its parts were made from these bytes" for shard in release.spared),
        ),
        shards.cached,
    )


class _Making:
    """Makes the parts; `manifests` record each as soon as it is in place, and `aside` are the files that made way."""

    def __init__(self, plan: BuildPlan, manifests: Manifests) -> None:
        self._plan = plan
        self._manifests = {
            each.directory: manifest for each, manifest in zip(plan.destinations, manifests, strict=True)
        }
        self.release = Release()
        self.aside: list[Path] = []
        self.bytes = 0

    def run(self, progress: Progress) -> Manifests:
        """The manifests with every part."""
        # An earlier run may have made the parts of a shard and ended before it deleted the shard.
        shards, schedule = self._plan.shards, self._plan.schedule
        places = {directory: _place(directory) for directory in self._manifests}
        shards.release(frozenset(schedule.shards), self._delete)
        for file in schedule.needs:
            destinations = [each for each in self._plan.destinations if file not in each.manifest.parts]
            for each in destinations:
                _refuse_lost_link(each.directory / file)
            part = shards.part(file)
            if file in self._plan.to_prove:
                (only,) = self._plan.destinations
                self._note(only.directory, proven_part(part, only.known[file], shards.checked), places)
                shards.release(schedule.needed_after(file), self._delete)
                continue
            outputs = self._outputs(part, destinations)
            for output, record in zip(
                outputs, write_part(part, outputs, shards.checked, progress), strict=True
            ):
                self._record(output, record, places)
            shards.release(schedule.needed_after(file), self._delete)
        return tuple(self._manifests.values())

    def _outputs(self, part: PlannedPart, destinations: Sequence[Destination]) -> list[Output]:
        found = []
        for each in destinations:
            output = Output.of(each.directory, part, each.manifest)
            known = each.known.get(part.spec.file)
            found.append(replace(output, known=known, make_way=self._make_way, is_first=not found))
        return found

    def _record(self, output: Output, record: PartRecord, places: Mapping[Path, tuple[int, int]]) -> None:
        """Write to the manifest of a directory that a part is in its place."""
        if record.decoded:
            self.release.trust(output.path)
        self.bytes += record.size
        self._note(output.directory, record, places)

    def _note(self, directory: Path, record: PartRecord, places: Mapping[Path, tuple[int, int]]) -> None:
        self._manifests[directory] = self._manifests[directory].with_part(record)
        if _place(directory) != places[directory]:
            raise BloomdeskError(
                f"{directory} was moved, and another directory has its name",
                "put it back under this name, and run the same command again",
            )
        target.write_manifest(directory, self._manifests[directory])

    def _delete(self, shard: Path, sha256: str | None) -> None:
        self.release.delete(shard, sha256, self._manifests)

    def _make_way(self, path: Path) -> None:
        # It has another size or header than the recorded part: cut off, or somebody's work.
        if not self._plan.is_repair:
            self.aside.append(set_aside(path))


def _place(directory: Path) -> tuple[int, int]:
    """What tells a directory from another one that gets its name."""
    with disk_errors(directory):
        found = directory.stat()
    return found.st_dev, found.st_ino


def _refuse_lost_link(path: Path) -> None:
    """Raise `BloomdeskError` for a link that leads nowhere: what it leads to may be on a disk that is not mounted."""
    if not path.is_symlink():
        return
    # Of a link that leads back to itself the system says something else.
    with suppress(OSError):
        try:
            path.stat()
        except FileNotFoundError:
            raise BloomdeskError(
                f"{path} is a link to {os.path.realpath(path)}, which is not there",
                "mount what it leads to, or delete the link; then run the same command again",
            ) from None
