"""Checks of a prepared directory or of an export against its record: a quick one, every byte, or a random sample."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from runner.errors import BloomdeskError, in_shell
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import Manifest
from runner.format.slice_set import refuse_while_spreading
from runner.system.atomic import TEMPORARY_SUFFIX
from toolkit.hub.record import RECORD
from toolkit.io.progress import Progress, silent
from toolkit.io.reader import READ_THREADS
from toolkit.parts.check import Damage, Unread, check
from toolkit.parts.export_record import ExportRecord, load_export_record
from toolkit.parts.manifest_backup import find_manifest
from toolkit.parts.regions import FileRecord, Region, choose, regions_of

# What readers of a checkpoint look for first.
STRAY = "model.safetensors"


@dataclass(frozen=True)
class VerifyPlan:
    """What a check will read: `regions` in the order of the record, which is a manifest or that of an export.

    `sample` is the requested share of the bytes, or None to read all or, for `quick`, none.
    """

    directory: Path
    record: Manifest | ExportRecord
    manifest_damage: tuple[Damage, ...]
    quick: bool
    sample: float | None
    regions: tuple[Region, ...]

    @property
    def bytes_to_read(self) -> int:
        return sum(region.nbytes for region in self.regions)


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and found. `bytes_read` are those that were compared, of `bytes_recorded` in all files.

    `damage` is certain; what is `unchecked` could not be read and may be sound. `missing` are files that were never
    made, which are also among the damage. `sample` is the requested share, or None for everything or, for a `quick`
    check, nothing. `leftovers` are half-written files of an interrupted conversion, which are no damage: nothing reads
    them. `next_command` makes what is damaged or missing.
    """

    directory: Path
    quick: bool
    damage: tuple[Damage, ...]
    files_checked: int
    bytes_read: int
    leftovers: tuple[str, ...] = ()
    sample: float | None = None
    bytes_recorded: int = 0
    unchecked: tuple[Unread, ...] = ()
    missing: tuple[str, ...] = ()
    next_command: str = ""

    @property
    def sound(self) -> bool:
        return not self.damage and not self.unchecked

    @property
    def is_unfinished(self) -> bool:
        """Whether nothing is wrong but that files were never made."""
        return bool(self.missing) and {item.file for item in self.damage} == set(self.missing)

    @property
    def share(self) -> float:
        """Fraction of all bytes that was compared, from 0 to 1."""
        return self.bytes_read / self.bytes_recorded if self.bytes_recorded else 1.0


def verify(
    directory: Path,
    quick: bool = False,
    progress: Progress = silent,
    *,
    sample: float | None = None,
    seed: int | None = None,
    threads: int = READ_THREADS,
) -> VerifyReport:
    """Compare a prepared directory with its manifest, or an export with its record.

    `quick` checks presence, sizes and headers. Otherwise every byte is read once, and the hashes of files and tensors
    are compared; with `sample`, above 0 and up to 1, only those of tensors chosen at random that make up about that
    share of the bytes, others in every run unless `seed` is given. `progress` is called from this thread.

    Raises `BloomdeskError` if there is no record to compare with, or it can't be read; everything else that is wrong,
    also a bad manifest.json beside a sound backup, is in the report.
    """
    return carry_out(plan_verify(directory, quick, sample=sample, seed=seed), progress, threads)


def plan_verify(
    directory: Path, quick: bool = False, *, sample: float | None = None, seed: int | None = None
) -> VerifyPlan:
    """What `verify` will read; it reads only the record, and raises what `verify` raises."""
    if sample is not None and not 0 < sample <= 1:
        raise BloomdeskError(f"a sample must be above 0% and at most 100%, found {100 * sample:.6g}%")
    if quick and sample is not None:
        raise BloomdeskError(
            "a quick check reads no tensors, so it takes no sample", "ask for one of the two"
        )
    refuse_while_spreading(directory)
    record, wrong = _find_record(directory)
    damage = tuple(Damage(file, None, what) for file, what in wrong.items())
    regions: tuple[Region, ...] = ()
    if not quick:
        regions = tuple(region for each in record.records for region in regions_of(each))
    if sample is not None:
        regions = choose(regions, sample, seed)
    return VerifyPlan(directory, record, damage, quick, sample, regions)


def carry_out(plan: VerifyPlan, progress: Progress = silent, threads: int = READ_THREADS) -> VerifyReport:
    """Do what `plan_verify` planned, reading in `threads` threads."""
    record, directory = plan.record, plan.directory
    records: tuple[FileRecord, ...] = record.records
    missing, command = (), "run the same bloomdesk export again: it writes what is damaged or missing"
    if isinstance(record, Manifest):
        missing, command = record.missing, f"bloomdesk repair {in_shell(directory)}"
    found = check(directory, records, plan.regions, progress, threads)
    strays = ()
    if not isinstance(record, Manifest) and os.path.lexists(directory / STRAY):
        what = "it is not of this export, and readers take it in place of the shards: move it away"
        strays = (Damage(STRAY, None, what),)
    never_made = tuple(Damage(file, None, "it has not been made yet") for file in missing)
    report = VerifyReport(
        directory,
        plan.quick,
        (*plan.manifest_damage, *never_made, *strays, *found.damage),
        len(records),
        found.bytes_read,
        tuple(sorted(path.name for path in directory.glob(f"*{TEMPORARY_SUFFIX}") if path.is_file())),
        plan.sample,
        sum(each.size for each in records),
        found.unchecked,
        missing,
        command,
    )
    return replace(report, next_command=record.command(directory)) if report.is_unfinished else report


def _find_record(directory: Path) -> tuple[Manifest | ExportRecord, dict[str, str]]:
    """The record of what a directory should hold, and what is wrong with a manifest or its backup, by file name."""
    if not any((directory / name).exists() for name in (MANIFEST, MANIFEST_BACKUP)):
        exported = load_export_record(directory)
        if exported is not None:
            return exported, {}
        refuse_download(directory)
    return find_manifest(directory)


def refuse_download(directory: Path) -> None:
    """Raise `BloomdeskError` if `directory` holds a download, which is no prepared checkpoint, or is being spread."""
    refuse_while_spreading(directory)
    if (directory / RECORD).exists() and not (directory / MANIFEST).exists():
        raise BloomdeskError(
            f"{directory} is a downloaded checkpoint, not a prepared one",
            f"bloomdesk download REPO {in_shell(directory)} --check compares it with its hashes; "
            f"bloomdesk convert {in_shell(directory)} DST prepares it",
        )
