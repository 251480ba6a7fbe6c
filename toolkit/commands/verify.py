"""Checks of a prepared directory against its manifest: a quick one, one of every byte, one of a random sample.

    plan: manifest, regions to read ──> threads read ahead ──> one thread hashes in order ──> report

One thread hashes everything in the order of the manifest, so the report does not depend on the readers' timing; xxh3 is
several times faster than any disk.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.manifest import CompanionRecord, Manifest, PartRecord
from runner.format.safetensors import open_regular, read_header
from runner.system.atomic import TEMPORARY_SUFFIX
from toolkit.io.progress import Progress, silent
from toolkit.io.reader import READ_THREADS, ByteRange, ReadAhead
from toolkit.parts.manifest_backup import find_manifest
from toolkit.parts.part import is_in_place
from toolkit.parts.regions import Region, choose, regions_of


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file; `tensor` is the tensor whose bytes are damaged, or None for the file as a whole."""

    file: str
    tensor: str | None
    what: str


@dataclass(frozen=True)
class VerifyPlan:
    """What a check will read: `regions` in the order of the manifest.

    `sample` is the requested share of the bytes, or None to read all or, for `quick`, none.
    """

    directory: Path
    manifest: Manifest
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

    `sample` is the requested share, or None for everything or, for a `quick` check, nothing. `leftovers` are
    half-written files of an interrupted conversion, which are no damage: nothing reads them.
    """

    directory: Path
    quick: bool
    damage: tuple[Damage, ...]
    files_checked: int
    bytes_read: int
    leftovers: tuple[str, ...] = ()
    sample: float | None = None
    bytes_recorded: int = 0

    @property
    def sound(self) -> bool:
        return not self.damage

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
    """Compare a prepared directory with its manifest.

    `quick` checks presence, sizes and headers. Otherwise every byte is read once, and the hashes of files and tensors
    are compared; with `sample`, above 0 and up to 1, only those of tensors chosen at random that make up about that
    share of the bytes, others in every run unless `seed` is given. `progress` is called from this thread.

    Raises `BloomdeskError` if there is no manifest to compare with; everything else that is wrong, also an unreadable
    file or a bad manifest.json beside a sound backup, is in the report.
    """
    return carry_out(plan_verify(directory, quick, sample=sample, seed=seed), progress, threads)


def plan_verify(
    directory: Path, quick: bool = False, *, sample: float | None = None, seed: int | None = None
) -> VerifyPlan:
    """What `verify` will read; it reads only the manifest, and raises what `verify` raises."""
    if sample is not None and not 0 < sample <= 1:
        raise BloomdeskError(f"a sample must be above 0% and at most 100%, found {sample:.6g}")
    if quick and sample is not None:
        raise BloomdeskError(
            "a quick check reads no tensors, so it takes no sample", "ask for one of the two"
        )
    manifest, wrong = find_manifest(directory)
    damage = tuple(Damage(file, None, what) for file, what in wrong.items())
    regions: tuple[Region, ...] = ()
    if not quick:
        regions = tuple(region for record in manifest.records for region in regions_of(record))
    if sample is not None:
        regions = choose(regions, sample, seed)
    return VerifyPlan(directory, manifest, damage, quick, sample, regions)


def carry_out(plan: VerifyPlan, progress: Progress = silent, threads: int = READ_THREADS) -> VerifyReport:
    """Do what `plan_verify` planned, reading in `threads` threads."""
    damage = [*plan.manifest_damage]
    damage += [Damage(file, None, "it has not been made yet") for file in plan.manifest.missing]
    records = plan.manifest.records
    ranges = [ByteRange(plan.directory / region.file, region.start, region.nbytes) for region in plan.regions]
    with ReadAhead(ranges, threads) as ahead:
        check = _Check(plan, ahead, progress)
        for record in records:
            found = quick_damage(plan.directory / record.file, record)
            in_bytes = check.file(record, sound=not found)
            # Damage of the file as a whole is reported once, and the quick check's sentence is the better one.
            damage += found + [item for item in in_bytes if item.tensor is not None or not found]
    leftovers = tuple(sorted(path.name for path in plan.directory.glob(f"*{TEMPORARY_SUFFIX}")))
    return VerifyReport(
        plan.directory,
        plan.quick,
        tuple(damage),
        len(records),
        check.bytes_read,
        leftovers,
        plan.sample,
        bytes_recorded=sum(record.size for record in records),
    )


def quick_damage(path: Path, record: PartRecord | CompanionRecord) -> list[Damage]:
    """Damage of a file that its presence, size and header show; at most one item."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
    except FileNotFoundError:
        return [Damage(record.file, None, "it is missing")]
    except OSError as error:
        return [_unreadable(record, error)]
    if size != record.size:
        return [Damage(record.file, None, f"it has {size:,} bytes, expected {record.size:,}")]
    if not isinstance(record, PartRecord) or is_in_place(path, record.header, record.size):
        return []
    why = "it is not that of this part"
    try:
        read_header(path)
    except BloomdeskError as error:
        why = error.message
    return [Damage(record.file, None, f"its header is damaged: {why}")]


class _Check:
    """Compares the planned regions with their hashes, file by file in the order of the manifest."""

    def __init__(self, plan: VerifyPlan, ahead: ReadAhead, progress: Progress) -> None:
        self._ahead, self._progress = ahead, progress
        self._whole_files = plan.sample is None and not plan.quick
        self._regions: dict[str, list[tuple[int, Region]]] = {}
        for index, region in enumerate(plan.regions):
            self._regions.setdefault(region.file, []).append((index, region))
        self.bytes_read = 0

    def file(self, record: PartRecord | CompanionRecord, sound: bool) -> list[Damage]:
        """Damage in the bytes of one file; `sound` says that nothing else is known to be wrong with it."""
        regions = self._regions.get(record.file, [])
        total = sum(region.nbytes for _, region in regions)
        whole = xxhash.xxh3_128()
        damage: list[Damage] = []
        done = 0
        try:
            for index, region in regions:
                own, before = xxhash.xxh3_128(), done
                with suppress(EOFError):  # the bytes that are there are compared, and their number
                    for piece in self._ahead.blocks(index):
                        own.update(piece)
                        if self._whole_files:
                            whole.update(piece)
                        done += len(piece)
                        self.bytes_read += len(piece)
                        self._progress(record.file, done, total)
                damage += _region_damage(region, done - before, own.hexdigest())
        except OSError as error:
            damage.append(_unreadable(record, error))
        if self._whole_files and sound and not damage and whole.hexdigest() != record.xxh3_128:
            damage.append(_wrong_hash(record.file, None, whole.hexdigest(), record.xxh3_128))
        return damage


def _region_damage(region: Region, present: int, found: str) -> list[Damage]:
    if present < region.nbytes:
        what = f"{region.nbytes - present:,} of {region.nbytes:,} bytes are cut off"
        return [Damage(region.file, region.tensor, what)]
    if found != region.xxh3_128:
        return [_wrong_hash(region.file, region.tensor, found, region.xxh3_128)]
    return []


def _wrong_hash(file: str, tensor: str | None, found: str, expected: str) -> Damage:
    return Damage(file, tensor, f"wrong xxh3-128: {found}, expected {expected}")


def _unreadable(record: PartRecord | CompanionRecord, error: OSError) -> Damage:
    return Damage(record.file, None, f"it cannot be read: {error.strerror}")
