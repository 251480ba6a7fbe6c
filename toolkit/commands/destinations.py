"""The directories that one command makes: what each has already, what all of them lack, and the space that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from runner.format.manifest import Manifest
from runner.system.disk import existing_directory
from toolkit.commands.build import Destination
from toolkit.commands.placement import Placement
from toolkit.commands.schedule import Schedule
from toolkit.io.disk import require_large_files
from toolkit.parts import destination as target
from toolkit.parts.manifest_backup import known_parts


def destination_of(
    placement: Placement,
    directory: Path,
    existing: Manifest | None,
    fresh: Manifest,
    companions: Mapping[str, bytes],
    mend: frozenset[str] | None = None,
) -> Destination:
    """One of the directories of `placement`, resumed from its manifest `existing`; raises what `target.resume` does."""
    fresh = placement.manifest(directory, fresh)
    if mend is not None and existing is not None:
        fresh = replace(fresh, places=existing.places)
    manifest = target.resume(directory, existing, fresh, companions, mend)
    known = known_parts(directory, existing) if existing is not None else {}
    return Destination(directory, existing, manifest, known)


def common(destinations: Sequence[Destination]) -> Manifest:
    """The manifest of the only directory; of several one of whole parts, with those that none of them lacks."""
    first, *others = (each.manifest for each in destinations)
    if not others:
        return first
    parts = {
        file: record for file, record in first.parts.items() if all(file in each.parts for each in others)
    }
    return replace(first, parts=parts, slice=None, places=())


def kept_by_any(destinations: Sequence[Destination]) -> Manifest:
    """The parts that any directory has, with the records of one of them.

    Raises `BloomdeskError` if two were made from different weights.
    """
    first, *others = destinations
    manifest = first.manifest
    for each in others:
        for file, record in each.manifest.parts.items():
            known = manifest.parts.get(file)
            if known is None:
                manifest = manifest.with_part(record)
            elif known.source_tensors != record.source_tensors:
                raise target.another_source(
                    each.directory, f"{file} of other weights than {first.directory} has"
                )
    return manifest


def require_space(
    destinations: Sequence[Destination],
    schedule: Schedule,
    companions: Mapping[str, bytes],
    deletable: frozenset[str] = frozenset(),
    source: Path | None = None,
) -> int:
    """The most bytes taken beyond those taken now; `BloomdeskError` if a disk has too few, or takes no such files.

    Shards that are `deletable` free space on the disk of the `source`.
    """
    peak = 0
    for each in destinations:
        own = schedule.of(each.manifest)
        frees = len(destinations) == 1 or (source is not None and _same_disk(each.directory, source))
        growth = own.growth(deletable if frees else frozenset())
        require_large_files(each.directory, own.needed_sizes)
        target.require_free_space(each.directory, growth, own.needs, companions)
        peak += growth
    return peak


def _same_disk(one: Path, other: Path) -> bool:
    return existing_directory(one).stat().st_dev == existing_directory(other).stat().st_dev
