"""One part of a prepared directory, planned: its tensors, its size, and the checks before it is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.coded import CODED_DTYPE, LOSSLESS, PLAIN
from runner.format.layout import PartSpec, part_header
from runner.format.part_record import PartRecord, SourceShard, TensorRecord
from runner.format.safetensors import open_regular, tensor_nbytes
from toolkit.io.disk import read_errors
from toolkit.io.reader import NO_FILE, retried
from toolkit.source.tensor import SourceTensor

# Of a matrix's bytes, before it is coded; those of trained and of normal weights leave 0.67 to 0.70.
CODED_SHARE = 0.72


@dataclass(frozen=True)
class PlannedPart:
    """A part to write: its source tensors in the order of `spec`, and the form in which it stores them.

    `lm_head` is the source's second copy of the embedding, if there is one, which must equal the first. `hashes` are
    the xxh3-128 of source tensors, by key, that a record of the source vouches for. `made_from` are the shards of the
    part of a prepared directory that it is made from, else None. If that is in fewer bits, and `cut` into slices as it
    is, this is its record, and `tensors` are those that it stores. It `is_sliced` if `spec` and `tensors` have the
    rows of one slice alone; `wholes` are then the records of the whole matrices, if these are known.
    """

    spec: PartSpec
    tensors: tuple[SourceTensor, ...]
    form: str = PLAIN
    lm_head: SourceTensor | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    made_from: tuple[SourceShard, ...] | None = None
    cut: PartRecord | None = None
    is_sliced: bool = False
    wholes: tuple[TensorRecord, ...] = ()

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype if self.cut is None else self.cut.decoded[0].dtype

    @property
    def named(self) -> tuple[tuple[str, SourceTensor], ...]:
        """The source tensors with their names in the part, in order."""
        return tuple(zip(self.spec.tensors, self.tensors, strict=True))

    @property
    def size(self) -> int:
        """Bytes of the file, or the expected most if tensors are coded."""
        return part_size(self.spec, self.dtype, self.form)

    @property
    def work(self) -> int:
        """Bytes that its progress counts."""
        return part_work(self.spec, self.dtype, self.form)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The shards that its bytes come from, in the order in which they are needed."""
        heads = (self.lm_head,) if self.lm_head is not None else ()
        return tuple(dict.fromkeys(file for tensor in (*self.tensors, *heads) for file in tensor.files))


def plan_part(
    spec: PartSpec,
    dtype: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, SourceTensor],
    form: str = PLAIN,
) -> PlannedPart:
    """The part that `spec` describes, from source `tensors` whose keys `keys` gives for each name in the part.

    Raises `BloomdeskError` if a tensor has another shape than the model calls for, or can't be coded.
    """
    check_form_dtype(dtype, form)
    chosen = tuple(tensors[keys[name]] for name in spec.tensors)
    for tensor, expected in zip(chosen, spec.tensors.values(), strict=True):
        check_shape(tensor, expected)
    return PlannedPart(spec, chosen, form)


def part_size(spec: PartSpec, dtype: str, form: str = PLAIN) -> int:
    """Bytes of a part's file, or the expected most if tensors are coded."""
    decoded = spec.decoded(form, dtype)
    coded = {name: int(CODED_SHARE * tensor_nbytes(of, shape)) for name, of, shape in decoded}
    stored = spec.stored(dtype, coded, form)
    return len(part_header(stored, decoded)) + sum(tensor_nbytes(of, shape) for _, of, shape in stored)


def part_work(spec: PartSpec, dtype: str, form: str) -> int:
    """Bytes that progress counts while a part is made: of the file or, if tensors are coded, of the source."""
    return spec.nbytes(dtype) if spec.decoded(form) else part_size(spec, dtype, form)


def check_form_dtype(dtype: str, form: str) -> None:
    """Raise `BloomdeskError` if tensors of `dtype` have no lossless form."""
    if form == LOSSLESS and dtype != CODED_DTYPE:
        share = {"F16": "0.85", "F32": "0.83"}[dtype]
        raise BloomdeskError(
            f"the weights are {dtype}, and only {CODED_DTYPE} has a lossless form: coding the exponents of {dtype} "
            f"would leave {share} of the bytes at best, against 0.67",
            "run the same command with another --form: plain, int8 or int4",
        )


def check_shape(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    """Raise `BloomdeskError` if the tensor's shape is not `shape`."""
    if tensor.shape != shape:
        rows = tensor.shape[0] if tensor.shape else 0
        if len(tensor.shape) == 2 and tensor.shape[1:] == shape[1:] and "word_embeddings" in tensor.key:
            raise BloomdeskError(
                f"{tensor.file}: {tensor.key} has {rows:,} rows, and config.json's vocab_size is {shape[0]:,}",
                f'if the weights are right, config.json must say: "vocab_size": {rows},',
            )
        found, expected = list(tensor.shape), list(shape)
        raise BloomdeskError(
            f"{tensor.file}: {tensor.key} has shape {found}, config.json makes it {expected}"
        )


def is_in_place(path: Path, header: bytes, size: int) -> bool:
    """True if the file at `path` begins with `header` and has `size` bytes; `BloomdeskError` if it can't be read."""

    def look() -> bool:
        with open_regular(path) as file:
            return file.read(len(header)) == header and file.seek(0, os.SEEK_END) == size

    with read_errors(path):
        try:
            return retried(look)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            return False
