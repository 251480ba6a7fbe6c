"""A part of a lossless directory: its matrices coded, written, read back from the disk and compared.

    rows of the source ──> threads encode ──> file ──> fsync ──> read back ──> threads decode ──> the same bits?

Sizes are known last, so the header and the offsets of the row groups are written last, into space left for them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import BinaryIO

import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import ROW_GROUPS_SUFFIX, read_row_groups, row_group_count
from runner.format.layout import part_header
from runner.format.manifest import PartRecord, TensorRecord
from toolkit.io.progress import Progress
from toolkit.io.reader import ByteRange, ReadAhead
from toolkit.io.writer import WriteBehind, drop_cached
from toolkit.parts.part import PlannedPart
from toolkit.parts.row_groups import (
    CHUNK,
    IN_PROGRESS,
    Block,
    Coders,
    RowGroups,
    batches_of_row_groups,
    chunk_nbytes,
)
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import TensorReader, slices_of


def write_coded(part: PlannedPart, file: BinaryIO, progress: Progress) -> PartRecord:
    """All bytes of a part that has matrices, in `file`, synced and proven; what there is to record but the sources.

    Memory is some tens of megabytes. Raises `BloomdeskError` if a shard can't be read, or what is read back from
    the disk is not what was written or does not decode to the bits of the source.
    """
    seen = Halves(progress, part.spec.file, part.work)
    with Coders() as coders:
        record, tables = _Writer(part, file, coders, seen).write()
        file.flush()
        os.fsync(file.fileno())
        drop_cached(file.fileno())
        try:
            whole = _read_back(Path(file.name), record, tables, coders, seen)
        except (OSError, EOFError, ValueError) as error:
            raise BloomdeskError(
                f"{part.spec.file} does not read back from the disk as the bits of its source: {error}",
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


class _Writer:
    """Writes one part: first with room for what is known last, then that."""

    def __init__(
        self, part: PlannedPart, file: BinaryIO, coders: Coders, seen: Callable[[int], None]
    ) -> None:
        self._part, self._file, self._coders, self._seen = part, file, coders, seen
        self._tensors: list[TensorRecord] = []
        self._decoded: list[TensorRecord] = []
        self._tables: dict[str, bytes] = {}
        self._late: dict[int, bytes] = {}  # by position

    def write(self) -> tuple[PartRecord, Mapping[str, bytes]]:
        """The record but for sources and the file's hash, and the bytes of each NAME.strips by NAME."""
        part = self._part
        any_sizes = dict.fromkeys(part.spec.matrices, 0)
        room = len(part_header(part.spec.stored(part.dtype, any_sizes), part.spec.decoded(part.form)))
        named = list(zip(part.spec.tensors, part.tensors, strict=True))
        steps = [chunk_nbytes(of.shape[1]) if name in part.spec.matrices else CHUNK for name, of in named]
        chunked = [slices_of(tensor, step) for (_, tensor), step in zip(named, steps, strict=True)]
        slices = [each for chunks in chunked for each in chunks]
        with TensorReader(slices, held=IN_PROGRESS) as reader, WriteBehind(self._file.fileno()) as behind:
            behind.write(bytes(room))
            read = self._read(reader)
            for (name, tensor), chunks in zip(named, chunked, strict=True):
                write = self._matrix if name in part.spec.matrices else self._vector
                write(name, tensor, islice(read, len(chunks)), behind)
            behind.wait()
            size = behind.position
        record = PartRecord(part.spec.file, size, "", tuple(self._tensors), (), tuple(self._decoded))
        for start, data in {**self._late, 0: record.header}.items():
            self._file.seek(start)
            self._file.write(data)
        return record, self._tables

    def _read(self, reader: TensorReader) -> Iterator[Block]:
        for index in range(len(reader.slices)):
            chunk = reader.whole(index)
            self._seen(len(chunk))
            yield chunk

    def _vector(self, name: str, tensor: SourceTensor, chunks: Iterator[Block], behind: WriteBehind) -> None:
        own = xxhash.xxh3_128()
        for chunk in hashed(chunks, own):
            behind.write(chunk)
        self._tensors.append(TensorRecord(name, tensor.dtype, tensor.shape, own.hexdigest()))

    def _matrix(self, name: str, tensor: SourceTensor, chunks: Iterator[Block], behind: WriteBehind) -> None:
        rows, columns = tensor.shape
        bits, stored = xxhash.xxh3_128(), xxhash.xxh3_128()
        lengths: list[int] = []

        behind.wait()
        position = behind.position
        behind.write(bytes(8 * (row_group_count(rows) + 1)))
        for coded, of_row_groups in self._coders.encoded(hashed(chunks, bits), columns):
            behind.write(coded)
            stored.update(coded)
            lengths += of_row_groups
        offsets = tuple(accumulate(lengths, initial=0))
        table = struct.pack(f"<{len(offsets)}q", *offsets)
        self._late[position] = self._tables[name] = table
        hash_of_table = xxhash.xxh3_128_hexdigest(table)
        self._tensors.append(TensorRecord(name + ROW_GROUPS_SUFFIX, "I64", (len(offsets),), hash_of_table))
        self._tensors.append(TensorRecord(name, "U8", (offsets[-1],), stored.hexdigest()))
        self._decoded.append(TensorRecord(name, tensor.dtype, tensor.shape, bits.hexdigest()))


def _read_back(
    path: Path,
    record: PartRecord,
    tables: Mapping[str, bytes],
    coders: Coders,
    seen: Callable[[int], None],
) -> str:
    """The xxh3-128 of the file at `path`, every stored and every decoded tensor of which is as `record` says.

    Raises `ValueError` if one is not, and `OSError` or `EOFError` if the file can't be read.
    """
    matrices = {tensor.name: tensor for tensor in record.decoded}
    groups: dict[str, list[RowGroups]] = {}
    ranges, start = [ByteRange(path, 0, len(record.header))], len(record.header)
    for tensor in record.tensors:
        if tensor.name in matrices:
            rows, columns = matrices[tensor.name].shape
            offsets = read_row_groups(tables[tensor.name], rows, columns, tensor.nbytes)
            groups[tensor.name] = batches_of_row_groups(offsets, rows, columns)
            ranges += [ByteRange(path, start + group.start, group.nbytes) for group in groups[tensor.name]]
        else:
            ranges.append(ByteRange(path, start, tensor.nbytes))
        start += tensor.nbytes
    whole = xxhash.xxh3_128()
    with ReadAhead(ranges, held=IN_PROGRESS) as ahead:
        read = hashed(map(ahead.whole, range(len(ranges))), whole)
        if next(read) != record.header:
            raise ValueError("its header is another one")
        for tensor in record.tensors:
            if tensor.name in matrices:
                _compare_matrix(tensor, matrices[tensor.name], groups[tensor.name], read, coders, seen)
            else:
                compare_tensor(tensor, xxhash.xxh3_128_hexdigest(next(read)))
                seen(0 if tensor.dtype == "I64" else tensor.nbytes)
    return whole.hexdigest()


def hashed(blocks: Iterable[Block], digest: xxhash.xxh3_128) -> Iterator[Block]:
    """The same blocks, each of which updates `digest` when it is taken."""
    for block in blocks:
        digest.update(block)
        yield block


def _compare_matrix(
    stored: TensorRecord,
    decoded: TensorRecord,
    groups: list[RowGroups],
    read: Iterator[Block],
    coders: Coders,
    seen: Callable[[int], None],
) -> None:
    own, bits = xxhash.xxh3_128(), xxhash.xxh3_128()
    # `groups` stands first, so that no block after the matrix's last one is taken.
    for rows in coders.decoded(zip(groups, hashed(read, own), strict=False), decoded.shape[1]):
        bits.update(rows)
        seen(len(rows))
    compare_tensor(stored, own.hexdigest())
    compare_tensor(decoded, bits.hexdigest())


def compare_tensor(tensor: TensorRecord, found: str) -> None:
    """Raise `ValueError` if the hash of the tensor's bytes is not the recorded one."""
    if found != tensor.xxh3_128:
        kind = "decodes to" if len(tensor.shape) == 2 else "has"
        raise ValueError(f"{tensor.name} {kind} the xxh3-128 {found}, expected {tensor.xxh3_128}")
