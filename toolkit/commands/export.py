"""Writes a prepared directory back as the Hub's standard checkpoint, which transformers' from_pretrained loads.

    HUB_DIR/
      bloomdesk-export.json                 written first: the hashes of all that belongs here
      model.safetensors.index.json          its metadata names the manifest, too
      model-00001-of-00072.safetensors      one shard for each part: word_embeddings.weight, ...
      ...                                   h.0. ..., as bigscience/bloom names them
      model-00072-of-00072.safetensors      ln_f.weight, ln_f.bias
      config.json, tokenizer.json, ...      as the source has them, but for a dtype from which it was rounded

A shard has the bytes that the reference library writes for its tensors: by name, with the header padded to 8 bytes.
It is put in place atomically after all of it has been compared with the manifest's hashes.
What is there in the place of a file and is another is set aside, as NAME.changed.
Coded matrices of a lossless directory are decoded; their hashes are those of the decoded bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError, in_shell, reading
from runner.format.layout import part_specs
from runner.format.manifest import CompanionRecord, Manifest
from runner.format.part_record import PartRecord, TensorRecord
from runner.format.safetensors import read_small
from runner.format.slice_set import SliceSet, find_all_slices
from runner.system.atomic import TEMPORARY_SUFFIX, atomic_file
from toolkit.commands.build import Summary
from toolkit.commands.verify import refuse_download
from toolkit.hub.place import set_aside
from toolkit.io.disk import disk_errors, read_if_exists, require_large_files, sole_writer_of
from toolkit.io.progress import Progress, Work, silent, silent_work
from toolkit.io.writer import WriteBehind
from toolkit.parts.check import check, quick_check
from toolkit.parts.coded_part import hashed
from toolkit.parts.destination import (
    LARGEST_COMPANION,
    other_files,
    put_file,
    require_free_space,
)
from toolkit.parts.export_record import (
    EXPORT_RECORD,
    ExportRecord,
    ShardRecord,
    UnsoundExportRecord,
    load_export_record,
)
from toolkit.parts.part_reader import DamagedTensor, PartReader, StoredTensor, stored_tensors
from toolkit.parts.regions import Region, regions_of
from toolkit.parts.row_groups import Block, Coders
from toolkit.source.dtype import config_in
from toolkit.source.index import LARGEST_INDEX
from toolkit.source.key_map import name_table

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class PartSource:
    """A part that a shard is made of, or what one slice has of it: its tensors in the shard's order."""

    path: Path
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class PlannedShard:
    """A shard to write: `record` is what it will be, and `sources` are the part, or those of all slices in order."""

    record: ShardRecord
    sources: tuple[PartSource, ...]

    @property
    def file(self) -> str:
        return self.record.file


@dataclass(frozen=True)
class ExportPlan:
    """All that an export will do: `small_files` are its record, the index and the companions.

    `to_write` are the missing shards; those in place are compared first, and written again if they are damaged.
    """

    directory: Path
    destination: Path
    record: ExportRecord
    small_files: Mapping[str, bytes]
    shards: tuple[PlannedShard, ...]
    to_write: tuple[PlannedShard, ...]

    @property
    def in_place(self) -> tuple[PlannedShard, ...]:
        return tuple(shard for shard in self.shards if shard not in self.to_write)

    @property
    def work(self) -> int:
        """Bytes that progress counts: of all shards, compared or written."""
        return sum(shard.record.size for shard in self.shards)


def export(
    directory: Path, destination: Path, progress: Progress = silent, also: Sequence[Path] = ()
) -> Summary:
    """Write the prepared checkpoint in `directory` to `destination` as sharded safetensors, or resume that.

    If that is a slice, the others are found as `find_slices` says, in `also` first. Raises `BloomdeskError` before
    anything is written if the checkpoint is not complete, or `destination` holds something else or lacks space; and
    later if bytes are not those that the manifest records, which are never exported, or the disk fails. What is
    finished then stays, and the same call resumes from it.
    """
    return carry_out(plan_export(directory, destination, also), progress)


def plan_export(
    directory: Path, destination: Path, also: Sequence[Path] = (), work: Work = silent_work
) -> ExportPlan:
    """Everything that `export` checks before it writes; it writes nothing.

    If slices have only ever seen their own rows, all of them are read for the hashes of the whole matrices, as `work`.
    """
    refuse_download(directory)
    slices = find_all_slices(directory, also)
    for index, each in slices.manifests.items():
        _refuse_damage(slices.directories[index], each)
    if slices.first.fingerprint is None:
        slices = _with_wholes(slices, work)
    manifest = slices.first
    shards = _plan_shards(slices)
    small = {INDEX: _index(manifest, shards)}
    small |= {record.file: _read_companion(directory, record) for record in manifest.companions.values()}
    # It may say the dtype from which the weights were rounded.
    small[CONFIG] = config_in(small[CONFIG], manifest.model.dtype)
    records = tuple(
        CompanionRecord(name, len(data), xxhash.xxh3_128_hexdigest(data)) for name, data in small.items()
    )
    record = ExportRecord(manifest.fingerprint, tuple(shard.record for shard in shards), records)
    is_ours = _is_ours(destination, record, small[INDEX])
    to_write = tuple(shard for shard in shards if not is_ours or not _is_in_place(destination, shard))
    small = {EXPORT_RECORD: record.to_json().encode(), **small}
    plan = ExportPlan(directory, destination, record, small, shards, to_write)
    size = sum(shard.record.size for shard in to_write)
    require_large_files(destination, {shard.file: shard.record.size for shard in to_write})
    require_free_space(destination, size, [shard.file for shard in to_write], small)
    return plan


def carry_out(plan: ExportPlan, progress: Progress = silent) -> Summary:
    """Do what `plan_export` planned; `progress` is called with each shard's bytes, from this thread."""
    start = time.monotonic()
    with sole_writer_of(plan.destination):
        # Another process may have been faster.
        _is_ours(plan.destination, plan.record, plan.small_files[INDEX])
        rotten = _rotten(plan, progress)
        aside = []
        for name, data in plan.small_files.items():
            path = plan.destination / name
            if name != EXPORT_RECORD and read_if_exists(path, LARGEST_COMPANION) not in (None, data):
                aside.append(set_aside(path))
            put_file(path, data)
        to_write = tuple(shard for shard in plan.shards if shard in plan.to_write or shard.file in rotten)
        with Coders() as coders:
            for shard in to_write:
                if os.path.lexists(plan.destination / shard.file):
                    # Decayed, cut, or somebody's work: nothing here tells which.
                    aside.append(set_aside(plan.destination / shard.file))
                _write_shard(plan, shard, coders, progress)
    written = tuple(shard.file for shard in to_write)
    kept = tuple(shard.file for shard in plan.shards if shard.file not in written)
    seconds = time.monotonic() - start
    notes = tuple(f"{path.name} holds what was there, which this export has not written" for path in aside)
    return Summary(written, kept, sum(shard.record.size for shard in to_write), seconds, notes=notes)


def _refuse_damage(directory: Path, manifest: Manifest) -> None:
    """Raise `BloomdeskError` if a file is missing, has another size or header, or can't be read."""
    for record in manifest.records:
        found = quick_check(directory / record.file, record)
        for item in found.unchecked:
            raise BloomdeskError(f"{directory / item.file}: {item.what}; nothing was exported")
        for item in found.damage:
            raise _damaged(directory, item.file, item.what)


def _with_wholes(slices: SliceSet, work: Work) -> SliceSet:
    """The slices, the first of which then knows the hashes of the whole matrices."""
    for known in slices.manifests.values():
        if known.fingerprint is not None:
            wholes = {file: part.wholes for file, part in known.parts.items()}
            return _knowing(slices, wholes)
    first, wholes = slices.first, {}
    sizes = {file: sum(each.parts[file].size for each in slices.manifests.values()) for file in first.parts}
    with work("hashing the slices", sum(sizes.values())) as progress, Coders() as coders:
        for spec in part_specs(first.model):
            sources = _sources_of(slices, spec.file, list(spec.matrices))
            hashes = _hashes_of_rows(sources, len(spec.matrices), coders)
            wholes[spec.file] = tuple(
                TensorRecord(name, first.model.dtype, shape, found)
                for (name, shape), found in zip(spec.matrices.items(), hashes, strict=True)
            )
            progress(spec.file, sizes[spec.file], sizes[spec.file])
    return _knowing(slices, wholes)


def _hashes_of_rows(sources: Sequence[PartSource], count: int, coders: Coders) -> list[str]:
    """The xxh3-128 of each of `count` matrices, of which the sources have the rows in order."""
    found = []
    with ExitStack() as stack:
        readers = [stack.enter_context(_opened(source, coders)) for source in sources]
        for index in range(count):
            own = xxhash.xxh3_128()
            for source, reader in zip(sources, readers, strict=True):
                for block in _sound_bits(source, reader, index):
                    own.update(block)
            found.append(own.hexdigest())
    return found


def _knowing(slices: SliceSet, wholes: Mapping[str, tuple[TensorRecord, ...]]) -> SliceSet:
    parts = {file: replace(part, wholes=wholes[file]) for file, part in slices.first.parts.items()}
    known = replace(slices.first, parts=parts)
    return replace(slices, manifests={**slices.manifests, slices.asked: known})


def _plan_shards(slices: SliceSet) -> tuple[PlannedShard, ...]:
    keys = {place: key for key, place in name_table(slices.first.model).items()}
    shards, parts = [], slices.first.parts
    for number, part in enumerate(parts.values(), 1):
        # By key, which is the order of the reference library for tensors of one dtype.
        by_key = {keys[part.file, tensor.name]: tensor for tensor in part.whole_weights}
        tensors = tuple(replace(by_key[key], name=key) for key in sorted(by_key))
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        names = [by_key[key].name for key in sorted(by_key)]
        sources = _sources_of(slices, part.file, names)
        shards.append(PlannedShard(ShardRecord(file, tensors), sources))
    return tuple(shards)


def _sources_of(slices: SliceSet, file: str, names: Sequence[str]) -> tuple[PartSource, ...]:
    """What each slice has of these tensors of a part."""
    return tuple(
        _source_of(slices.directories[index], manifest.parts[file], names)
        for index, manifest in slices.manifests.items()
    )


def _source_of(directory: Path, part: PartRecord, names: Sequence[str]) -> PartSource:
    by_name = {stored.tensor.name: stored for stored in stored_tensors(part)}
    return PartSource(directory / part.file, tuple(by_name[name] for name in names))


def _index(manifest: Manifest, shards: tuple[PlannedShard, ...]) -> bytes:
    """The index file; the weights' fingerprint distinguishes it from that of another checkpoint of the same shape."""
    total = sum(shard.record.size - len(shard.record.header) for shard in shards)
    body = {
        "metadata": {"bloomdesk_fingerprint": manifest.fingerprint, "total_size": total},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.record.tensors},
    }
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


def _is_ours(destination: Path, record: ExportRecord, index: bytes) -> bool:
    """Whether the destination holds an export of these weights; False if it is new or empty, else an error."""
    present = _record_in(destination)
    if present is not None and present.fingerprint == record.fingerprint:
        return True
    what = "an export of other weights"
    if present is None:
        found = read_if_exists(destination / INDEX, LARGEST_INDEX)
        if found is not None and b'"bloomdesk_' in found and _weight_map(found) == _weight_map(index):
            # Of an earlier version, or its record is damaged: what is in place must be right, or it is another's.
            return True
        ours = {INDEX + TEMPORARY_SUFFIX, EXPORT_RECORD + TEMPORARY_SUFFIX}
        others = other_files(destination, ours)
        if not others:
            return False
        what = ", ".join(others[:3])
    raise BloomdeskError(
        f"{destination} is not empty and holds no export of this checkpoint: {what}",
        "give a new or an empty directory to write to",
    )


def _record_in(destination: Path) -> ExportRecord | None:
    """The sound record of an export, if there is one."""
    try:
        return load_export_record(destination)
    except UnsoundExportRecord:
        return None


def _weight_map(index: bytes) -> object:
    try:
        return json.loads(index)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_in_place(destination: Path, shard: PlannedShard) -> bool:
    """Whether the shard's file has the right size and header; `BloomdeskError` if it can't be read."""
    found = quick_check(destination / shard.file, shard.record)
    for item in found.unchecked:
        raise BloomdeskError(f"{destination / shard.file}: {item.what}")
    return not found.damage


def _rotten(plan: ExportPlan, progress: Progress) -> frozenset[str]:
    """Shards in place whose bytes are others than they should be.

    Raises `BloomdeskError` if one can't be read, or no record says that such a file is this export's.
    """
    found = check(plan.destination, plan.record.shards, _regions_of(plan.in_place), progress)
    for item in found.unchecked:
        raise BloomdeskError(f"{plan.destination / item.file}: {item.what}; so it was not replaced")
    wrong = {item.file for item in found.damage if os.path.lexists(plan.destination / item.file)}
    if wrong and _record_in(plan.destination) is None:
        raise BloomdeskError(
            f"{plan.destination / min(wrong)} is another file than this export's, and no record says whose it is",
            "give a new or an empty directory to write to",
        )
    return frozenset(wrong & {shard.file for shard in plan.in_place})


def _regions_of(shards: tuple[PlannedShard, ...]) -> list[Region]:
    return [region for shard in shards for region in regions_of(shard.record)]


def _read_companion(directory: Path, record: CompanionRecord) -> bytes:
    with reading(directory / record.file):
        data = read_small(directory / record.file, LARGEST_COMPANION)
    found = xxhash.xxh3_128_hexdigest(data)
    if found != record.xxh3_128:
        raise _damaged(directory, record.file, f"wrong xxh3-128: {found}, expected {record.xxh3_128}")
    return data


def _write_shard(plan: ExportPlan, shard: PlannedShard, coders: Coders, progress: Progress) -> None:
    """Put a shard in place, whole or not at all; `BloomdeskError` if the part is damaged or the disk fails."""
    path, header = plan.destination / shard.file, shard.record.header
    with disk_errors(path), atomic_file(path) as file, ExitStack() as stack:
        readers = [stack.enter_context(_opened(source, coders)) for source in shard.sources]
        behind = stack.enter_context(WriteBehind(file.fileno()))
        behind.write(header)
        done = len(header)
        for index, tensor in enumerate(shard.record.tensors):
            whole = xxhash.xxh3_128()
            # Every slice has the vectors.
            having = readers if len(tensor.shape) == 2 else readers[:1]
            for source, reader in zip(shard.sources, having, strict=False):
                for block in _sound_bits(source, reader, index):
                    behind.write(block)
                    whole.update(block)
                    done += len(block)
                    progress(shard.file, done, shard.record.size)
                # The last block is the reader's, who is not asked again before another one is.
                behind.wait()
            if whole.hexdigest() != tensor.xxh3_128:
                raise BloomdeskError(
                    f"{path}: the slices of {tensor.name} are sound, and together they are another matrix",
                    "see which does not belong to the others: bloomdesk info",
                )


def _opened(source: PartSource, coders: Coders) -> PartReader:
    with _damage_of(source):
        return PartReader(source.path, source.tensors, coders)


def _sound_bits(source: PartSource, reader: PartReader, index: int) -> Iterator[Block]:
    """The bytes of a tensor; `BloomdeskError`, at the end, if they are not the recorded ones."""
    with _damage_of(source):
        tensor, own = source.tensors[index].tensor, xxhash.xxh3_128()
        yield from hashed(reader.bits(index), own)
        if own.hexdigest() != tensor.xxh3_128:
            found, expected = own.hexdigest(), tensor.xxh3_128
            raise DamagedTensor(f"{tensor.name} has the xxh3-128 {found}, expected {expected}")


@contextmanager
def _damage_of(source: PartSource) -> Iterator[None]:
    try:
        yield
    except DamagedTensor as error:
        raise _damaged(source.path.parent, source.path.name, str(error)) from error


def _damaged(directory: Path, file: str, what: str) -> BloomdeskError:
    return BloomdeskError(
        f"{directory / file} is damaged and was not exported: {what}",
        f"bloomdesk repair {in_shell(directory)}, then the same command again: finished shards are kept",
    )
