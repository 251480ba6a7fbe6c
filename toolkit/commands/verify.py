"""Checks of a prepared directory against its manifest: quick ones, one that reads every byte, a periodic look at some.

    plan: manifest, regions to read ──> threads read ahead ──> one thread hashes in order ──> report

One thread hashes everything in the order of the manifest, so a report does not hang on how the readers' turns fall;
xxh3 is several times faster than any disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.manifest import CompanionRecord, Manifest, PartRecord
from runner.format.safetensors import open_regular, read_header
from runner.system.atomic import TEMPORARY_SUFFIX
from toolkit.io.progress import Progress, silent
from toolkit.io.reader import READ_THREADS, ReadAhead, Run
from toolkit.parts.manifest_backup import find_manifest
from toolkit.parts.part import is_in_place
from toolkit.parts.regions import Region, choose, regions_of


@dataclass(frozen=True)
class Damage:
    """Something that is wrong with a file; `tensor` names the tensor whose bytes are concerned, if one's are."""

    file: str
    tensor: str | None
    what: str


@dataclass(frozen=True)
class VerifyPlan:
    """What a check will read: `regions` in the order of the manifest.

    `sample` is the share of the bytes that was asked for, None where all are to be read, or none for `quick`.
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

    `sample` is the share that was asked for, None where it was everything or, for a `quick` check, nothing.
    `leftovers` are half-written files of an interrupted conversion: no damage, nothing ever reads them.
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
        """The part of all bytes that was compared, from 0 to 1."""
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

    `quick` checks presence, sizes and headers; otherwise every byte is read once and the hashes of files and
    tensors are compared; with `sample`, above 0 and up to 1, those of whole tensors chosen at random that make up
    about that share of the bytes, others in every run unless `seed` is given. `progress` is called from this thread.

    Raises `BloomdeskError` where there is no manifest to compare with; everything else that is wrong, unreadable
    files and a bad manifest.json beside a sound backup included, is in the report.
    """
    return carry_out(plan_verify(directory, quick, sample=sample, seed=seed), progress, threads)


def plan_verify(
    directory: Path, quick: bool = False, *, sample: float | None = None, seed: int | None = None
) -> VerifyPlan:
    """What `verify` will read; it reads the manifest alone, and raises what `verify` raises."""
    if sample is not None and not 0 < sample <= 1:
        raise BloomdeskError(f"a sample must be above 0% and at most 100%, found {sample:.6g}")
    if quick and sample is not None:
        raise BloomdeskError(
            "a quick check reads no tensors, so it takes no sample", "ask for one of the two"
        )
    found = find_manifest(directory)
    damage = tuple(Damage(file, None, what) for file, what in found.wrong.items())
    regions: tuple[Region, ...] = ()
    if not quick:
        regions = tuple(region for record in found.manifest.records for region in regions_of(record))
    if sample is not None:
        regions = choose(regions, sample, seed)
    return VerifyPlan(directory, found.manifest, damage, quick, sample, regions)


def carry_out(plan: VerifyPlan, progress: Progress = silent, threads: int = READ_THREADS) -> VerifyReport:
    """Do what `plan_verify` planned, with so many threads that read."""
    damage = [*plan.manifest_damage]
    damage += [Damage(file, None, "it has not been made yet") for file in plan.manifest.missing]
    runs = [Run(plan.directory / region.file, region.start, region.nbytes) for region in plan.regions]
    with ReadAhead(runs, threads) as ahead:
        check = _Check(plan, ahead, progress)
        for record in plan.manifest.records:
            found = quick_damage(plan.directory / record.file, record)
            in_bytes = check.file(record, sound=not found)
            # What is wrong with the file as a whole is told once, and the better sentence is the quick one.
            damage += found + [item for item in in_bytes if item.tensor is not None or not found]
    leftovers = tuple(sorted(path.name for path in plan.directory.glob(f"*{TEMPORARY_SUFFIX}")))
    records = plan.manifest.records
    recorded = sum(record.size for record in records)
    return VerifyReport(
        plan.directory,
        plan.quick,
        tuple(damage),
        len(records),
        check.bytes_read,
        leftovers,
        plan.sample,
        recorded,
    )


def quick_damage(path: Path, record: PartRecord | CompanionRecord) -> list[Damage]:
    """Damage of a file that its presence, its size and its header show; at most one sentence."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
    except FileNotFoundError:
        return [Damage(record.file, None, "it is missing")]
    except OSError as error:
        return [_unreadable(record, error)]
    if size != record.size:
        return [Damage(record.file, None, f"it has {size:,} bytes, expected {record.size:,}")]
    return _header_damage(path, record) if isinstance(record, PartRecord) else []


def _header_damage(path: Path, record: PartRecord) -> list[Damage]:
    """What the file says of itself, against the manifest, which lists the tensors that the model needs."""
    try:
        header = read_header(path)
    except BloomdeskError as error:
        return [Damage(record.file, None, f"its header is damaged: {error.message}")]
    found = [(entry.name, entry.dtype, entry.shape) for entry in header.tensors.values()]
    if found != [tensor.described for tensor in record.tensors]:
        return [Damage(record.file, None, "its header is damaged: it is not that of this part")]
    if not is_in_place(path, record):
        return [Damage(record.file, None, "its header is damaged: it is not as it was written")]
    return []


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
        """Damage in the bytes of one file; `sound` says that nothing is known to be wrong with it so far."""
        regions = self._regions.get(record.file, [])
        total = sum(region.nbytes for _, region in regions)
        whole = xxhash.xxh3_128() if self._whole_files else None
        damage: list[Damage] = []
        done = 0
        try:
            for index, region in regions:
                own = xxhash.xxh3_128()
                present = 0
                for piece in self._pieces(index):
                    own.update(piece)
                    if whole is not None:
                        whole.update(piece)
                    present += len(piece)
                    self.bytes_read += len(piece)
                    self._progress(record.file, done + present, total)
                done += present
                damage += _region_damage(region, present, own.hexdigest())
        except OSError as error:
            damage.append(_unreadable(record, error))
        if whole is not None and sound and not damage and whole.hexdigest() != record.xxh3_128:
            what = f"wrong xxh3-128: {whole.hexdigest()}, expected {record.xxh3_128}"
            damage.append(Damage(record.file, None, what))
        return damage

    def _pieces(self, index: int) -> Iterator[memoryview]:
        """The bytes of a region, as far as the file has them."""
        try:
            yield from self._ahead.pieces(index)
        except EOFError:
            return


def _region_damage(region: Region, present: int, found: str) -> list[Damage]:
    if present < region.nbytes:
        what = f"{region.nbytes - present:,} of {region.nbytes:,} bytes are cut off"
    elif found != region.xxh3_128:
        what = f"wrong xxh3-128: {found}, expected {region.xxh3_128}"
    else:
        return []
    return [Damage(region.file, region.tensor, what)]


def _unreadable(record: PartRecord | CompanionRecord, error: OSError) -> Damage:
    return Damage(record.file, None, f"it cannot be read: {error.strerror}")
