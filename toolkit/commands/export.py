"""Writes a prepared directory back as the Hub's standard checkpoint, which transformers' from_pretrained loads.

    HUB_DIR/
      model.safetensors.index.json          written first: it says what belongs here, and that it is this export
      model-00001-of-00072.safetensors      one shard for each part: word_embeddings.weight, ...
      ...                                   h.0. ..., as bigscience/bloom names them
      model-00072-of-00072.safetensors      ln_f.weight, ln_f.bias
      config.json, tokenizer.json, ...      as the source has them

A shard has the bytes that the reference library writes for its tensors: by name, with the header padded to 8 bytes.
It is renamed into its place only when all of it has been compared with the manifest's hashes, so one that is there is
whole. What a lossless directory has coded is decoded here, and its hashes are those of the decoded bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from runner.errors import BloomdeskError
from runner.format.manifest import CompanionRecord, Manifest, PartRecord, TensorRecord, load_manifest
from runner.format.safetensors import encode_header, open_regular, read_small
from runner.system.atomic import TEMPORARY_SUFFIX, atomic_file, write_atomically
from runner.system.lock import sole_writer
from toolkit.commands.verify import quick_damage
from toolkit.hub.partial_file import settle
from toolkit.io.disk import disk_errors
from toolkit.io.progress import Progress, silent
from toolkit.parts.destination import LARGEST_COMPANION, require_free_space
from toolkit.parts.part_reader import DamagedTensor, PartReader, StoredTensor, stored_tensors
from toolkit.parts.row_groups import Coders
from toolkit.source.key_map import name_table
from toolkit.source.shards import LARGEST_INDEX

INDEX = "model.safetensors.index.json"
SETTLE = 256 * 2**20  # so many bytes are brought onto the disk at a time, and let out of the page cache


@dataclass(frozen=True)
class PlannedShard:
    """A shard to write: its first bytes, then `tensors` of the part that it is made from, in the shard's order."""

    file: str
    part: PartRecord
    header: bytes
    tensors: tuple[StoredTensor, ...]
    keys: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of the tensors alone."""
        return sum(stored.tensor.nbytes for stored in self.tensors)

    @property
    def size(self) -> int:
        return len(self.header) + self.nbytes


@dataclass(frozen=True)
class ExportPlan:
    """All that an export will do. `index` is the index file's text; `to_write` are the shards not yet there."""

    directory: Path
    destination: Path
    manifest: Manifest
    index: bytes
    shards: tuple[PlannedShard, ...]
    to_write: tuple[PlannedShard, ...]

    @property
    def bytes_to_write(self) -> int:
        return sum(shard.size for shard in self.to_write)


@dataclass(frozen=True)
class ExportSummary:
    """What an export did; `bytes_written` are those of the shards written now, `kept` were there already."""

    destination: Path
    written: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_written: int
    seconds: float


def export(directory: Path, destination: Path, progress: Progress = silent) -> ExportSummary:
    """Write the prepared checkpoint in `directory` to `destination` as sharded safetensors, or go on with that.

    Raises `BloomdeskError` before anything is written where the checkpoint is not complete, or `destination` holds
    something else or lacks the room; and later where bytes are not those that the manifest records, which are never
    exported, or the disk fails. What is finished then stays, and the same call goes on from it.
    """
    return carry_out(plan_export(directory, destination), progress)


def plan_export(directory: Path, destination: Path) -> ExportPlan:
    """Everything that `export` checks before it writes; it writes nothing."""
    manifest = load_manifest(directory)
    if manifest.missing:
        raise BloomdeskError(
            f"{directory} is not complete: {len(manifest.missing)} files are still to be made",
            "run the command that makes it again, to its end",
        )
    for record in manifest.records:
        for damage in quick_damage(directory / record.file, record):
            raise _damaged(directory, damage.file, damage.what)
    shards = _plan_shards(manifest)
    index = _index(manifest, shards)
    begun = _is_begun(destination, index)
    to_write = tuple(shard for shard in shards if not (begun and _is_whole(destination, shard)))
    plan = ExportPlan(directory, destination, manifest, index, shards, to_write)
    if to_write:
        leftovers = (destination / (shard.file + TEMPORARY_SUFFIX) for shard in to_write)
        small = len(index) + sum(record.size for record in manifest.companions.values())
        require_free_space(destination, plan.bytes_to_write + small, leftovers)
    return plan


def carry_out(plan: ExportPlan, progress: Progress = silent) -> ExportSummary:
    """Do what `plan_export` planned; `progress` hears of each shard's bytes, from this thread."""
    start = time.monotonic()
    with disk_errors(plan.destination):
        plan.destination.mkdir(parents=True, exist_ok=True)
    with sole_writer(plan.destination):
        _is_begun(plan.destination, plan.index)  # another process may have been faster
        _put(plan.destination / INDEX, plan.index)
        for companion in plan.manifest.companions.values():
            _put(plan.destination / companion.file, _read_companion(plan.directory, companion))
        with Coders() as coders:
            for shard in plan.to_write:
                _write_shard(plan, shard, coders, progress)
    written = tuple(shard.file for shard in plan.to_write)
    kept = tuple(shard.file for shard in plan.shards if shard.file not in written)
    seconds = time.monotonic() - start
    return ExportSummary(plan.destination, written, kept, plan.bytes_to_write, seconds)


def _plan_shards(manifest: Manifest) -> tuple[PlannedShard, ...]:
    keys = {place: key for key, place in name_table(manifest.model).items()}
    shards = []
    for number, part in enumerate(manifest.parts.values(), 1):
        # By key: so the reference library lays tensors of one dtype out.
        by_key = {keys[part.file, stored.tensor.name]: stored for stored in stored_tensors(part)}
        tensors = {key: by_key[key] for key in sorted(by_key)}
        described = [(key, stored.tensor.dtype, stored.tensor.shape) for key, stored in tensors.items()]
        header = _padded_to_8(encode_header(described))
        file = f"model-{number:05d}-of-{len(manifest.parts):05d}.safetensors"
        shards.append(PlannedShard(file, part, header, tuple(tensors.values()), tuple(tensors)))
    return tuple(shards)


def _padded_to_8(header: bytes) -> bytes:
    """A part's header with the reference library's padding in place of ours."""
    text = header[8:].rstrip(b" ")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(manifest: Manifest, shards: tuple[PlannedShard, ...]) -> bytes:
    """The index file; the manifest's hash in it tells this export from one of another checkpoint of the same shape."""
    total = sum(shard.nbytes for shard in shards)
    origin = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    body = {
        "metadata": {"bloomdesk_manifest_sha256": origin, "total_size": total},
        "weight_map": {key: shard.file for shard in shards for key in shard.keys},
    }
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


def _is_begun(destination: Path, index: bytes) -> bool:
    """Whether this export was begun there; False where it is new or empty, an error where it holds anything else."""
    if destination.exists() and not destination.is_dir():
        raise BloomdeskError(f"{destination} is not a directory", "give a new directory to write to")
    try:
        if read_small(destination / INDEX, LARGEST_INDEX) == index:
            return True
        what = "the index of another checkpoint"
    except FileNotFoundError:
        present = {path.name for path in destination.iterdir()} if destination.exists() else set()
        others = sorted(present - {INDEX + TEMPORARY_SUFFIX, ".bloomdesk.lock"})
        if not others:
            return False
        what = ", ".join(others[:3])
    except OSError as error:
        raise BloomdeskError(f"{destination / INDEX}: cannot be read: {error.strerror}") from error
    raise BloomdeskError(
        f"{destination} is not empty and holds no export of this checkpoint: {what}",
        "give a new or an empty directory to write to",
    )


def _is_whole(destination: Path, shard: PlannedShard) -> bool:
    """Shards are put in place only when they are whole; a file cut or changed in size since then is seen here."""
    try:
        with open_regular(destination / shard.file) as file:
            return file.read(len(shard.header)) == shard.header and file.seek(0, 2) == shard.size
    except OSError:
        return False


def _put(path: Path, data: bytes) -> None:
    with disk_errors(path):
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)


def _read_companion(directory: Path, record: CompanionRecord) -> bytes:
    try:
        data = read_small(directory / record.file, LARGEST_COMPANION)
    except OSError as error:
        raise _damaged(directory, record.file, f"it cannot be read: {error.strerror}") from error
    found = xxhash.xxh3_128_hexdigest(data)
    if found != record.xxh3_128:
        raise _damaged(directory, record.file, f"wrong xxh3-128: {found}, expected {record.xxh3_128}")
    return data


def _write_shard(plan: ExportPlan, shard: PlannedShard, coders: Coders, progress: Progress) -> None:
    """Put a shard in place, whole or not at all."""
    path, part = plan.destination / shard.file, plan.directory / shard.part.file
    try:
        with disk_errors(path), atomic_file(path) as file, PartReader(part, shard.tensors, coders) as reader:
            file.write(shard.header)
            done, settled = len(shard.header), 0
            for index, stored in enumerate(shard.tensors):
                own = xxhash.xxh3_128()
                for piece in reader.bits(index):
                    own.update(piece)
                    file.write(piece)
                    done += len(piece)
                    progress(shard.file, done, shard.size)
                    if done - settled >= SETTLE:
                        _settle(file, settled, done)
                        settled = done
                _compare(stored.tensor, own.hexdigest())
    except DamagedTensor as error:
        raise _damaged(plan.directory, shard.part.file, str(error)) from error


def _compare(tensor: TensorRecord, found: str) -> None:
    if found != tensor.xxh3_128:
        raise DamagedTensor(f"{tensor.name} has the xxh3-128 {found}, expected {tensor.xxh3_128}")


def _settle(file: BinaryIO, start: int, stop: int) -> None:
    file.flush()
    settle(file.fileno(), start, stop)


def _damaged(directory: Path, file: str, what: str) -> BloomdeskError:
    return BloomdeskError(
        f"{directory / file} is damaged and was not exported: {what}",
        f"bloomdesk repair {directory}, then the same command again: finished shards are kept",
    )
