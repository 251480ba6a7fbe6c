"""A part whose matrices are stored in another form: written, read back from the disk and compared.

    rows of the source ──> threads encode ──> files ──> fsync ──> read back ──> threads decode ──> as recorded?

Some sizes are known last, so the header is written last, into space left for it. How a matrix is stored is said by
lossless_matrices.py and quantised_matrices.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import xxhash

from runner.errors import BloomdeskError
from runner.format.layout import part_header
from runner.format.part_record import PartRecord, TensorRecord
from toolkit.io.progress import Progress
from toolkit.io.reader import ByteRange, ReadAhead
from toolkit.io.writer import drop_cached
from toolkit.parts.part import PlannedPart
from toolkit.parts.part_output import Output, OutputFile, Segment, Whole, segments
from toolkit.parts.row_groups import CHUNK, IN_PROGRESS, Block, Coders, chunk_nbytes
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import Span, TensorReader, row_spans, spans_of


@dataclass
class Written:
    """A part on its way to a file: what is recorded of its tensors, and by position what is written last."""

    file: OutputFile
    tensors: list[TensorRecord] = field(default_factory=list)
    decoded: list[TensorRecord] = field(default_factory=list)
    originals: list[TensorRecord] = field(default_factory=list)
    wholes: list[TensorRecord] = field(default_factory=list)
    whole_originals: list[TensorRecord] = field(default_factory=list)
    late: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Rows of the source's matrix `tensor`, as `chunks` that update the hashes of the `whole` when they are taken."""

    tensor: SourceTensor
    count: int
    chunks: Iterator[Block]
    whole: Whole

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.tensor.shape[1]


class Matrices(Protocol):
    """How the matrices of one part are stored in one file."""

    def write(self, name: str, rows: Rows, written: Written) -> None:
        """Write and record these rows of the matrix `name`. Raises `BloomdeskError` if it has no such form."""

    def pass_over(self, name: str, rows: Rows) -> None:
        """Hash rows that are in no file; raises what `write` raises."""

    def sizes(self, stored: TensorRecord, decoded: TensorRecord) -> list[int]:
        """Bytes of the blocks in which a written matrix is read back."""

    def decode(self, decoded: TensorRecord, blocks: Iterator[Block]) -> Iterator[Block]:
        """What the blocks of `sizes` decode to, in order, and no more. `ValueError` if they are damaged."""


def write_coded(
    part: PlannedPart,
    files: Sequence[OutputFile],
    progress: Progress,
    matrices_of: Callable[[PlannedPart, Coders], Matrices],
) -> list[PartRecord]:
    """All bytes of a part that has matrices, in `files`, synced and proven; what there is to record but the sources.

    Memory is some tens of megabytes, and what `matrices_of` keeps. Raises `BloomdeskError` if a shard can't be read, a
    matrix has no such form, or what is read back from the disk is not what was written.
    """
    seen = Halves(progress, part.spec.file, part.work)
    with Coders() as coders:
        matrices = [matrices_of(part, coders) for _ in files]
        records = _write(part, files, matrices, seen)
        return [_proven(*each, seen) for each in zip(files, records, matrices, strict=True)]


def _proven(file: OutputFile, record: PartRecord, matrices: Matrices, seen: Halves) -> PartRecord:
    """The record with the file's hash, after all of it was read back and compared."""
    drop_cached(file.file.fileno())
    try:
        whole = _read_back(file, record, matrices, seen)
    except (OSError, EOFError, ValueError) as error:
        raise BloomdeskError(
            f"{record.file} does not read back from the disk as it should: {error}",
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


def _write(
    part: PlannedPart, files: Sequence[OutputFile], matrices: Sequence[Matrices], seen: Halves
) -> list[PartRecord]:
    """The records of the part, written to `files`, but for sources and the files' hashes."""
    outputs = [file.output for file in files]
    planned = [_plan(name, tensor, part, outputs) for name, tensor in part.named]
    spans = [each for tensor in planned for _, chunks in tensor for each in chunks]
    with TensorReader(spans, held=IN_PROGRESS) as reader:
        written = [Written(file) for file in files]
        for each in written:
            each.file.write(bytes(_room(part, each.file.output)))
        read = _seen(reader, seen)
        for (name, tensor), of_tensor in zip(part.named, planned, strict=True):
            if name in part.spec.matrices:
                _write_matrix(name, tensor, of_tensor, read, matrices, written, seen)
            else:
                _write_vector(name, tensor, islice(read, len(of_tensor[0][1])), written)
        return [_finish(part, each) for each in written]


def _plan(
    name: str, tensor: SourceTensor, part: PlannedPart, outputs: Sequence[Output]
) -> list[tuple[Segment, list[Span]]]:
    """The segments of a tensor, and what is read of each at a time; a vector is one."""
    if name not in part.spec.matrices:
        return [(Segment(range(0)), spans_of(tensor, CHUNK))]
    step = chunk_nbytes(tensor.shape[1])
    found = segments(name, tensor.shape[0], outputs)
    return [(segment, row_spans(tensor, segment.rows, step)) for segment in found]


def _room(part: PlannedPart, output: Output) -> int:
    """Bytes of the header, whatever sizes the matrices will have."""
    spec = output.spec
    any_sizes = dict.fromkeys(spec.matrices, 0)
    return len(
        part_header(spec.stored(part.dtype, any_sizes, part.form), spec.decoded(part.form, part.dtype))
    )


def _finish(part: PlannedPart, written: Written) -> PartRecord:
    """The record of what is now on the disk, its header too."""
    kinds = written.decoded, written.originals, written.wholes, written.whole_originals
    tensors, size = tuple(written.tensors), written.file.position
    record = PartRecord(part.spec.file, size, "", tensors, (), *map(tuple, kinds))
    written.file.finish({**written.late, 0: record.header})
    return record


def _seen(reader: TensorReader, seen: Halves) -> Iterator[Block]:
    for index in range(len(reader.spans)):
        chunk = reader.whole(index)
        seen(len(chunk))
        yield chunk


def _write_matrix(
    name: str,
    tensor: SourceTensor,
    planned: Sequence[tuple[Segment, list[Span]]],
    read: Iterator[Block],
    matrices: Sequence[Matrices],
    written: Sequence[Written],
    seen: Halves,
) -> None:
    whole = Whole()
    for segment, chunks in planned:
        rows = Rows(tensor, len(segment.rows), islice(read, len(chunks)), whole)
        if segment.index is not None:
            matrices[segment.index].write(name, rows, written[segment.index])
            continue
        matrices[0].pass_over(name, rows)
        # Nothing of them is read back.
        seen(sum(each.nbytes for each in chunks))
    for each in written:
        if each.file.output.is_slice:
            decoded, original = whole.records(name, tensor.dtype, tensor.shape)
            each.wholes.append(decoded)
            each.whole_originals += [original] if each.originals else []


def _write_vector(
    name: str, tensor: SourceTensor, chunks: Iterator[Block], written: Sequence[Written]
) -> None:
    own = xxhash.xxh3_128()
    for chunk in hashed(chunks, own):
        for each in written:
            each.file.write(chunk)
    for each in written:
        each.file.wait()
        each.tensors.append(TensorRecord(name, tensor.dtype, tensor.shape, own.hexdigest()))


def _read_back(file: OutputFile, record: PartRecord, matrices: Matrices, seen: Halves) -> str:
    """The xxh3-128 of the file, every stored and every decoded tensor of which is as `record` says.

    Raises `ValueError` if one is not, and `OSError` or `EOFError` if the file can't be read.
    """
    path, decoded = file.place, {tensor.name: tensor for tensor in record.decoded}
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
                # What stands beside a matrix is no tensor of the source, and each slice has the vectors.
                is_counted = tensor.name in file.output.spec.tensors and file.output.is_first
                seen(tensor.nbytes if is_counted else 0)
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


def hashed(blocks: Iterable[Block], *digests: xxhash.xxh3_128) -> Iterator[Block]:
    """The same blocks, each of which updates all `digests` when it is taken."""
    for block in blocks:
        for digest in digests:
            digest.update(block)
        yield block


def compare_tensor(tensor: TensorRecord, found: str) -> None:
    """Raise `ValueError` if the hash of the tensor's bytes is not the recorded one."""
    if found != tensor.xxh3_128:
        kind = "decodes to" if len(tensor.shape) == 2 else "has"
        raise ValueError(f"{tensor.name} {kind} the xxh3-128 {found}, expected {tensor.xxh3_128}")
