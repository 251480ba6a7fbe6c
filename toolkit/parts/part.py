"""One part of a prepared directory: planned, gathered from source shards, written, hashed and in place.

Tensors go from file to file in pieces, so memory stays small at any size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import CODED_DTYPE, LOSSLESS, PLAIN, part_header
from runner.format.layout import PartSpec
from runner.format.manifest import PartRecord, SourceShard, TensorRecord
from runner.format.safetensors import open_regular, tensor_nbytes
from runner.system.atomic import atomic_file
from toolkit.io.disk import disk_errors
from toolkit.io.progress import Progress
from toolkit.io.writer import WriteBehind
from toolkit.parts.coded_part import write_coded
from toolkit.source.shards import SourceTensor
from toolkit.source.tensor_reader import TensorReader, ranges_of

# Of a matrix's bytes, before it is coded; those of trained and of normal weights leave 0.67 to 0.70.
CODED_SHARE = 0.72


@dataclass(frozen=True)
class PlannedPart:
    """A part to write: where its tensors are, in the order of `spec`, and in which form it stores them."""

    spec: PartSpec
    tensors: tuple[SourceTensor, ...]
    form: str = PLAIN

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype

    @property
    def size(self) -> int:
        """Bytes of the file; where tensors are coded, what they will hardly exceed."""
        return part_size(self.spec, self.dtype, self.form)

    @property
    def work(self) -> int:
        """Bytes that its progress counts."""
        return part_work(self.spec, self.dtype, self.form)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The shards that its bytes come from, in the order in which they are needed."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors))


def plan_part(
    spec: PartSpec,
    dtype: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, SourceTensor],
    form: str = PLAIN,
) -> PlannedPart:
    """The part that `spec` describes, from source `tensors` whose keys `keys` gives for each name in the part.

    Raises `BloomdeskError` where a tensor has another shape than the model calls for, or can't be coded.
    """
    check_form_dtype(dtype, form)
    chosen = tuple(tensors[keys[name]] for name in spec.tensors)
    for tensor, expected in zip(chosen, spec.tensors.values(), strict=True):
        check_shape(tensor, expected)
    return PlannedPart(spec, chosen, form)


def part_size(spec: PartSpec, dtype: str, form: str = PLAIN) -> int:
    """Bytes of a part's file; where tensors are coded, what they will hardly exceed."""
    decoded = spec.decoded(form)
    coded = {name: int(CODED_SHARE * tensor_nbytes(of, shape)) for name, of, shape in decoded}
    stored = spec.stored(dtype, coded)
    return len(part_header(stored, decoded)) + sum(tensor_nbytes(of, shape) for _, of, shape in stored)


def part_work(spec: PartSpec, dtype: str, form: str) -> int:
    """Bytes that progress counts when a part is made: those of the file or, where they are coded, of the source."""
    return spec.nbytes(dtype) if spec.decoded(form) else part_size(spec, dtype, form)


def check_form_dtype(dtype: str, form: str) -> None:
    """Raise `BloomdeskError` where tensors of `dtype` have no lossless form."""
    if form == LOSSLESS and dtype != CODED_DTYPE:
        share = {"F16": "0.85", "F32": "0.83"}[dtype]
        raise BloomdeskError(
            f"the weights are {dtype}, and only {CODED_DTYPE} has a lossless form: coding the exponents of {dtype} "
            f"would leave {share} of the bytes at best, against 0.67",
            "run the same command without --lossless",
        )


def check_shape(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    """Raise `BloomdeskError` where the tensor's shape is not `shape`."""
    if tensor.shape != shape:
        found, expected = list(tensor.shape), list(shape)
        raise BloomdeskError(
            f"{tensor.file}: {tensor.key} has shape {found}, config.json makes it {expected}"
        )


def write_part(
    part: PlannedPart, destination: Path, sha256: Callable[[Path], SourceShard], progress: Progress
) -> PartRecord:
    """Put a part in place in `destination`, whole or not at all; what the manifest says of it.

    `sha256` gives a source shard's checked hash and raises where it is wrong; it is asked once the bytes are
    written, before the part is in place. Raises `BloomdeskError` where a shard or the disk fails, or coded tensors
    do not read back from the disk as the very bits of the source.
    """
    path = destination / part.spec.file
    write = write_coded if part.spec.decoded(part.form) else _write
    with disk_errors(path), atomic_file(path) as file:
        record = write(part, file, progress)
        file.flush()
        os.fsync(file.fileno())  # shards may still be hashed meanwhile
        sources = tuple(sha256(shard) for shard in part.sources)
    return replace(record, sources=sources)


def _write(part: PlannedPart, file: BinaryIO, progress: Progress) -> PartRecord:
    """All bytes of a plain part, gathered and hashed as they go by."""
    header = part_header(part.spec.stored(part.dtype, {}))
    whole = xxhash.xxh3_128(header)
    records = []
    ranges = [each for tensor in part.tensors for each in ranges_of(tensor)]
    with TensorReader(ranges) as reader, WriteBehind(file.fileno()) as behind:
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


def is_in_place(path: Path, header: bytes, size: int) -> bool:
    """Whether the file at `path` begins with `header` and has `size` bytes."""
    try:
        with open_regular(path) as file:
            return file.read(len(header)) == header and file.seek(0, os.SEEK_END) == size
    except OSError:
        return False


def check_lm_head(lm_head: SourceTensor, embedding: SourceTensor) -> None:
    """Raise `BloomdeskError` where the two differ: the runner's head is the embedding, and another would be lost."""
    with TensorReader(ranges_of(lm_head)) as ours, TensorReader(ranges_of(embedding)) as theirs:
        for left, right in zip(ours.blocks(0), theirs.blocks(0), strict=True):
            if left != right:
                raise BloomdeskError(
                    f"{lm_head.file}: {lm_head.key} differs from the embedding, "
                    "and only models whose head is the embedding can be run"
                )
