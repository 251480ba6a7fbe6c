"""One part, gathered from source shards, written, hashed, and renamed into place.

    shards ──> read ahead ──> hashed ──> written behind ──> fsync ──> source hashes right? ──> as recorded? ──> rename

Memory is a few blocks at any size of tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.layout import part_header
from runner.format.manifest import PartRecord, SourceShard, TensorRecord
from runner.format.quantised import QUANTISED_FORMS
from runner.system.atomic import atomic_file
from toolkit.io.disk import disk_errors
from toolkit.io.progress import Progress
from toolkit.io.writer import WriteBehind
from toolkit.parts.coded_part import write_coded
from toolkit.parts.destination import foreign_file
from toolkit.parts.export_record import not_as_exported
from toolkit.parts.lossless_matrices import LosslessMatrices
from toolkit.parts.part import PlannedPart
from toolkit.parts.prepared_tensors import damaged_part
from toolkit.parts.quantised_matrices import QuantisedMatrices
from toolkit.parts.release import file_hash, read_back
from toolkit.source.key_map import LM_HEADS
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import TensorReader, slices_of


def write_part(
    part: PlannedPart,
    destination: Path,
    sha256: Callable[[Path], SourceShard],
    progress: Progress,
    known: PartRecord | None = None,
    make_way: Callable[[Path], object] = lambda path: None,
) -> PartRecord:
    """The manifest's record of a part, written into `destination` whole or not at all.

    `sha256` gives a source shard's checked hash and raises if it is wrong; it is called once the bytes are
    written, before the rename. `known` is the record of a part that is made again; what has its name then is given to
    `make_way`, right before it is replaced. Raises `BloomdeskError` if a shard
    or the disk fails, coded tensors do not read back from the disk as the bits of the source, the source's tensors are
    not the recorded ones, or a file that nobody recorded is in the way.
    """
    path = destination / part.spec.file
    is_plain = part.form == PLAIN or not part.spec.matrices
    matrices_of = QuantisedMatrices if part.form in QUANTISED_FORMS else LosslessMatrices
    with disk_errors(path), atomic_file(path) as file:
        record = _write(part, file, progress) if is_plain else write_coded(part, file, progress, matrices_of)
        file.flush()
        # Shards may still be hashed meanwhile.
        os.fsync(file.fileno())
        sources = part.made_from
        if sources is None:
            sources = tuple(sha256(shard) for shard in part.sources)
        record = replace(record, sources=sources)
        if known is None:
            _check_hashes(part, record)
        else:
            # With equal hashes, the tensors are also those of the shards that were recorded first.
            check_tensors(part, record, known)
            record = replace(record, sources=known.sources)
        if os.path.lexists(path):
            _check_replacement(path, Path(file.name), record, recorded=known is not None)
            if known is not None:
                make_way(path)
    return record


def check_tensors(part: PlannedPart, made: PartRecord, known: PartRecord) -> None:
    """Raise `BloomdeskError` if `part` was made from other tensors than are recorded."""
    for tensor, found, expected in zip(part.tensors, made.source_tensors, known.source_tensors, strict=True):
        if found != expected:
            raise BloomdeskError(
                f"{tensor.file}: {tensor.key} is not what {part.spec.file} was made from: "
                f"its xxh3-128 is {found.xxh3_128}, expected {expected.xxh3_128}",
                "give the checkpoint that the directory was made from, and the --adapter if one was merged; "
                "if these are given, a shard is damaged",
            )


def _check_hashes(part: PlannedPart, made: PartRecord) -> None:
    """Raise `BloomdeskError` if a tensor that went in with its own bits is not the one that the source vouches for."""
    for tensor, found in zip(part.tensors, made.source_tensors, strict=True):
        is_copied = tensor.stored == tensor.dtype and tensor.addition is None
        if is_copied and part.hashes.get(tensor.key, found.xxh3_128) != found.xxh3_128:
            if part.made_from is not None:
                raise damaged_part(tensor.file, f"{tensor.key} is not what the manifest records")
            raise not_as_exported(tensor.file, tensor.key)


def _check_replacement(path: Path, temporary: Path, record: PartRecord, *, recorded: bool) -> None:
    """Before `temporary` replaces the file at `path`: that is ours, and the new one has reached the disk."""
    if recorded:
        read_back(temporary, record.xxh3_128, f"{path} is as it was: run the same command again")
    elif file_hash(path) != record.xxh3_128:
        raise foreign_file(path)


def _write(part: PlannedPart, file: BinaryIO, progress: Progress) -> PartRecord:
    """The record of a plain part, its bytes gathered, hashed and written to `file`."""
    header = part_header(part.spec.stored(part.dtype, {}))
    whole = xxhash.xxh3_128(header)
    records = []
    slices = [each for tensor in part.tensors for each in slices_of(tensor)]
    with TensorReader(slices) as reader, WriteBehind(file.fileno()) as behind:
        behind.write(header)
        done = len(header)
        for index, (name, shape) in enumerate(part.spec.tensors.items()):
            tensor, own = part.tensors[index], xxhash.xxh3_128()
            for block in reader.blocks(index):
                behind.write(block)
                own.update(block)
                whole.update(block)
                done += len(block)
                progress(part.spec.file, done, part.size)
            records.append(TensorRecord(name, tensor.dtype, shape, own.hexdigest()))
    return PartRecord(part.spec.file, part.size, whole.hexdigest(), tuple(records), ())


class UntiedHead(BloomdeskError):
    """The source's head is not its embedding, and nothing said so before."""


def check_lm_head(lm_head: SourceTensor, embedding: SourceTensor) -> None:
    """Raise `UntiedHead` if the two differ: the head is planned to be the embedding, and another would be lost."""
    with TensorReader(slices_of(lm_head)) as ours, TensorReader(slices_of(embedding)) as theirs:
        for left, right in zip(ours.blocks(0), theirs.blocks(0), strict=True):
            if left != right:
                if not lm_head.key.endswith(LM_HEADS[0]):
                    raise BloomdeskError(f"{lm_head.file}: {lm_head.key} differs from the embedding")
                raise UntiedHead(
                    f"{lm_head.file}: {lm_head.key} differs from the embedding, and config.json does not say "
                    "tie_word_embeddings: false",
                    "fetch it with bloomdesk download, then run bloomdesk convert, which makes it a part of its own",
                )
