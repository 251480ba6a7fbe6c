"""Makes another form of a prepared directory: the parts are read once, one by one, and nothing else is needed.

What the source's manifest records vouches for every tensor, and goes into the new one: repo and commit, the shards
that each part was made from, and so the fingerprint of the weights before they were rounded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError, in_shell, reading
from runner.format.layout import MANIFEST, MANIFEST_BACKUP, part_specs
from runner.format.manifest import Manifest, load_manifest
from runner.format.part_record import SourceShard
from runner.format.quantised import QUANTISED_FORMS
from runner.format.safetensors import read_small
from runner.format.slice_set import refuse_while_spreading
from toolkit.commands.build import BuildPlan, Destination, Manifests
from toolkit.commands.destinations import common, destination_of, require_space
from toolkit.commands.placement import Placement, resumed
from toolkit.commands.schedule import Schedule, part_sizes
from toolkit.io.progress import Progress
from toolkit.parts import destination as target
from toolkit.parts.check import quick_check
from toolkit.parts.part import PlannedPart, check_form_dtype
from toolkit.parts.prepared_tensors import damaged_part, prepared_tensors, tensors_as_stored


@dataclass
class PreparedParts:
    """The parts of a prepared directory as what others are made from; nothing of them is hashed or deleted."""

    directory: Path
    manifest: Manifest
    form: str
    received: int = 0
    resumed: int = 0
    cached: int = 0
    notes: tuple[str, ...] = ()

    def run(self, make: Callable[[Progress], Manifests], progress: Progress) -> Manifests:
        """What `make` returns."""
        return make(progress)

    def part(self, file: str) -> PlannedPart:
        """The part `file` in the new form; `BloomdeskError` if that of the source is damaged, as far as shows."""
        record = self.manifest.parts[file]
        found = quick_check(self.directory / file, record)
        for item in found.unchecked:
            raise BloomdeskError(f"{self.directory / file}: {item.what}")
        for item in found.damage:
            raise damaged_part(self.directory / file, item.what)
        spec = next(spec for spec in part_specs(self.manifest.model) if spec.file == file)
        if record.codings:
            tensors = tensors_as_stored(self.directory, record)
            return PlannedPart(spec, tensors, self.form, made_from=record.sources, cut=record)
        tensors = prepared_tensors(self.directory, record)
        return PlannedPart(
            spec,
            tuple(tensors[name] for name in spec.tensors),
            self.form,
            hashes={tensor.name: tensor.xxh3_128 for tensor in record.weights},
            made_from=record.sources,
        )

    def checked(self, shard: Path) -> SourceShard:
        """Nothing: the records of the parts say what shards they were made from."""
        raise AssertionError(f"{shard} is no shard")

    def release(self, needed: frozenset[str], delete: Callable[[Path, str | None], None]) -> None:
        """Delete nothing."""


def is_prepared(source: Path) -> bool:
    """Whether a directory is prepared, and so another form can be made of it."""
    return any(os.path.lexists(source / name) for name in (MANIFEST, MANIFEST_BACKUP))


def plan_from_prepared(
    source: Path, placement: Placement, form: str, dtype: str | None, mend: frozenset[str] | None
) -> BuildPlan:
    """What `plan_conversion` plans if the source is a prepared directory; it writes nothing."""
    made = load_manifest(source)
    _refuse_unfit(source, made, dtype)
    check_form_dtype(made.model.dtype, form)
    return plan_from_parts(PreparedParts(source, made, form), placement, mend)


def plan_from_parts(
    parts: PreparedParts, placement: Placement, mend: frozenset[str] | None = None, *, frees: bool = False
) -> BuildPlan:
    """The plan that makes the directories of `placement` from these parts; if it `frees` space, each goes."""
    source, made = parts.directory, parts.manifest
    companions = _companions(source, made)
    existing = {directory: target.load_existing(directory) for directory in placement.directories}
    if mend is not None:
        (held,) = existing.values()
        placement = resumed(placement.directories[0], held)
        companions = target.recorded_alone(held, companions) if held is not None else companions
    fresh = Manifest(made.model, made.source, form=parts.form)
    destinations = tuple(
        destination_of(placement, directory, held, fresh, companions, mend)
        for directory, held in existing.items()
    )
    for destination in destinations:
        _require_same_weights(destination, source, made)
    missing = [
        spec for spec in target.missing_parts(common(destinations)) if mend is None or spec.file in mend
    ]
    needs = {spec.file: (spec.file,) for spec in missing}
    sizes = {file: record.size for file, record in made.parts.items()}
    schedule = Schedule(needs, part_sizes(common(destinations)), sizes)
    deletable = frozenset(needs) if frees else frozenset[str]()
    peak = require_space(destinations, schedule, companions, deletable, source)
    return BuildPlan(destinations, companions, schedule, parts, peak)


def _require_same_weights(destination: Destination, source: Path, made: Manifest) -> None:
    """Raise `BloomdeskError` unless the parts that a directory has were made from the weights of `source`."""
    held, directory = destination.manifest, destination.directory
    for file, record in held.parts.items():
        tensors, whole = record.source_tensors, {each.name: each for each in made.parts[file].source_tensors}
        rows = [each for each in tensors if each.shape != whole[each.name].shape]
        if any(each != whole[each.name] for each in tensors if each not in rows):
            raise target.another_source(directory, f"{file} of other weights than {source} has")
        if rows:
            raise BloomdeskError(
                f"{directory} has rows that came from the Hub without the rest of their matrices, so they can't be "
                f"compared with what {source} records",
                f"{replace(held, places=()).command(directory)} resumes it; or give a new directory",
            )


def _refuse_unfit(source: Path, made: Manifest, dtype: str | None) -> None:
    """Raise `BloomdeskError` if nothing can be made of this directory."""
    refuse_while_spreading(source)
    if made.slice is not None:
        raise BloomdeskError(
            f"{source} is {made.slice.described} alone, and other forms are made of whole checkpoints",
            f"write that back first: bloomdesk export {in_shell(source)} HUB_DIR",
        )
    if made.missing:
        raise BloomdeskError(
            f"{source} is not complete: {len(made.missing)} files are still to be made",
            f"{made.command(source)} resumes where it stopped; then convert it",
        )
    if made.form in QUANTISED_FORMS:
        raise BloomdeskError(
            f"the weights of {source} were rounded to {made.form}, and other forms of them would be no better",
            "give the checkpoint, or its plain or lossless form",
        )
    if dtype not in (None, made.model.dtype):
        raise BloomdeskError(
            f"{source} is in {made.model.dtype}, and a prepared directory is not rounded to another dtype",
            "leave out --dtype, or give the checkpoint",
        )


def _companions(source: Path, made: Manifest) -> Mapping[str, bytes]:
    """The small files; `BloomdeskError` if one is not the recorded one."""
    found = {}
    for name, record in made.companions.items():
        with reading(source / name, f"see what is damaged: bloomdesk verify {in_shell(source)}"):
            found[name] = read_small(source / name, target.LARGEST_COMPANION)
        if xxhash.xxh3_128_hexdigest(found[name]) != record.xxh3_128:
            raise damaged_part(source / name, "it is not what the manifest records")
    return found
