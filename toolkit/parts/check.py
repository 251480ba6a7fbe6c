"""Files compared with their records, a quick look at each or every byte: what is damaged, and what could not be read.

    records, regions to read ──> threads read ahead ──> one thread hashes in order ──> findings

One thread hashes everything in the order of the records, so the findings do not depend on the readers' timing; xxh3 is
several times faster than any disk.

Damage is certain: no file is there, or one of another size, or its bytes were read and are others. Every other error is
no damage, because the file may be sound: it is unchecked, and nothing may replace it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.manifest import CompanionRecord
from runner.format.safetensors import open_regular, read_header
from toolkit.io.progress import Progress
from toolkit.io.reader import NO_FILE, READ_THREADS, ByteRange, ReadAhead, retried
from toolkit.parts.regions import FileRecord, Region


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file; `tensor` is the tensor whose bytes are damaged, or None for the file as a whole."""

    file: str
    tensor: str | None
    what: str


@dataclass(frozen=True)
class Unread:
    """A file that could not be read, and why; `errno` is the system's number, or None if memory ran out here."""

    file: str
    what: str
    errno: int | None

    @classmethod
    def because(cls, file: str, error: OSError | MemoryError) -> Unread:
        """The file, unread because of `error`."""
        if isinstance(error, MemoryError):
            return cls(file, "it cannot be read: memory ran out", None)
        return cls(file, f"it cannot be read: {error.strerror or error}", error.errno)


@dataclass(frozen=True)
class Findings:
    """What a check found, and the number of bytes that it compared."""

    damage: tuple[Damage, ...] = ()
    unchecked: tuple[Unread, ...] = ()
    bytes_read: int = 0

    def __add__(self, more: Findings) -> Findings:
        return Findings(
            self.damage + more.damage, self.unchecked + more.unchecked, self.bytes_read + more.bytes_read
        )


def quick_check(path: Path, record: FileRecord, *, by_header: bool = True) -> Findings:
    """What a file's presence, its size and, unless left out, its header show; at most one item."""
    header = b"" if isinstance(record, CompanionRecord) or not by_header else record.header

    def look() -> tuple[bytes, int]:
        with open_regular(path) as file:
            return file.read(len(header)), file.seek(0, os.SEEK_END)

    try:
        start, size = retried(look)
    except FileNotFoundError as error:
        if path.is_symlink():
            # What it leads to may be on a disk that is not mounted.
            what = f"it is a link to {os.path.realpath(path)}, which is not there"
            return Findings((), (Unread(record.file, what, error.errno),))
        return _damage(record.file, "it is missing")
    except (OSError, MemoryError) as error:
        unread = Unread.because(record.file, error)
        return _damage(record.file, unread.what) if unread.errno in NO_FILE else Findings((), (unread,))
    if size != record.size:
        return _damage(record.file, f"it has {size:,} bytes, expected {record.size:,}")
    return Findings() if start == header else _damage(record.file, f"its header is damaged: {_why(path)}")


def check(
    directory: Path,
    records: Sequence[FileRecord],
    regions: Sequence[Region],
    progress: Progress,
    threads: int = READ_THREADS,
) -> Findings:
    """What is wrong with the files of `records`: by a quick check, and in the bytes of `regions`, in their order."""
    by_file: dict[str, list[tuple[int, Region]]] = {}
    for index, region in enumerate(regions):
        by_file.setdefault(region.file, []).append((index, region))
    ranges = [ByteRange(directory / region.file, region.start, region.nbytes) for region in regions]
    found = Findings()
    with ReadAhead(ranges, threads) as ahead:
        for record in records:
            quick = quick_check(directory / record.file, record)
            found += quick
            if not quick.unchecked:
                found += _check_bytes(ahead, record, by_file.get(record.file, []), quick, progress)
    return found


def _check_bytes(
    ahead: ReadAhead,
    record: FileRecord,
    regions: Sequence[tuple[int, Region]],
    quick: Findings,
    progress: Progress,
) -> Findings:
    """What is wrong in `regions` of one file, beside what the `quick` check has found."""
    total, done, damage, unchecked = sum(region.nbytes for _, region in regions), 0, [], []
    # A shard of an export has the hashes of its header and tensors, which leave out no byte.
    expected = getattr(record, "xxh3_128", None) if total == record.size else None
    whole = xxhash.xxh3_128()
    try:
        for index, region in regions:
            own, before = xxhash.xxh3_128(), done
            # The bytes that are there are compared, and their number.
            with suppress(EOFError):
                for piece in ahead.blocks(index):
                    own.update(piece)
                    if expected:
                        whole.update(piece)
                    done += len(piece)
                    progress(record.file, done, total)
            damage += _region_damage(region, done - before, own.hexdigest())
    except (OSError, MemoryError) as error:
        unchecked.append(Unread.because(record.file, error))
    if quick.damage:
        # Damage of the file as a whole is reported once, and the quick check's sentence is the better one.
        return Findings(tuple(item for item in damage if item.tensor is not None), (), done)
    if expected and not damage and not unchecked and whole.hexdigest() != expected:
        damage.append(_wrong_hash(record.file, None, whole.hexdigest(), expected))
    return Findings(tuple(damage), tuple(unchecked), done)


def _region_damage(region: Region, present: int, found: str) -> list[Damage]:
    if present < region.nbytes:
        what = f"{region.nbytes - present:,} of {region.nbytes:,} bytes are cut off"
        return [Damage(region.file, region.tensor, what)]
    if found != region.xxh3_128:
        return [_wrong_hash(region.file, region.tensor, found, region.xxh3_128)]
    return []


def _wrong_hash(file: str, tensor: str | None, found: str, expected: str) -> Damage:
    return Damage(file, tensor, f"wrong xxh3-128: {found}, expected {expected}")


def _damage(file: str, what: str) -> Findings:
    return Findings((Damage(file, None, what),))


def _why(path: Path) -> str:
    """What is wrong with a header that differs from the recorded one."""
    try:
        read_header(path)
    except BloomdeskError as error:
        return error.message
    return "it is not that of this file"
