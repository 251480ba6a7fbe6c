"""Spreads a prepared directory over several disks, part by part.

    DST/block_07 ──> DST/.spread/block_07, B/block_07, C/block_07 ──> synced, read back ──> the whole part is deleted
    at the end: the new manifest in DST ──> DST/.spread/* get their places in DST

So DST needs space for one part more, and the others for their own. Killed at any moment, the same command goes on: the
manifests say which slices there are. Meanwhile every other command refuses DST.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.errors import BloomdeskError, in_shell
from runner.format.layout import MANIFEST, MANIFEST_BACKUP, SPREADING
from runner.format.manifest import Manifest, load_manifest
from runner.format.slice_set import being_spread, difference, refuse_while_spreading
from runner.system.atomic import TEMPORARY_SUFFIX, replace_file
from runner.system.lock import LOCK_FILE
from toolkit.commands.build import BuildPlan, Summary
from toolkit.commands.build import carry_out as build
from toolkit.commands.convert_prepared import PreparedParts, plan_from_parts
from toolkit.commands.placement import Placement, placed
from toolkit.io.disk import disk_errors, sole_writer_of
from toolkit.io.progress import Progress, silent
from toolkit.parts import destination as target
from toolkit.parts.release import read_back


@dataclass(frozen=True)
class SpreadPlan:
    """What `carry_out` will do: make the slices as `build` says, if there are any to make, and put them in place."""

    directory: Path
    build: BuildPlan | None

    @property
    def work(self) -> int:
        """Bytes that progress counts."""
        return self.build.work if self.build else 0


def spread(
    directory: Path, also: Sequence[Path], progress: Progress = silent, *, shares: Sequence[int] = ()
) -> Summary:
    """Give each of the directories `also` a slice of the checkpoint in `directory`, which keeps the first one.

    Raises `BloomdeskError` before anything is changed if `directory` is not complete, is a slice already, or a disk
    has too little space; and later if a part is damaged or a disk fails. The same call goes on from there.
    """
    return carry_out(plan_spread(directory, also, shares), progress)


def plan_spread(directory: Path, also: Sequence[Path], shares: Sequence[int] = ()) -> SpreadPlan:
    """Everything that `spread` checks before it changes anything; it writes nothing."""
    if not also:
        refuse_while_spreading(directory)
        raise BloomdeskError("there is no other directory", "name one on each further disk: --also DIR")
    places = placed(directory, None, also, shares)
    manifest = load_manifest(directory)
    staging = directory / SPREADING
    for each in also:
        if Path(os.path.realpath(staging)) in (own := Path(os.path.realpath(each)), *own.parents):
            raise BloomdeskError(
                f"{each} is where the slice of {directory} itself is made", "name a directory on another disk"
            )
    if manifest.slice is not None:
        _require_same(directory, manifest, places)
        return SpreadPlan(directory, None)
    if manifest.missing:
        raise BloomdeskError(
            f"{directory} is not complete: {len(manifest.missing)} files are still to be made",
            f"{manifest.command(directory)} resumes where it stopped; then spread it",
        )
    slices = {staging if each == directory else each: own for each, own in places.slices.items()}
    # In their directories they know each other by their places at the end.
    placement = Placement(slices, places.places)
    _require_slices_of(directory, manifest, placement)
    shards = PartsToSpread(directory, manifest, manifest.form, placement=placement)
    return SpreadPlan(directory, plan_from_parts(shards, placement, frees=True))


def carry_out(plan: SpreadPlan, progress: Progress = silent) -> Summary:
    """Do what `plan_spread` planned."""
    with sole_writer_of(plan.directory):
        done = Summary((), tuple(load_manifest(plan.directory).parts), 0, 0.0)
        if plan.build is not None:
            done = build(plan.build, progress)
        if (plan.directory / SPREADING).is_dir():
            _put_in_place(plan.directory)
    return done


def _put_in_place(directory: Path) -> None:
    """Make what is beside it the content of the directory. After a kill, the manifest is there first."""
    staging = directory / SPREADING
    is_begun = load_manifest(directory).slice is not None
    manifest = load_manifest(directory if is_begun else staging)
    with disk_errors(directory):
        target.write_manifest(directory, manifest)
        for file in manifest.parts:
            if (staging / file).exists():
                replace_file(staging / file, directory / file)
        for name in (*manifest.parts, *manifest.companions, MANIFEST, MANIFEST_BACKUP):
            for path in (staging / name, staging / f"{name}{TEMPORARY_SUFFIX}"):
                path.unlink(missing_ok=True)
        (staging / LOCK_FILE).unlink(missing_ok=True)  # Windows locks a directory by it
        if others := sorted(path.name for path in staging.iterdir()):
            raise BloomdeskError(
                f"{staging} holds what bloomdesk did not put there: {others[0][:100]!r}",
                "move it out, and run it again",
            )
        staging.rmdir()


def _require_same(directory: Path, manifest: Manifest, asked: Placement) -> None:
    """Raise `BloomdeskError` unless the directory is the first slice of what is asked for."""
    if manifest.slice != asked.slices[directory]:
        held = manifest.slice.described if manifest.slice is not None else ""
        raise BloomdeskError(
            f"{directory} is {held} already, and only whole checkpoints are spread",
            f"write it back first: bloomdesk export {in_shell(directory)} HUB_DIR",
        )
    if manifest.places == asked.places and (directory / SPREADING).is_dir():
        # Only the last step is left.
        return
    for each, own in asked.slices.items():
        other = manifest if each == directory else target.load_existing(each)
        if other is None or other.slice != own or difference(manifest, other):
            lost = replace(manifest, slice=own, places=()).command(each)
            raise BloomdeskError(
                f"{directory} was spread already, and {each} does not hold {own.described if own else 'it'}",
                f"bloomdesk info {in_shell(directory)} says where that is; if it is lost, {lost} makes it again",
            )


def _require_slices_of(directory: Path, manifest: Manifest, placement: Placement) -> None:
    """Raise `BloomdeskError` unless each directory has its slice of what an earlier run has deleted here."""
    begun = being_spread(directory)
    if begun is None:
        return
    gone = [file for file in manifest.parts if not os.path.lexists(directory / file)]
    for each, own in placement.slices.items():
        held = target.load_existing(each)
        is_same = held is not None and held.slice == own
        there = target.drop_missing(each, held).parts if held is not None and is_same else {}
        lacking = [file for file in gone if file not in there]
        # What nothing was deleted for may begin anew, but for the slice that is made here.
        if not lacking and (is_same or not begun.parts or each != directory / SPREADING):
            continue
        what = (
            f"lacks {lacking[0]}, which is whole nowhere any more"
            if is_same or held is None
            else "has another slice"
        )
        has_these_shares = begun.slice == placement.slices[directory / SPREADING]
        lost = replace(begun, places=placement.places) if has_these_shares else begun
        raise BloomdeskError(
            f"{each} {what}, and {directory} was being spread over {', '.join(begun.places)}",
            f"{begun.command_to_spread(directory)} resumes; if a disk of these is lost, "
            f"{lost.command(directory / SPREADING)} makes its slice again from the source, then spread it again",
        )


@dataclass
class PartsToSpread(PreparedParts):
    """The parts of a directory that go when their slices are on all disks, and read back as they were written."""

    placement: Placement = field(default_factory=lambda: Placement({}))

    def release(self, needed: frozenset[str], delete: Callable[[Path, str | None], None]) -> None:
        for file in self.manifest.parts:
            whole = self.directory / file
            if file in needed or not whole.exists():
                continue
            self._prove(file)
            with disk_errors(whole, "deleted"):
                whole.unlink()

    def _prove(self, file: str) -> None:
        """Raise `BloomdeskError` unless every slice of a part is on its disk."""
        for directory in self.placement.directories:
            record = load_manifest(directory).parts[file]
            read_back(directory / file, record.xxh3_128, f"the whole part is still in {self.directory}")
