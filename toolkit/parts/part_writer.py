"""One part, gathered from source shards, written, hashed, and renamed into place.

    shards ──> read ahead ──> hashed ──> written behind ──> fsync ──> source hashes right? ──> as recorded? ──> rename

Memory is a few blocks at any size of tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.format.part_record import PartRecord, SourceShard, TensorRecord
from runner.format.quantised import QUANTISED_FORMS
from toolkit.io.progress import Progress
from toolkit.parts.coded_part import write_coded
from toolkit.parts.copied_part import write_cut, write_plain
from toolkit.parts.destination import foreign_file
from toolkit.parts.export_record import not_as_exported
from toolkit.parts.lossless_matrices import LosslessMatrices
from toolkit.parts.part import PlannedPart
from toolkit.parts.part_output import Output, OutputFile, output_files
from toolkit.parts.prepared_tensors import damaged_part
from toolkit.parts.quantised_matrices import QuantisedMatrices
from toolkit.parts.release import file_hash, read_back
from toolkit.source.key_map import LM_HEADS
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import TensorReader, spans_of


def write_part(
    part: PlannedPart,
    outputs: Sequence[Output],
    sha256: Callable[[Path], SourceShard],
    progress: Progress,
) -> list[PartRecord]:
    """The manifests' records of a part, written into each of `outputs` whole or not at all.

    `sha256` gives a source shard's checked hash and raises if it is wrong; it is called once the bytes are
    written, before the rename. Raises `BloomdeskError` if a shard or a disk fails, coded tensors do not read back from
    the disk as the bits of the source, the source's tensors are not the recorded ones, or a file that nobody recorded
    is in the way.
    """
    with output_files(outputs) as files:
        made = _write(part, files, progress)
        sources = part.made_from
        if sources is None:
            sources = tuple(sha256(shard) for shard in part.sources)
        made = [replace(record, sources=sources, wholes=record.wholes or part.wholes) for record in made]
        return [_checked(part, file, record) for file, record in zip(files, made, strict=True)]


def proven_part(part: PlannedPart, record: PartRecord, sha256: Callable[[Path], SourceShard]) -> PartRecord:
    """The record of a part that is there, with its shards' checked hashes: its tensors are theirs.

    Raises `BloomdeskError` if they are not.
    """
    with TensorReader([each for tensor in part.tensors for each in spans_of(tensor)]) as reader:
        for index, (tensor, expected) in enumerate(zip(part.tensors, record.source_rows, strict=True)):
            own = xxhash.xxh3_128()
            for block in reader.blocks(index):
                own.update(block)
            if own.hexdigest() != expected.xxh3_128:
                raise BloomdeskError(
                    f"{record.file} was made from other bytes than {tensor.file.name} has at {tensor.key}: "
                    "they came damaged",
                    f"delete {record.file}, and run the same command again: it makes that part anew",
                )
    return replace(record, sources=tuple(map(sha256, part.sources)), wholes=record.wholes or part.wholes)


def _write(part: PlannedPart, files: Sequence[OutputFile], progress: Progress) -> list[PartRecord]:
    """All bytes of a part in `files`, and what there is to record but the sources."""
    if part.cut is not None:
        return write_cut(part, files, progress)
    if part.form == PLAIN or not part.spec.matrices:
        return write_plain(part, files, progress)
    matrices_of = QuantisedMatrices if part.form in QUANTISED_FORMS else LosslessMatrices
    return write_coded(part, files, progress, matrices_of)


def _checked(part: PlannedPart, file: OutputFile, record: PartRecord) -> PartRecord:
    """The record, after all checks that come before the file gets its name."""
    output = file.output
    if output.known is None:
        # What was cut was compared with its record.
        if part.cut is None:
            _check_hashes(part, record)
    else:
        # With equal hashes, the tensors are also those of the shards that were recorded first.
        check_tensors(part, record, output.known)
        known = output.known
        record = replace(
            record,
            sources=known.sources,
            originals=known.originals,
            wholes=known.wholes,
            whole_originals=known.whole_originals,
        )
    if os.path.lexists(output.path):
        _check_replacement(output.path, file.place, record, recorded=output.known is not None)
        if output.known is not None:
            output.make_way(output.path)
    return record


def check_tensors(part: PlannedPart, made: PartRecord, known: PartRecord) -> None:
    """Raise `BloomdeskError` if `part` was made from other tensors than are recorded."""
    named = part.tensors if part.cut is None else part.tensors[:1] * len(made.source_tensors)
    for tensor, found, expected in zip(named, *comparable(made, known), strict=True):
        if found != expected:
            raise BloomdeskError(
                f"{tensor.file}: {tensor.key} is not what {part.spec.file} was made from: "
                f"its xxh3-128 is {found.xxh3_128}, expected {expected.xxh3_128}",
                "give the checkpoint that the directory was made from, and the --adapter if one was merged; "
                "if these are given, a shard is damaged",
            )


def comparable(one: PartRecord, other: PartRecord) -> tuple[tuple[TensorRecord, ...], ...]:
    """What both were made from, as far as both know it: the whole matrices, or of a slice only its own rows."""
    if bool(one.wholes) == bool(other.wholes):
        return one.source_tensors, other.source_tensors
    if bool(one.originals) == bool(other.originals):
        return one.source_rows, other.source_rows
    return one.weights, other.weights


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


class UntiedHead(BloomdeskError):
    """The source's head is not its embedding, and nothing said so before."""


def check_lm_head(lm_head: SourceTensor, embedding: SourceTensor) -> None:
    """Raise `UntiedHead` if the two differ: the head is planned to be the embedding, and another would be lost."""
    with TensorReader(spans_of(lm_head)) as ours, TensorReader(spans_of(embedding)) as theirs:
        for left, right in zip(ours.blocks(0), theirs.blocks(0), strict=True):
            if left != right:
                if not lm_head.key.endswith(LM_HEADS[0]):
                    raise BloomdeskError(f"{lm_head.file}: {lm_head.key} differs from the embedding")
                raise UntiedHead(
                    f"{lm_head.file}: {lm_head.key} differs from the embedding, and config.json does not say "
                    "tie_word_embeddings: false",
                    "fetch it with bloomdesk download, then run bloomdesk convert, which makes it a part of its own",
                )
