"""Writes a prepared directory back as the Hub's standard checkpoint, which transformers' from_pretrained loads.

    HUB_DIR/
      model.safetensors.index.json          written first: it says what belongs here, and that it is this export
      model-00001-of-00072.safetensors      one shard for each part: word_embeddings.weight, ...
      ...                                   h.0. ..., as bigscience/bloom names them
      model-00072-of-00072.safetensors      ln_f.weight, ln_f.bias
      config.json, tokenizer.json, ...      as the source has them

A shard has the bytes that the reference library writes for its tensors: by name, with the header padded to 8 bytes.
It is put in place atomically after all of it has been compared with the manifest's hashes, so one in place is whole.
Coded matrices of a lossless directory are decoded; their hashes are those of the decoded bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.manifest import CompanionRecord, Manifest, PartRecord, load_manifest
from runner.format.safetensors import encode_header, read_small
from runner.system.atomic import TEMPORARY_SUFFIX, atomic_file
from toolkit.commands.build import Summary
from toolkit.commands.verify import quick_damage
from toolkit.io.disk import disk_errors, read_if_exists, sole_writer_of
from toolkit.io.progress import Progress, silent
from toolkit.io.writer import WriteBehind
from toolkit.parts.destination import (
    LARGEST_COMPANION,
    other_files,
    put_file,
    require_free_space,
)
from toolkit.parts.part import is_in_place
from toolkit.parts.part_reader import DamagedTensor, PartReader, StoredTensor, stored_tensors
from toolkit.parts.row_groups import Coders
from toolkit.source.index import LARGEST_INDEX
from toolkit.source.key_map import name_table

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class PlannedShard:
    """A shard to write: its header, then `tensors` of the part that it is made from, by key in the shard's order."""

    file: str
    part: PartRecord
    header: bytes
    tensors: Mapping[str, StoredTensor]

    @property
    def size(self) -> int:
        return len(self.header) + sum(stored.tensor.nbytes for stored in self.tensors.values())


@dataclass(frozen=True)
class ExportPlan:
    """All that an export will do: `small_files` are the index and the companions, `to_write` the missing shards."""

    directory: Path
    destination: Path
    small_files: Mapping[str, bytes]
    shards: tuple[PlannedShard, ...]
    to_write: tuple[PlannedShard, ...]

    @property
    def bytes_to_write(self) -> int:
        return sum(shard.size for shard in self.to_write)


def export(directory: Path, destination: Path, progress: Progress = silent) -> Summary:
    """Write the prepared checkpoint in `directory` to `destination` as sharded safetensors, or resume that.

    Raises `BloomdeskError` before anything is written if the checkpoint is not complete, or `destination` holds
    something else or lacks space; and later if bytes are not those that the manifest records, which are never
    exported, or the disk fails. What is finished then stays, and the same call resumes from it.
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
    small = {INDEX: _index(manifest, shards)}
    small |= {record.file: _read_companion(directory, record) for record in manifest.companions.values()}
    to_write = shards
    if _has_index(destination, small[INDEX]):
        # A shard is put in place only when it is whole; one cut or changed in size since then is written again.
        to_write = tuple(
            shard for shard in shards if not is_in_place(destination / shard.file, shard.header, shard.size)
        )
    plan = ExportPlan(directory, destination, small, shards, to_write)
    require_free_space(destination, plan.bytes_to_write, [shard.file for shard in to_write], small)
    return plan


def carry_out(plan: ExportPlan, progress: Progress = silent) -> Summary:
    """Do what `plan_export` planned; `progress` is called with each shard's bytes, from this thread."""
    start = time.monotonic()
    with sole_writer_of(plan.destination):
        # Another process may have been faster.
        _has_index(plan.destination, plan.small_files[INDEX])
        for name, data in plan.small_files.items():
            put_file(plan.destination / name, data)
        with Coders() as coders:
            for shard in plan.to_write:
                _write_shard(plan, shard, coders, progress)
    written = tuple(shard.file for shard in plan.to_write)
    kept = tuple(shard.file for shard in plan.shards if shard.file not in written)
    seconds = time.monotonic() - start
    return Summary(written, kept, plan.bytes_to_write, seconds)


def _plan_shards(manifest: Manifest) -> tuple[PlannedShard, ...]:
    keys = {place: key for key, place in name_table(manifest.model).items()}
    shards = []
    for number, part in enumerate(manifest.parts.values(), 1):
        # By key, which is the order of the reference library for tensors of one dtype.
        by_key = {keys[part.file, stored.tensor.name]: stored for stored in stored_tensors(part)}
        tensors = {key: by_key[key] for key in sorted(by_key)}
        described = [(key, stored.tensor.dtype, stored.tensor.shape) for key, stored in tensors.items()]
        file = f"model-{number:05d}-of-{len(manifest.parts):05d}.safetensors"
        shards.append(PlannedShard(file, part, encode_header(described), tensors))
    return tuple(shards)


def _index(manifest: Manifest, shards: tuple[PlannedShard, ...]) -> bytes:
    """The index file; the manifest's hash distinguishes it from that of another checkpoint of the same shape."""
    total = sum(shard.size - len(shard.header) for shard in shards)
    origin = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    body = {
        "metadata": {"bloomdesk_manifest_sha256": origin, "total_size": total},
        "weight_map": {key: shard.file for shard in shards for key in shard.tensors},
    }
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


def _has_index(destination: Path, index: bytes) -> bool:
    """Whether the destination has this export's index; False if it is new or empty, else an error."""
    present = read_if_exists(destination / INDEX, LARGEST_INDEX)
    if present == index:
        return True
    what = "the index of another checkpoint"
    if present is None:
        others = other_files(destination, {INDEX + TEMPORARY_SUFFIX})
        if not others:
            return False
        what = ", ".join(others[:3])
    raise BloomdeskError(
        f"{destination} is not empty and holds no export of this checkpoint: {what}",
        "give a new or an empty directory to write to",
    )


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
    """Put a shard in place, whole or not at all; `BloomdeskError` if the part is damaged or the disk fails."""
    path, part = plan.destination / shard.file, plan.directory / shard.part.file
    tensors = tuple(shard.tensors.values())
    try:
        with (
            disk_errors(path),
            atomic_file(path) as file,
            PartReader(part, tensors, coders) as reader,
            WriteBehind(file.fileno()) as behind,
        ):
            behind.write(shard.header)
            done = len(shard.header)
            for index, stored in enumerate(tensors):
                own = xxhash.xxh3_128()
                for block in reader.bits(index):
                    behind.write(block)
                    own.update(block)
                    done += len(block)
                    progress(shard.file, done, shard.size)
                found, expected = own.hexdigest(), stored.tensor.xxh3_128
                if found != expected:
                    raise DamagedTensor(f"{stored.tensor.name} has the xxh3-128 {found}, expected {expected}")
    except DamagedTensor as error:
        raise _damaged(plan.directory, shard.part.file, str(error)) from error


def _damaged(directory: Path, file: str, what: str) -> BloomdeskError:
    return BloomdeskError(
        f"{directory / file} is damaged and was not exported: {what}",
        f"bloomdesk repair {directory}, then the same command again: finished shards are kept",
    )
