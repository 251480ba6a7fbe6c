"""Checks of a prepared directory against its manifest: quick ones, and one that reads every byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.header import encode_header, read_header, tensor_nbytes
from runner.prepared import CompanionRecord, PartRecord, load_manifest
from toolkit import checksum
from toolkit.durable import TEMPORARY_SUFFIX
from toolkit.progress import Progress, silent


@dataclass(frozen=True)
class Damage:
    """Something that is wrong with a file; `tensor` names the tensor whose bytes are concerned, if one's are."""

    file: str
    tensor: str | None
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and found. `bytes_read` are those of the files in full, none for a quick check.

    `leftovers` are half-written files of an interrupted conversion: no damage, nothing ever reads them.
    """

    directory: Path
    quick: bool
    damage: tuple[Damage, ...]
    files_checked: int
    bytes_read: int
    leftovers: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        return not self.damage


def verify(directory: Path, quick: bool = False, progress: Progress = silent) -> VerifyReport:
    """Compare a prepared directory with its manifest.

    `quick` checks presence, sizes and headers; otherwise every byte is read once and the hashes of files and
    tensors are compared. Raises `BloomdeskError` where there is no manifest to compare with; everything else
    that is wrong, unreadable files included, is in the report.
    """
    manifest = load_manifest(directory)
    damage = [Damage(file, None, "it has not been made yet") for file in manifest.missing]
    bytes_read = 0
    for record in manifest.records:
        path = directory / record.file
        found = _quick_damage(path, record)
        if not quick and path.is_file():
            in_bytes, count = _full_damage(path, record, progress)
            bytes_read += count
            # What is wrong with the file as a whole is told once, and the better sentence is the quick one.
            found += [item for item in in_bytes if item.tensor is not None or not found]
        damage += found
    leftovers = tuple(sorted(path.name for path in directory.glob(f"*{TEMPORARY_SUFFIX}")))
    return VerifyReport(directory, quick, tuple(damage), len(manifest.records), bytes_read, leftovers)


def _quick_damage(path: Path, record: PartRecord | CompanionRecord) -> list[Damage]:
    try:
        with path.open("rb") as file:
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
    if found != [(tensor.name, tensor.dtype, tensor.shape) for tensor in record.tensors]:
        return [Damage(record.file, None, "its header is damaged: it is not that of this part")]
    return []


def _full_damage(
    path: Path, record: PartRecord | CompanionRecord, progress: Progress
) -> tuple[list[Damage], int]:
    """Damage found by reading the file once, and how many bytes were read."""
    whole = xxhash.xxh3_128()
    buffers = checksum.new_buffers()
    damage = []
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            for name, expected, nbytes in _regions(record):
                own = xxhash.xxh3_128()
                present = min(nbytes, size - done)
                for piece in checksum.pieces(file, done, present, buffers):
                    own.update(piece)
                    whole.update(piece)
                    done += len(piece)
                    progress(record.file, done, record.size)
                if present < nbytes:
                    damage.append(
                        Damage(record.file, name, f"{nbytes - present:,} of {nbytes:,} bytes are cut off")
                    )
                elif own.hexdigest() != expected:
                    damage.append(
                        Damage(record.file, name, f"wrong xxh3-128: {own.hexdigest()}, expected {expected}")
                    )
    except OSError as error:
        damage.append(_unreadable(record, error))
    except EOFError as error:
        damage.append(Damage(record.file, None, f"it changed while it was read: {error}"))
    if not damage and whole.hexdigest() != record.xxh3_128:
        damage.append(
            Damage(record.file, None, f"wrong xxh3-128: {whole.hexdigest()}, expected {record.xxh3_128}")
        )
    return damage, done


def _regions(record: PartRecord | CompanionRecord) -> list[tuple[str | None, str, int]]:
    """Tensor name or None, expected hash and length of what lies in the file, from its first byte to its last."""
    if isinstance(record, CompanionRecord):
        return [(None, record.xxh3_128, record.size)]
    header = encode_header((tensor.name, tensor.dtype, tensor.shape) for tensor in record.tensors)
    return [
        (None, xxhash.xxh3_128_hexdigest(header), len(header)),
        *((item.name, item.xxh3_128, tensor_nbytes(item.dtype, item.shape)) for item in record.tensors),
    ]


def _unreadable(record: PartRecord | CompanionRecord, error: OSError) -> Damage:
    return Damage(record.file, None, f"it cannot be read: {error.strerror}")
