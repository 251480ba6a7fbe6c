"""Downloads and converts shard by shard, so that a disk need not hold the checkpoint twice.

    Hub ──> shard on its way ──> shard, sound ──> parts made from it ──> read back ──> shard deleted
            └── this thread ──┘                   └────────── another thread ──────────┘

While parts are made from one shard the next comes over the network. Killed at any moment, the same command goes
on: the manifest says which parts there are, the staging directory what has come.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import COMPANIONS, EMBEDDING, PartSpec, part_specs
from runner.format.manifest import Manifest, Source, SourceShard
from runner.system.atomic import TEMPORARY_SUFFIX
from runner.system.lock import sole_writer
from toolkit.commands.staging import SHARDS_AT_A_TIME, Schedule, Staging
from toolkit.hub import revision as hub
from toolkit.hub.digest import hash_file
from toolkit.hub.revision import HubFile, Revision
from toolkit.hub.transfer import CONNECTIONS, fetch
from toolkit.io.disk import disk_errors
from toolkit.io.progress import Progress, silent
from toolkit.parts import destination as target
from toolkit.parts.manifest_backup import write_backup
from toolkit.parts.part import (
    check_form_dtype,
    check_lm_head,
    check_shape,
    part_size,
    part_work,
    plan_part,
    write_part,
)
from toolkit.parts.release import Release
from toolkit.source.config import read_config
from toolkit.source.key_map import Assignment, assign
from toolkit.source.shards import ShardList, SourceTensor, common_dtype, find_shards, read_member


@dataclass(frozen=True)
class PreparationPlan:
    """What `carry_out` will do, and what it takes. All figures are bytes.

    `existing` is the manifest that the destination has now, if any, and `manifest` what of it is kept. Its dtype is
    a guess from the sizes until the first shard is there. `index` says where each key is; it names no files
    where the weights are a single one. `shards_at_a_time` is how many will be on the disk at once.
    """

    revision: Revision
    destination: Path
    existing: Manifest | None
    manifest: Manifest
    companions: Mapping[str, bytes]
    index: ShardList
    schedule: Schedule
    present: int
    peak_bytes: int
    shards_at_a_time: int

    @property
    def bytes_to_fetch(self) -> int:
        """Of the shards, those that are there already included."""
        return sum(self.shard_size(name) for name in self.schedule.shards)

    @property
    def bytes_to_write(self) -> int:
        """Of the parts; in a lossless directory what they will hardly exceed."""
        model, form = self.manifest.model, self.manifest.form
        return sum(part_size(spec, model.dtype, form) for spec in self._specs)

    @property
    def work(self) -> int:
        """Bytes that progress counts in all, of shards and of parts."""
        model, form = self.manifest.model, self.manifest.form
        return self.bytes_to_fetch + sum(part_work(spec, model.dtype, form) for spec in self._specs)

    @property
    def _specs(self) -> list[PartSpec]:
        return [spec for spec in part_specs(self.manifest.model) if spec.file in self.schedule.needs]

    def shard_size(self, name: str) -> int:
        file = self.revision.find(name)
        return file.size if file is not None else 0


@dataclass(frozen=True)
class PrepareSummary:
    """What was done; `received` are bytes over the network, `resumed` those of shards that were there already."""

    revision: Revision
    destination: Path
    written: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_written: int
    received: int
    resumed: int
    seconds: float


def prepare(
    repo: str,
    destination: Path,
    revision: str | None = None,
    progress: Progress = silent,
    connections: int = CONNECTIONS,
    *,
    form: str = PLAIN,
) -> PrepareSummary:
    """`plan_preparation` and `carry_out` in one."""
    return carry_out(plan_preparation(repo, destination, revision, form), progress, connections)


def plan_preparation(
    repo: str, destination: Path, revision: str | None = None, form: str = PLAIN
) -> PreparationPlan:
    """What is to be fetched and made, from the Hub's small files; nothing is written to `destination`.

    Where that was begun and no revision is named, its commit is gone on with. Raises `BloomdeskError` where the
    Hub refuses, the repo holds no BLOOM or none that has the form `form`, the directory is another preparation's
    or has the other form, or the disk is too small. Which two bytes the weights are the first shard will tell.
    """
    existing = target.load_existing(destination)
    if existing is not None:
        target.check_form(destination, existing, form)  # the wrong one is told before the Hub is asked
    if existing is not None and revision is None and existing.source.repo == repo:
        revision = existing.source.commit
    found = hub.resolve(repo, revision)
    with tempfile.TemporaryDirectory(prefix="bloomdesk-") as scratch:
        small = Path(scratch)
        chosen = hub.needed(found, lambda index: _read_small(found, index, small, destination))
        for file in chosen.files:
            if file.path in COMPANIONS or file.path.endswith(".index.json"):
                _read_small(chosen, file, small, destination)
        model = read_config(small / "config.json", "BF16")
        companions = target.read_companions(small)
        names = [file.path for file in chosen.files if not (small / file.path).exists()]
        has_index = any(small.glob("*.index.json"))
        index = find_shards(small, spared=names) if has_index else ShardList(tuple(map(Path, names)))
    if _has_four_bytes(model, chosen):
        check_form_dtype("F32", form)
    fresh = Manifest(_guess_dtype(model, chosen), Source(chosen.repo, chosen.commit))
    manifest = target.check_form(destination, existing or fresh, form)
    target.refuse_other_source(destination, manifest, Source(chosen.repo, chosen.commit))
    target.refuse_other_companions(destination, manifest, companions)
    manifest = target.drop_missing(destination, manifest)
    return _with_room(chosen, destination, existing, manifest, companions, index)


def _with_room(
    revision: Revision,
    destination: Path,
    existing: Manifest | None,
    manifest: Manifest,
    companions: Mapping[str, bytes],
    index: ShardList,
) -> PreparationPlan:
    """The plan, after a look at the disk."""
    schedule = Schedule(_needs(manifest, index))
    plan = PreparationPlan(revision, destination, existing, manifest, companions, index, schedule, 0, 0, 0)
    specs = part_specs(manifest.model)
    sizes = {spec.file: part_size(spec, manifest.model.dtype, manifest.form) for spec in specs}
    peak, most = schedule.peak(sizes.__getitem__, plan.shard_size)
    staging = Staging(destination / target.STAGING, revision)
    present = staging.present_bytes(schedule.shards)
    if schedule.needs:
        leftovers = (destination / (file + TEMPORARY_SUFFIX) for file in schedule.needs)
        small = sum(map(len, companions.values()))
        target.require_free_space(destination, peak - present + small, leftovers)
    return replace(plan, present=present, peak_bytes=peak, shards_at_a_time=most)


def _read_small(revision: Revision, file: HubFile, small: Path, destination: Path) -> bytes:
    """A small file's checked bytes, from the destination where it is there and sound; it is then in `small` too."""
    path, there = small / file.path, destination / file.path
    if not path.exists():
        sized = there.is_file() and there.stat().st_size == file.size
        if sized and not hash_file(there, file, silent).difference():
            path.write_bytes(there.read_bytes())
        else:
            fetch(revision, file, small, silent)
    return path.read_bytes()


def _guess_dtype(model: Hyperparameters, revision: Revision) -> Hyperparameters:
    """Two bytes or four for each parameter, by the size of everything; which two the first shard will tell."""
    return replace(model, dtype="BF16" if revision.total < 3 * _elements(model) else "F32")


def _has_four_bytes(model: Hyperparameters, revision: Revision) -> bool:
    """Whether the weights can't be of two bytes each, also where the embedding is there twice."""
    weights = sum(
        file.size
        for file in revision.files
        if file.path not in COMPANIONS and not file.path.endswith(".index.json")
    )
    return weights >= 4 * _elements(model)


def _elements(model: Hyperparameters) -> int:
    return sum(math.prod(shape) for spec in part_specs(model) for shape in spec.tensors.values())


def _needs(manifest: Manifest, index: ShardList) -> dict[str, tuple[str, ...]]:
    """The shards that each missing part is made from."""
    missing = [spec.file for spec in target.missing_parts(manifest)]
    if index.weight_map is None:
        return {file: tuple(path.name for path in index.files) for file in missing}
    where = index.weight_map
    assignment = assign(where, manifest.model)
    needs = {file: [where[key] for key in assignment.parts[file].values()] for file in missing}
    if assignment.lm_head is not None and EMBEDDING in needs:
        needs[EMBEDDING].append(where[assignment.lm_head])  # it has to be equal
    return {file: tuple(dict.fromkeys(shards)) for file, shards in needs.items()}


def carry_out(
    plan: PreparationPlan, progress: Progress = silent, connections: int = CONNECTIONS
) -> PrepareSummary:
    """Fetch and make what is missing; `progress` hears of shards and parts, from two threads.

    Raises `BloomdeskError` where another process writes there, where the Hub or the disk fails, or where
    something is not what it should be. What is finished then stays, and the same call goes on from it.
    """
    start = time.monotonic()
    received = resumed = 0
    with disk_errors(plan.destination):
        plan.destination.mkdir(parents=True, exist_ok=True)
    with sole_writer(plan.destination):
        if target.load_existing(plan.destination) != plan.existing:
            raise BloomdeskError(f"{plan.destination} has changed meanwhile", "run the same command again")
        staging = Staging(plan.destination / target.STAGING, plan.revision)
        manifest = target.initialise(plan.destination, plan.manifest, plan.companions)
        release = Release(plan.destination)
        _release_finished(plan, staging, release, manifest)
        with _Maker(plan, manifest, staging, release, progress) as maker:
            for name in plan.schedule.shards:
                maker.wait_for_room(name)
                sha256, came, before = staging.fetch(name, maker.reporting(progress), connections)
                maker.take(name, sha256)
                received, resumed = received + came, resumed + before
            manifest = maker.finish()
        write_backup(plan.destination, manifest)
        staging.remove()
    written = tuple(plan.schedule.needs)
    kept = tuple(file for file in manifest.parts if file not in written)
    size = sum(manifest.parts[file].size for file in written)
    seconds = time.monotonic() - start
    return PrepareSummary(plan.revision, plan.destination, written, kept, size, received, resumed, seconds)


def _release_finished(plan: PreparationPlan, staging: Staging, release: Release, manifest: Manifest) -> None:
    """Shards whose parts an earlier run had made when it ended, before it could delete them."""
    needed = set(plan.schedule.shards)
    names = {file.path for file in plan.revision.files} - needed
    for name in names:
        if (staging.directory / name).exists():
            release.delete(staging.directory / name, manifest)
    staging.discard(names)


class _Stopped(Exception):
    """The other thread has failed or was interrupted."""


class _Maker:
    """Makes parts from shards as they come, in a thread of its own.

    The two threads share what is under `_changed`: the shards that are there, the part at hand, and whether
    it is over.
    """

    def __init__(
        self,
        plan: PreparationPlan,
        manifest: Manifest,
        staging: Staging,
        release: Release,
        progress: Progress,
    ) -> None:
        self._plan, self._manifest = plan, manifest
        self._staging, self._release, self._progress = staging, release, progress
        self._changed = threading.Condition()
        self._there: dict[str, str] = {}  # shard -> sha256
        self._awaited: tuple[str, ...] = ()  # what the part at hand waits for
        self._stopped = False
        self._tensors: dict[str, dict[str, SourceTensor]] = {}  # by shard
        self._assignment: Assignment | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parts")
        self._making: Future[None] | None = None

    def __enter__(self) -> _Maker:
        self._making = self._thread.submit(self._run)
        self._making.add_done_callback(self._wake)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.shutdown()

    def wait_for_room(self, name: str) -> None:
        """Until another shard may come: the bound holds, or the part at hand needs this one."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._there) < SHARDS_AT_A_TIME or name in self._awaited or self._over()
            )
        self._raise_failure()

    def take(self, name: str, sha256: str) -> None:
        """Tell that a shard has come and is sound."""
        with self._changed:
            self._there[name] = sha256
            self._changed.notify_all()
        self._raise_failure()

    def reporting(self, progress: Progress) -> Progress:
        """`progress` for the thread that fetches, which also ends that soon after a part has failed."""

        def report(file: str, done: int, total: int) -> None:
            self._raise_failure()
            progress(file, done, total)

        return report

    def finish(self) -> Manifest:
        """Wait for the last part: the manifest as it then is."""
        if self._making is not None:
            self._making.result()
        return self._manifest

    def _over(self) -> bool:
        return self._making is not None and self._making.done()

    def _raise_failure(self) -> None:
        if self._making is not None and self._making.done():
            self._making.result()

    def _wake(self, _: Future[None]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        for file, shards in self._plan.schedule.needs.items():
            self._wait_for(shards)
            self._make(file, shards)
            later = self._plan.schedule.needed_after(file)
            for name in [name for name in self._there if name not in later]:
                self._release.delete(self._staging.directory / name, self._manifest)
                with self._changed:
                    del self._there[name]
                    self._tensors.pop(name, None)
                    self._changed.notify_all()

    def _wait_for(self, shards: tuple[str, ...]) -> None:
        with self._changed:
            self._awaited = shards
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or all(name in self._there for name in shards))
            self._awaited = ()
            if self._stopped:
                raise _Stopped

    def _make(self, file: str, shards: tuple[str, ...]) -> None:
        tensors: dict[str, SourceTensor] = {}
        for name in shards:
            tensors |= self._read(name)
        assignment = self._assign(tensors)
        model = self._settle_dtype(tensors)
        spec = next(spec for spec in part_specs(model) if spec.file == file)
        part = plan_part(spec, model.dtype, assignment.parts[file], tensors, self._manifest.form)
        if file == EMBEDDING and assignment.lm_head is not None:
            lm_head = tensors[assignment.lm_head]
            check_shape(lm_head, (model.vocab_size, model.hidden_size))
            check_lm_head(lm_head, part.tensors[0])
        record = write_part(part, self._plan.destination, self._recorded, self._report)
        if record.decoded:
            self._release.trust(record)
        self._manifest = self._manifest.with_part(record)
        target.write_manifest(self._plan.destination, self._manifest)

    def _read(self, name: str) -> dict[str, SourceTensor]:
        """The tensors of a shard that is there, which are those that the index promises."""
        if name not in self._tensors:
            self._tensors[name] = read_member(self._plan.index, self._staging.directory / name)
        return self._tensors[name]

    def _assign(self, tensors: Mapping[str, SourceTensor]) -> Assignment:
        if self._assignment is None:
            keys = self._plan.index.weight_map or tensors  # a single file has every tensor
            self._assignment = assign(keys, self._manifest.model)
        return self._assignment

    def _settle_dtype(self, tensors: Mapping[str, SourceTensor]) -> Hyperparameters:
        """The model with the dtype that the tensors have, which all parts share."""
        dtype, model = common_dtype(tensors), self._manifest.model
        if dtype != model.dtype:
            if self._manifest.parts:
                raise BloomdeskError(f"the source mixes dtypes: parts are {model.dtype}, a shard is {dtype}")
            check_form_dtype(dtype, self._manifest.form)
            self._manifest = replace(self._manifest, model=replace(model, dtype=dtype))
        return self._manifest.model

    def _recorded(self, shard: Path) -> SourceShard:
        return SourceShard(shard.name, self._there[shard.name])

    def _report(self, file: str, done: int, total: int) -> None:
        if self._stopped:
            raise _Stopped
        self._progress(file, done, total)
