"""A part whose matrices are stored in another form: written, read back from the disk and compared.

    rows of the source ──> threads encode ──> file ──> fsync ──> read back ──> threads decode ──> as recorded?

Some sizes are known last, so the header is written last, into space left for it. How a matrix is stored is said by
lossless_matrices.py and quantised_matrices.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import xxhash

from runner.errors import BloomdeskError
from runner.format.layout import part_header
from runner.format.manifest import PartRecord, TensorRecord
from toolkit.io.progress import Progress
from toolkit.io.reader import ByteRange, ReadAhead
from toolkit.io.writer import WriteBehind, drop_cached
from toolkit.parts.part import PlannedPart
from toolkit.parts.row_groups import CHUNK, IN_PROGRESS, Block, Coders, chunk_nbytes
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import TensorReader, slices_of


@dataclass
class Written:
    """A part on its way to the file: what is recorded of its tensors, and by position what is written last."""

    behind: WriteBehind
    tensors: list[TensorRecord] = field(default_factory=list)
    decoded: list[TensorRecord] = field(default_factory=list)
    originals: list[TensorRecord] = field(default_factory=list)
    late: dict[int, bytes] = field(default_factory=dict)


class Matrices(Protocol):
    """How the matrices of one part are stored."""

    def write(self, name: str, tensor: SourceTensor, chunks: Iterator[Block], written: Written) -> None:
        """Write and record the matrix `name`. Raises `BloomdeskError` if it has no such form."""

    def sizes(self, stored: TensorRecord, decoded: TensorRecord) -> list[int]:
        """Bytes of the blocks in which a written matrix is read back."""

    def decode(self, decoded: TensorRecord, blocks: Iterator[Block]) -> Iterator[Block]:
        """What the blocks of `sizes` decode to, in order, and no more. `ValueError` if they are damaged."""


def write_coded(
    part: PlannedPart,
    file: BinaryIO,
    progress: Progress,
    matrices_of: Callable[[PlannedPart, Coders], Matrices],
) -> PartRecord:
    """All bytes of a part that has matrices, in `file`, synced and proven; what there is to record but the sources.

    Memory is some tens of megabytes, and what `matrices_of` keeps. Raises `BloomdeskError` if a shard can't be read, a
    matrix has no such form, or what is read back from the disk is not what was written.
    """
    seen = Halves(progress, part.spec.file, part.work)
    with Coders() as coders:
        matrices = matrices_of(part, coders)
        record = _write(part, file, matrices, seen)
        file.flush()
        os.fsync(file.fileno())
        drop_cached(file.fileno())
        try:
            whole = _read_back(Path(file.name), part, record, matrices, seen)
        except (OSError, EOFError, ValueError) as error:
            raise BloomdeskError(
                f"{part.spec.file} does not read back from the disk as it should: {error}",
                "check the disk and the memory of this machine; the source is as it was: run the same command again",
            ) from error
    return replace(record, xxh3_128=whole)


class Halves:
    """Progress in bytes of the source, each of which counts half when it is coded, and half when it is compared."""

    def __init__(self, progress: Progress, file: str, total: int) -> None:
        self._progress, self._file, self._total = progress, file, total
        self._done = 0

    def __call__(self, count: int) -> None:
        self._done += count
        self._progress(self._file, self._done // 2, self._total)


def _write(part: PlannedPart, file: BinaryIO, matrices: Matrices, seen: Halves) -> PartRecord:
    """The record of the part, written to `file`, but for sources and the file's hash."""
    spec = part.spec
    any_sizes = dict.fromkeys(spec.matrices, 0)
    room = len(
        part_header(spec.stored(part.dtype, any_sizes, part.form), spec.decoded(part.form, part.dtype))
    )
    named = list(zip(spec.tensors, part.tensors, strict=True))
    steps = [chunk_nbytes(of.shape[1]) if name in spec.matrices else CHUNK for name, of in named]
    chunked = [slices_of(tensor, step) for (_, tensor), step in zip(named, steps, strict=True)]
    slices = [each for chunks in chunked for each in chunks]
    with TensorReader(slices, held=IN_PROGRESS) as reader, WriteBehind(file.fileno()) as behind:
        written = Written(behind)
        behind.write(bytes(room))
        read = _seen(reader, seen)
        for (name, tensor), chunks in zip(named, chunked, strict=True):
            write = matrices.write if name in spec.matrices else _write_vector
            write(name, tensor, islice(read, len(chunks)), written)
        behind.wait()
        size = behind.position
    tensors, decoded, originals = map(tuple, (written.tensors, written.decoded, written.originals))
    record = PartRecord(spec.file, size, "", tensors, (), decoded, originals)
    for start, data in {**written.late, 0: record.header}.items():
        file.seek(start)
        file.write(data)
    return record


def _seen(reader: TensorReader, seen: Halves) -> Iterator[Block]:
    for index in range(len(reader.slices)):
        chunk = reader.whole(index)
        seen(len(chunk))
        yield chunk


def _write_vector(name: str, tensor: SourceTensor, chunks: Iterator[Block], written: Written) -> None:
    own = xxhash.xxh3_128()
    for chunk in hashed(chunks, own):
        written.behind.write(chunk)
    written.tensors.append(TensorRecord(name, tensor.dtype, tensor.shape, own.hexdigest()))


def _read_back(path: Path, part: PlannedPart, record: PartRecord, matrices: Matrices, seen: Halves) -> str:
    """The xxh3-128 of the file at `path`, every stored and every decoded tensor of which is as `record` says.

    Raises `ValueError` if one is not, and `OSError` or `EOFError` if the file can't be read.
    """
    decoded = {tensor.name: tensor for tensor in record.decoded}
    ranges, start = [ByteRange(path, 0, len(record.header))], len(record.header)
    for tensor in record.tensors:
        is_matrix = tensor.name in decoded
        for size in matrices.sizes(tensor, decoded[tensor.name]) if is_matrix else [tensor.nbytes]:
            ranges.append(ByteRange(path, start, size))
            start += size
    whole = xxhash.xxh3_128()
    with ReadAhead(ranges, held=IN_PROGRESS) as ahead:
        read = hashed(map(ahead.whole, range(len(ranges))), whole)
        if next(read) != record.header:
            raise ValueError("its header is another one")
        for tensor in record.tensors:
            if tensor.name in decoded:
                _compare_matrix(tensor, decoded[tensor.name], matrices, read, seen)
            else:
                compare_tensor(tensor, xxhash.xxh3_128_hexdigest(next(read)))
                # What stands beside a matrix is no tensor of the source.
                seen(tensor.nbytes if tensor.name in part.spec.tensors else 0)
    return whole.hexdigest()


def _compare_matrix(
    stored: TensorRecord, decoded: TensorRecord, matrices: Matrices, read: Iterator[Block], seen: Halves
) -> None:
    own, weights = xxhash.xxh3_128(), xxhash.xxh3_128()
    for rows in matrices.decode(decoded, hashed(read, own)):
        weights.update(rows)
        seen(len(rows))
    compare_tensor(stored, own.hexdigest())
    compare_tensor(decoded, weights.hexdigest())


def hashed(blocks: Iterable[Block], digest: xxhash.xxh3_128) -> Iterator[Block]:
    """The same blocks, each of which updates `digest` when it is taken."""
    for block in blocks:
        digest.update(block)
        yield block


def compare_tensor(tensor: TensorRecord, found: str) -> None:
    """Raise `ValueError` if the hash of the tensor's bytes is not the recorded one."""
    if found != tensor.xxh3_128:
        kind = "decodes to" if len(tensor.shape) == 2 else "has"
        raise ValueError(f"{tensor.name} {kind} the xxh3-128 {found}, expected {tensor.xxh3_128}")
