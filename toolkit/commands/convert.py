"""Re-splits a checkpoint on disk into a prepared directory: planned as a whole, written one part at a time.

    gather the part's tensors ──> PART.incomplete ──> fsync ──> source hashes right? ──> rename ──> manifest
         └── sha256 of the source shards, beside it ────────────────────┘

Every step survives a kill: the same conversion run again keeps the parts that the manifest records and makes the
others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.hyperparameters import Hyperparameters
from runner.format.manifest import Manifest, Source, SourceShard
from runner.system.atomic import TEMPORARY_SUFFIX
from runner.system.lock import sole_writer
from toolkit.hub.record import RECORD, load_record
from toolkit.io.disk import disk_errors
from toolkit.io.hasher import ShardHashes
from toolkit.io.progress import Progress, silent
from toolkit.parts import destination as target
from toolkit.parts.manifest_backup import write_backup
from toolkit.parts.part import (
    PlannedPart,
    check_form_dtype,
    check_lm_head,
    check_shape,
    plan_part,
    write_part,
)
from toolkit.parts.release import Release
from toolkit.source.config import read_config
from toolkit.source.key_map import Assignment, assign
from toolkit.source.shards import ShardList, SourceTensor, common_dtype, find_shards, read_listed


@dataclass(frozen=True)
class ConversionPlan:
    """All that a conversion will do, checked as far as it can be without reading the weights.

    `existing` is the manifest that the destination has now, if any, and `manifest` what of it is kept; `to_write` is
    in the order of a pass. `companions` are the small files' bytes. `sha256` is what is known of the shards
    beforehand. `to_delete` are the shards that go when no part needs them any more.
    """

    source: Path
    destination: Path
    existing: Manifest | None
    manifest: Manifest
    to_write: tuple[PlannedPart, ...]
    companions: Mapping[str, bytes]
    sha256: Mapping[Path, str]
    to_delete: tuple[Path, ...]

    @property
    def bytes_to_write(self) -> int:
        """Of the parts; in a lossless directory what they will hardly exceed."""
        return sum(part.size for part in self.to_write)

    @property
    def work(self) -> int:
        """Bytes that progress counts in all."""
        return sum(part.work for part in self.to_write)

    @property
    def peak_bytes(self) -> int:
        """The most disk that it needs at any time beyond what is taken now."""
        written = freed = peak = 0
        left = set(self.to_delete)
        for position, part in enumerate(self.to_write):
            written += part.size
            peak = max(peak, written - freed)
            needed = {shard for later in self.to_write[position + 1 :] for shard in later.sources}
            freed += sum(shard.stat().st_size for shard in left - needed)
            left &= needed
        return peak


@dataclass(frozen=True)
class ConvertSummary:
    """What a conversion did; `bytes_written` are those of the parts, `bytes_deleted` those of source shards."""

    destination: Path
    model: Hyperparameters
    written: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_written: int
    bytes_deleted: int
    seconds: float


def convert(
    source: Path, destination: Path, progress: Progress = silent, *, form: str = PLAIN
) -> ConvertSummary:
    """Make a prepared directory of the checkpoint in `source`, or go on with one that was begun in the same form.

    Raises `BloomdeskError` before anything is written where the source is not a whole, sound BLOOM or the
    destination can't take it, and later where a shard is not what the download recorded or the disk fails.
    What is finished then stays, and the same call goes on from it.
    """
    return carry_out(plan_conversion(source, destination, form=form), progress)


def plan_conversion(
    source: Path,
    destination: Path,
    *,
    delete_source: bool = False,
    known: Manifest | None = None,
    form: str = PLAIN,
) -> ConversionPlan:
    """Everything that `convert` checks before it writes; it writes nothing.

    With `delete_source` each shard goes as soon as the parts made from it are on disk and checked. `known` is what
    the destination's manifest was before damaged parts were taken out of it: the source must be the one it names.
    `form` is the form of the directory, plain or lossless.
    """
    if not source.is_dir():
        raise BloomdeskError(f"{source} is not a directory", "download a checkpoint: bloomdesk download")
    if os.path.realpath(source) == os.path.realpath(destination):
        raise BloomdeskError(f"{destination} is the source itself", "give another directory to write to")
    model = read_config(source / "config.json", "BF16")  # a wrong architecture is told before its tensors are
    companions = target.read_companions(source)
    existing = target.load_existing(destination)
    shards = _find_shards(source, destination, existing)
    tensors = read_listed(shards)
    if tensors or existing is None:
        model = replace(model, dtype=common_dtype(tensors))
    else:
        model = replace(model, dtype=existing.model.dtype)
    check_form_dtype(model.dtype, form)
    keys = shards.weight_map or tensors  # none only where a single file is gone, and everything is made
    assignment = assign(keys, model) if keys or existing is None else None
    origin, sha256 = _recorded_source(source, shards, companions)
    if known is not None and origin == Source():
        origin = known.source  # no download recorded it, and the shards' hashes will tell
    manifest = target.check_form(destination, existing or Manifest(model, origin, form=form), form)
    _refuse_other(destination, manifest, Manifest(model, origin), companions)
    manifest = target.drop_missing(destination, manifest)
    to_write = _plan_parts(manifest, shards, tensors, assignment) if assignment else ()
    _know_recorded_hashes(destination, known or manifest, shards, sha256)
    to_delete = _deletable(shards) if delete_source else ()
    plan = ConversionPlan(source, destination, existing, manifest, to_write, companions, sha256, to_delete)
    if to_write:
        leftovers = (destination / (part.spec.file + TEMPORARY_SUFFIX) for part in to_write)
        small = sum(map(len, companions.values()))
        target.require_free_space(destination, plan.peak_bytes + small, leftovers)
    return plan


def carry_out(plan: ConversionPlan, progress: Progress = silent) -> ConvertSummary:
    """Do what `plan_conversion` planned; `progress` hears of each part's bytes.

    Raises `BloomdeskError` where another process writes there, or a shard or the disk fails.
    """
    start = time.monotonic()
    with disk_errors(plan.destination):
        plan.destination.mkdir(parents=True, exist_ok=True)
    with sole_writer(plan.destination):
        if target.load_existing(plan.destination) != plan.existing:
            raise BloomdeskError(f"{plan.destination} has changed meanwhile", "run the same command again")
        manifest = target.initialise(plan.destination, plan.manifest, plan.companions)
        release = Release(plan.destination)
        manifest = _write_parts(plan, manifest, release, progress)
        write_backup(plan.destination, manifest)
    written = tuple(part.spec.file for part in plan.to_write)
    kept = tuple(file for file in manifest.parts if file not in written)
    size = sum(manifest.parts[file].size for file in written)
    seconds = time.monotonic() - start
    return ConvertSummary(plan.destination, manifest.model, written, kept, size, release.bytes, seconds)


def _write_parts(plan: ConversionPlan, manifest: Manifest, release: Release, progress: Progress) -> Manifest:
    left = list(plan.to_delete)
    with ShardHashes() as hashes:

        def checked(shard: Path) -> SourceShard:
            return _checked_shard(shard, hashes, plan.sha256)

        for position in range(len(plan.to_write) + 1):
            needed = {shard for part in plan.to_write[position:] for shard in part.sources}
            for shard in [shard for shard in left if shard not in needed]:
                release.delete(shard, manifest)
                left.remove(shard)
            for soon in plan.to_write[position : position + 2]:
                for shard in soon.sources:
                    hashes.begin(shard)
            for part in plan.to_write[position : position + 1]:
                record = write_part(part, plan.destination, checked, progress)
                if record.decoded:
                    release.trust(record)
                manifest = manifest.with_part(record)
                target.write_manifest(plan.destination, manifest)
    return manifest


def _find_shards(source: Path, destination: Path, existing: Manifest | None) -> ShardList:
    """The source's shards; those that parts were made from may be gone, all of them once everything is made."""
    if existing is None:
        return find_shards(source)
    made_from = {shard.file for record in existing.parts.values() for shard in record.sources}
    try:
        return find_shards(source, made_from)
    except BloomdeskError:
        if target.missing_parts(target.drop_missing(destination, existing)):
            raise
        return ShardList(())


def _plan_parts(
    manifest: Manifest, shards: ShardList, tensors: Mapping[str, SourceTensor], assignment: Assignment
) -> tuple[PlannedPart, ...]:
    model = manifest.model
    parts = []
    for spec in target.missing_parts(manifest):
        keys = assignment.parts[spec.file]
        gone = [key for key in keys.values() if key not in tensors]
        if gone:
            shard = (shards.weight_map or {})[gone[0]]
            raise BloomdeskError(
                f"{shard} is missing, and {spec.file} must be made from it",
                "run the download again: it fetches what is missing and nothing else",
            )
        parts.append(plan_part(spec, model.dtype, keys, tensors, manifest.form))
    lm_head, first = tensors.get(assignment.lm_head or ""), parts[0] if parts else None
    if lm_head is not None:
        check_shape(lm_head, (model.vocab_size, model.hidden_size))
        if first is not None and "word_embeddings.weight" in first.spec.tensors:
            check_lm_head(lm_head, first.tensors[0])
    return tuple(parts)


def _recorded_source(
    source: Path, shards: ShardList, companions: Mapping[str, bytes]
) -> tuple[Source, dict[Path, str]]:
    """Repo and commit, and each shard's sha256, where a download has recorded them."""
    record = load_record(source)
    if record is None:
        return Source(), {}
    again = "run the same bloomdesk download again: it fetches what is wrong and nothing else"
    hashes = {}
    for path in (*shards.files, *(source / name for name in companions)):
        known = record.files.get(path.name)
        if known is None:
            raise BloomdeskError(f"{path} is no file of the download that {source / RECORD} records", again)
        size = path.stat().st_size
        if size != known.size:
            raise BloomdeskError(f"{path} has {size:,} bytes, the download recorded {known.size:,}", again)
        if known.sha256 is not None and path in shards.files:
            hashes[path] = known.sha256
    return Source(record.repo, record.commit), hashes


def _refuse_other(
    destination: Path, manifest: Manifest, fresh: Manifest, companions: Mapping[str, bytes]
) -> None:
    """Refuse to go on with a directory that was begun from another source."""
    target.refuse_other_source(destination, manifest, fresh.source)
    if manifest.model != fresh.model:
        raise target.another_source(destination, "parts of a model with other hyperparameters")
    target.refuse_other_companions(destination, manifest, companions)


def _know_recorded_hashes(
    destination: Path, manifest: Manifest, shards: ShardList, sha256: dict[Path, str]
) -> None:
    """Add what the manifest knows of the shards' hashes: a local source has no record, and may have changed."""
    paths = {path.name: path for path in shards.files}
    for record in manifest.parts.values():
        for shard in record.sources:
            path = paths.get(shard.file)
            if path is not None and sha256.setdefault(path, shard.sha256) != shard.sha256:
                raise target.another_source(destination, f"another {shard.file}")


def _deletable(shards: ShardList) -> tuple[Path, ...]:
    links = [path for path in shards.files if path.is_symlink()]
    if links:
        raise BloomdeskError(
            f"{links[0]} is a link, as in a Hub cache: deleting it would free nothing",
            "convert without --delete-source, or download into a plain directory",
        )
    return shards.files


def _checked_shard(shard: Path, hashes: ShardHashes, known: Mapping[Path, str]) -> SourceShard:
    found = hashes.result(shard)
    if found != known.get(shard, found):
        raise BloomdeskError(
            f"{shard} is damaged or has changed: its sha256 is {found}, expected {known[shard]}",
            "fetch it again with bloomdesk download, then convert again: finished parts are kept",
        )
    return SourceShard(shard.name, found)
