"""Re-splits a checkpoint from the Hub into a prepared directory: planned as a whole, written one part at a time.

    gather the part's tensors ──> PART.incomplete ──> fsync ──> source hashes right? ──> rename ──> manifest
         └── sha256 of the source shards, beside it ────────────────────┘

Tensors go from file to file in pieces, so memory stays small at any size. Every step survives a kill: the same
conversion run again keeps the parts that the manifest records and makes the others.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash

from runner.errors import BloomdeskError
from runner.header import encode_header
from runner.prepared import (
    COMPANIONS,
    MANIFEST,
    CompanionRecord,
    Hyperparameters,
    Manifest,
    PartRecord,
    PartSpec,
    Source,
    SourceShard,
    TensorRecord,
    load_manifest,
    part_specs,
)
from toolkit import checksum
from toolkit.checksum import ShardHashes
from toolkit.config import read_config
from toolkit.durable import TEMPORARY_SUFFIX, durable_file, write_durably
from toolkit.naming import Assignment, assign
from toolkit.progress import Progress, silent
from toolkit.record import RECORD, load_record
from toolkit.shards import SourceTensor, common_dtype, read_source

REQUIRED_COMPANIONS = ("config.json", "tokenizer.json")
LARGEST_COMPANION = 2**30
WRITE_BACK = 64 * 2**20
SPARE_BYTES = 16 * 2**20  # for the manifest, the small files and what the file system keeps for itself


@dataclass(frozen=True)
class PlannedPart:
    """A part to write: its header, and where its tensors are, in the order of `spec`."""

    spec: PartSpec
    header: bytes
    tensors: tuple[SourceTensor, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The shards that its bytes come from, in the order in which they are needed."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors))


@dataclass(frozen=True)
class ConversionPlan:
    """All that a conversion will do, checked as far as it can be without reading the weights.

    `manifest` is what the destination has and keeps; `to_write` is in the order of a pass. `companions` are
    the small files' bytes. `sha256` is what is known of the shards beforehand.
    """

    source: Path
    destination: Path
    manifest: Manifest
    to_write: tuple[PlannedPart, ...]
    companions: Mapping[str, bytes]
    sha256: Mapping[Path, str]

    @property
    def bytes_to_write(self) -> int:
        return sum(part.size for part in self.to_write)


@dataclass(frozen=True)
class ConvertSummary:
    """What a conversion did; `bytes_written` are those of the parts."""

    destination: Path
    model: Hyperparameters
    written: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_written: int
    seconds: float


def convert(source: Path, destination: Path, progress: Progress = silent) -> ConvertSummary:
    """Make a prepared directory of the checkpoint in `source`, or go on with one that was begun.

    Raises `BloomdeskError` before anything is written where the source is not a whole, sound BLOOM or the
    destination can't take it, and later where a shard is not what the download recorded or the disk fails.
    What is finished then stays, and the same call goes on from it.
    """
    return carry_out(plan_conversion(source, destination), progress)


def plan_conversion(source: Path, destination: Path) -> ConversionPlan:
    """Everything that `convert` checks before it writes; it writes nothing."""
    if not source.is_dir():
        raise BloomdeskError(f"{source} is not a directory", "download a checkpoint: bloomdesk download")
    if source.resolve() == destination.resolve():
        raise BloomdeskError(f"{destination} is the source itself", "give another directory to write to")
    model = read_config(source / "config.json", "BF16")  # a wrong architecture is told before its tensors are
    tensors = read_source(source)
    model = replace(model, dtype=common_dtype(tensors))
    assignment = assign(tensors, model)
    parts = _plan_parts(model, tensors, assignment)
    companions = _read_companions(source)
    origin, sha256 = _recorded_source(source, tensors, companions)
    manifest = _begun(destination, Manifest(model, origin))
    _check_same_source(destination, manifest, parts, companions, sha256)
    manifest = replace(manifest, parts=_sound_parts(destination, manifest, parts))
    to_write = tuple(part for part in parts if part.spec.file not in manifest.parts)
    plan = ConversionPlan(source, destination, manifest, to_write, companions, sha256)
    _check_space(plan)
    if assignment.lm_head is not None and parts[0] in to_write:
        _check_lm_head(tensors[assignment.lm_head], parts[0].tensors[0])
    return plan


def carry_out(plan: ConversionPlan, progress: Progress = silent) -> ConvertSummary:
    """Do what `plan_conversion` planned; `progress` hears of each part's bytes."""
    start = time.monotonic()
    manifest = _lay_out(plan)
    with ShardHashes() as hashes:
        for position, part in enumerate(plan.to_write):
            for soon in plan.to_write[position : position + 2]:
                for shard in soon.sources:
                    hashes.begin(shard)
            record = _write_part(plan, part, hashes, progress)
            manifest = manifest.with_part(record)
            _write_manifest(plan.destination, manifest)
    written = tuple(part.spec.file for part in plan.to_write)
    kept = tuple(file for file in manifest.parts if file not in written)
    seconds = time.monotonic() - start
    return ConvertSummary(plan.destination, manifest.model, written, kept, plan.bytes_to_write, seconds)


def _plan_parts(
    model: Hyperparameters, tensors: Mapping[str, SourceTensor], assignment: Assignment
) -> tuple[PlannedPart, ...]:
    parts = []
    for spec in part_specs(model):
        chosen = tuple(tensors[assignment.parts[spec.file][name]] for name in spec.tensors)
        for tensor, shape in zip(chosen, spec.tensors.values(), strict=True):
            _check_shape(tensor, shape)
        header = encode_header((name, model.dtype, shape) for name, shape in spec.tensors.items())
        parts.append(PlannedPart(spec, header, chosen))
    if assignment.lm_head is not None:
        _check_shape(tensors[assignment.lm_head], (model.vocab_size, model.hidden_size))
    return tuple(parts)


def _check_shape(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        found, expected = list(tensor.shape), list(shape)
        raise BloomdeskError(
            f"{tensor.file}: {tensor.key} has shape {found}, config.json makes it {expected}"
        )


def _read_companions(source: Path) -> dict[str, bytes]:
    companions = {}
    for name in COMPANIONS:
        path = source / name
        try:
            if path.stat().st_size > LARGEST_COMPANION:
                raise BloomdeskError(f"{path}: larger than {LARGEST_COMPANION:,} bytes")
            companions[name] = path.read_bytes()
        except FileNotFoundError:
            if name in REQUIRED_COMPANIONS:
                raise BloomdeskError(
                    f"{path} is missing", "download it from the model's page into the same directory"
                ) from None
        except OSError as error:
            raise BloomdeskError(f"{path}: cannot be read: {error.strerror}") from error
    return companions


def _recorded_source(
    source: Path, tensors: Mapping[str, SourceTensor], companions: Mapping[str, bytes]
) -> tuple[Source, dict[Path, str]]:
    """Repo and commit, and each shard's sha256, where a download has recorded them."""
    record = load_record(source)
    if record is None:
        return Source(), {}
    again = "run the same bloomdesk download again: it fetches what is wrong and nothing else"
    shards = dict.fromkeys(tensor.file for tensor in tensors.values())
    hashes = {}
    for path in (*shards, *(source / name for name in companions)):
        known = record.files.get(path.name)
        if known is None:
            raise BloomdeskError(f"{path} is no file of the download that {source / RECORD} records", again)
        size = path.stat().st_size
        if size != known.size:
            raise BloomdeskError(f"{path} has {size:,} bytes, the download recorded {known.size:,}", again)
        if known.sha256 is not None and path in shards:
            hashes[path] = known.sha256
    return Source(record.repo, record.commit), hashes


def _begun(destination: Path, fresh: Manifest) -> Manifest:
    """The manifest of a conversion that was begun in `destination`, or `fresh` where nothing is there."""
    if destination.exists() and not destination.is_dir():
        raise BloomdeskError(f"{destination} is not a directory", "give a new directory to write to")
    if (destination / MANIFEST).exists():
        begun = load_manifest(destination)
        if begun.source != fresh.source:
            raise _another_source(destination, f"parts of {begun.source.repo} at {begun.source.commit}")
        if begun.model != fresh.model:
            raise _another_source(destination, "parts of a model with other hyperparameters")
        return begun
    others = sorted(path.name for path in destination.iterdir()) if destination.exists() else []
    if set(others) - {MANIFEST + TEMPORARY_SUFFIX}:
        raise BloomdeskError(
            f"{destination} is no prepared checkpoint and is not empty: it holds {', '.join(others[:3])}",
            "give a new or an empty directory to write to",
        )
    return fresh


def _check_same_source(
    destination: Path,
    manifest: Manifest,
    parts: tuple[PlannedPart, ...],
    companions: Mapping[str, bytes],
    sha256: dict[Path, str],
) -> None:
    """Refuse to go on with a directory that was begun from another source.

    What the manifest knows of the shards' hashes is added to `sha256`: a local source has no download record,
    and may have changed since.
    """
    for name, record in manifest.companions.items():
        if name not in companions or xxhash.xxh3_128_hexdigest(companions[name]) != record.xxh3_128:
            raise _another_source(destination, f"another {name}")
    for part in parts:
        known = manifest.parts.get(part.spec.file)
        if known is None:
            continue
        hashes = {shard.file: shard.sha256 for shard in known.sources}
        if set(hashes) != {path.name for path in part.sources}:
            raise _another_source(destination, f"{part.spec.file} from {', '.join(hashes)}")
        for path in part.sources:
            if sha256.setdefault(path, hashes[path.name]) != hashes[path.name]:
                raise _another_source(destination, f"another {path.name}")


def _another_source(destination: Path, what: str) -> BloomdeskError:
    return BloomdeskError(
        f"{destination} was begun from another source: it has {what}",
        "give a new directory, or delete this one",
    )


def _sound_parts(
    destination: Path, manifest: Manifest, parts: tuple[PlannedPart, ...]
) -> dict[str, PartRecord]:
    """The recorded parts that are in place with the right size and header; the others will be made again."""
    sound = {}
    for part in parts:
        record = manifest.parts.get(part.spec.file)
        if record is not None and _is_in_place(destination / part.spec.file, part, record):
            sound[part.spec.file] = record
    return sound


def _is_in_place(path: Path, part: PlannedPart, record: PartRecord) -> bool:
    try:
        with path.open("rb") as file:
            header = file.read(len(part.header))
        return path.stat().st_size == record.size == part.size and header == part.header
    except OSError:
        return False


def _check_space(plan: ConversionPlan) -> None:
    place = plan.destination.absolute()
    while not place.exists():
        place = place.parent
    leftovers = (plan.destination / (part.spec.file + TEMPORARY_SUFFIX) for part in plan.to_write)
    freed = sum(path.stat().st_size for path in leftovers if path.is_file())  # they are replaced
    free = shutil.disk_usage(place).free + freed
    needed = plan.bytes_to_write + sum(map(len, plan.companions.values())) + SPARE_BYTES
    if plan.to_write and needed > free:
        raise BloomdeskError(
            f"{plan.destination} needs {needed:,} bytes and the disk has {free:,} free, "
            f"{needed - free:,} too few",
            "make room, or give a directory on a larger disk",
        )


def _check_lm_head(lm_head: SourceTensor, embedding: SourceTensor) -> None:
    """The runner's head is the embedding, so a head of its own would be lost."""
    with ExitStack() as open_files:
        ours = _read(lm_head, _open(lm_head.file, open_files), checksum.new_buffers())
        theirs = _read(embedding, _open(embedding.file, open_files), checksum.new_buffers())
        for left, right in zip(ours, theirs, strict=True):
            if left != right:
                raise BloomdeskError(
                    f"{lm_head.file}: {lm_head.key} differs from the embedding, "
                    "and only models whose head is the embedding can be run"
                )


def _lay_out(plan: ConversionPlan) -> Manifest:
    """Directory, manifest, small files; the manifest first, so that a kill leaves a directory known as ours."""
    manifest, destination = plan.manifest, plan.destination
    with _clear_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
    _write_manifest(destination, manifest)
    records = {}
    for name, data in plan.companions.items():
        path = destination / name
        with _clear_errors(path):
            if not path.is_file() or path.read_bytes() != data:
                write_durably(path, data)
        records[name] = CompanionRecord(name, len(data), xxhash.xxh3_128_hexdigest(data))
    manifest = replace(manifest, companions=records)
    _write_manifest(destination, manifest)
    return manifest


def _write_manifest(destination: Path, manifest: Manifest) -> None:
    path = destination / MANIFEST
    with _clear_errors(path):
        write_durably(path, manifest.to_json().encode())


def _write_part(
    plan: ConversionPlan, part: PlannedPart, hashes: ShardHashes, progress: Progress
) -> PartRecord:
    path = plan.destination / part.spec.file
    whole = xxhash.xxh3_128(part.header)
    records = []
    with _clear_errors(path), durable_file(path) as file:
        with _WriteBehind(file) as behind, ExitStack() as open_files:
            behind.write(memoryview(part.header))
            done = len(part.header)
            readers = {shard: _open(shard, open_files) for shard in part.sources}
            for (name, shape), tensor in zip(part.spec.tensors.items(), part.tensors, strict=True):
                own = xxhash.xxh3_128()
                for piece in _read(tensor, readers[tensor.file], behind.buffers):
                    behind.write(piece)
                    own.update(piece)
                    whole.update(piece)
                    done += len(piece)
                    progress(path.name, done, part.size)
                records.append(TensorRecord(name, tensor.dtype, shape, own.hexdigest()))
        file.flush()
        os.fsync(file.fileno())  # meanwhile the shards' hashes go on
        sources = tuple(_checked_shard(shard, hashes, plan.sha256) for shard in part.sources)
    return PartRecord(path.name, part.size, whole.hexdigest(), tuple(records), sources)


class _WriteBehind:
    """Writes to `file` in a thread, so that the next piece is read and hashed meanwhile.

    A piece from `buffers` is written before its buffer's turn comes again. Leaving the block waits for all.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.buffers = checksum.new_buffers(3)  # one is read into, one waits, one is written
        self._file = file
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._pending: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> _WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if kind is None and self._pending is not None:
            self._pending.result()

    def write(self, piece: memoryview) -> None:
        """Have `piece` written; raises what went wrong with the one before."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._thread.submit(self._write, piece)

    def _write(self, piece: memoryview) -> None:
        self._file.write(piece)
        self._unsynced += len(piece)
        if self._unsynced >= WRITE_BACK and hasattr(os, "posix_fadvise"):
            # The disk starts now on what it has not, and the page cache forgets what it has; without this all
            # is left to fsync, and the part pushes out the shard that two readers share. It changes no bytes.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsynced = 0


def _open(shard: Path, open_files: ExitStack) -> BinaryIO:
    try:
        return open_files.enter_context(shard.open("rb", buffering=0))
    except OSError as error:
        raise BloomdeskError(f"{shard}: cannot be read: {error.strerror}") from error


def _read(tensor: SourceTensor, file: BinaryIO, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
    try:
        yield from checksum.pieces(file, tensor.offset, tensor.nbytes, buffers)
    except OSError as error:
        raise BloomdeskError(f"{tensor.file}: cannot be read: {error.strerror}") from error
    except EOFError as error:
        raise BloomdeskError(f"{tensor.file}: {error}") from None


def _checked_shard(shard: Path, hashes: ShardHashes, known: Mapping[Path, str]) -> SourceShard:
    found = hashes.result(shard)
    if found != known.get(shard, found):
        raise BloomdeskError(
            f"{shard} is damaged or has changed: its sha256 is {found}, expected {known[shard]}",
            "fetch it again with bloomdesk download, then convert again: finished parts are kept",
        )
    return SourceShard(shard.name, found)


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Say what went wrong with writing `path` in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BloomdeskError(
                f"{path}: the disk is full",
                "make room and run the same command again: it goes on where it stopped",
            ) from error
        raise BloomdeskError(f"{path}: cannot be written: {error.strerror}") from error
