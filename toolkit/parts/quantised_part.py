"""A part of an int8 or int4 directory: its matrices in fewer bits, written, read back from the disk and compared.

    rows of the source ──> threads quantise ──> file ──> fsync ──> read back ──> threads decode ──> the same weights?

Sizes are known beforehand. The scales of a matrix stay in memory until its integers are written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import xxhash

from runner.errors import BloomdeskError
from runner.format.layout import part_header
from runner.format.manifest import PartRecord, TensorRecord
from runner.format.quantised import Coding, coding_of
from toolkit.io.progress import Progress
from toolkit.io.reader import ByteRange, ReadAhead
from toolkit.io.writer import WriteBehind, drop_cached
from toolkit.parts.coded_part import Halves, compare_tensor, hashed
from toolkit.parts.part import PlannedPart
from toolkit.parts.row_groups import (
    CHUNK,
    IN_PROGRESS,
    Block,
    Coders,
    QuantisedRows,
    chunk_nbytes,
    row_batches,
)
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import TensorReader, slices_of


def write_quantised(part: PlannedPart, file: BinaryIO, progress: Progress) -> PartRecord:
    """All bytes of a part that has matrices, in `file`, synced and proven; what there is to record but the sources.

    Memory is that of the scales of one matrix and some tens of megabytes. Raises `BloomdeskError` if a shard can't be
    read, weights are infinite or not numbers, or what is read back from the disk is not what was written.
    """
    seen = Halves(progress, part.spec.file, part.work)
    with Coders() as coders:
        record, scales = _Writer(part, file, coders, seen).write()
        file.flush()
        os.fsync(file.fileno())
        drop_cached(file.fileno())
        try:
            whole = _read_back(Path(file.name), record, scales, coders, seen)
        except (OSError, EOFError, ValueError) as error:
            raise BloomdeskError(
                f"{part.spec.file} does not read back from the disk as it was written: {error}",
                "check the disk and the memory of this machine; the source is as it was: run the same command again",
            ) from error
    return replace(record, xxh3_128=whole)


class _Writer:
    """Writes one part from its first byte to its last."""

    def __init__(
        self, part: PlannedPart, file: BinaryIO, coders: Coders, seen: Callable[[int], None]
    ) -> None:
        self._part, self._file, self._coders, self._seen = part, file, coders, seen
        self._tensors: list[TensorRecord] = []
        self._decoded: list[TensorRecord] = []
        self._originals: list[TensorRecord] = []
        self._scales: dict[str, bytearray] = {}

    def write(self) -> tuple[PartRecord, Mapping[str, bytearray]]:
        """The record but for sources and the file's hash, and the bytes of each NAME.scales by NAME."""
        part = self._part
        stored, decoded = (
            part.spec.stored(part.dtype, {}, part.form),
            part.spec.decoded(part.form, part.dtype),
        )
        named = list(zip(part.spec.tensors, part.tensors, strict=True))
        steps = [chunk_nbytes(of.shape[1]) if name in part.spec.matrices else CHUNK for name, of in named]
        chunked = [slices_of(tensor, step) for (_, tensor), step in zip(named, steps, strict=True)]
        slices = [each for chunks in chunked for each in chunks]
        with TensorReader(slices, held=IN_PROGRESS) as reader, WriteBehind(self._file.fileno()) as behind:
            behind.write(part_header(stored, decoded))
            read = self._read(reader)
            for (name, tensor), chunks in zip(named, chunked, strict=True):
                write = self._matrix if name in part.spec.matrices else self._vector
                write(name, tensor, islice(read, len(chunks)), behind)
            behind.wait()
            size = behind.position
        tensors, decodeds, originals = map(tuple, (self._tensors, self._decoded, self._originals))
        return PartRecord(part.spec.file, size, "", tensors, (), decodeds, originals), self._scales

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
        coding = coding_of(self._part.form, name)
        source, stored, weights = xxhash.xxh3_128(), xxhash.xxh3_128(), xxhash.xxh3_128()
        scales = self._scales[name] = bytearray()
        try:
            for rows in self._coders.quantised(hashed(chunks, source), tensor.shape[1], coding, tensor.dtype):
                behind.write(rows.data)
                stored.update(rows.data)
                weights.update(rows.weights)
                scales += rows.scales
        except ValueError as error:
            raise BloomdeskError(
                f"{tensor.file}: {tensor.key} has no {self._part.form} form: {error}",
                "give --form lossless or --form plain, which keep every bit",
            ) from error
        behind.write(bytes(scales))
        hashes = stored.hexdigest(), xxhash.xxh3_128_hexdigest(scales)
        for described, found in zip(coding.stored(name, tensor.shape), hashes, strict=True):
            self._tensors.append(TensorRecord(*described, found))
        self._decoded.append(TensorRecord(name, tensor.dtype, tensor.shape, weights.hexdigest()))
        self._originals.append(TensorRecord(name, tensor.dtype, tensor.shape, source.hexdigest()))


def _read_back(
    path: Path,
    record: PartRecord,
    scales: Mapping[str, bytearray],
    coders: Coders,
    seen: Callable[[int], None],
) -> str:
    """The xxh3-128 of the file at `path`, every stored and every decoded tensor of which is as `record` says.

    Raises `ValueError` if one is not, and `OSError` or `EOFError` if the file can't be read.
    """
    matrices, codings = {tensor.name: tensor for tensor in record.decoded}, record.codings
    ranges, start = [ByteRange(path, 0, len(record.header))], len(record.header)
    for tensor in record.tensors:
        sizes = [tensor.nbytes]
        if tensor.name in matrices:
            sizes = [
                rows.data_nbytes for rows in row_batches(matrices[tensor.name].shape, codings[tensor.name])
            ]
        for size in sizes:
            ranges.append(ByteRange(path, start, size))
            start += size
    whole = xxhash.xxh3_128()
    with ReadAhead(ranges, held=IN_PROGRESS) as ahead:
        read = hashed(map(ahead.whole, range(len(ranges))), whole)
        if next(read) != record.header:
            raise ValueError("its header is another one")
        for tensor in record.tensors:
            if tensor.name in matrices:
                decoded, coding = matrices[tensor.name], codings[tensor.name]
                _compare_matrix(tensor, decoded, coding, scales[tensor.name], read, coders, seen)
            else:
                compare_tensor(tensor, xxhash.xxh3_128_hexdigest(next(read)))
                seen(0 if tensor.name.removesuffix(".scales") in matrices else tensor.nbytes)
    return whole.hexdigest()


def _compare_matrix(
    stored: TensorRecord,
    decoded: TensorRecord,
    coding: Coding,
    scales: bytearray,
    read: Iterator[Block],
    coders: Coders,
    seen: Callable[[int], None],
) -> None:
    own, weights = xxhash.xxh3_128(), xxhash.xxh3_128()

    def given() -> Iterator[QuantisedRows]:
        # The batches stand first, so that no block after the matrix's last one is taken.
        for rows, data in zip(row_batches(decoded.shape, coding), hashed(read, own), strict=False):
            yield rows.holding(data, scales)

    for found in coders.dequantised(given(), decoded.shape[1], coding, decoded.dtype):
        weights.update(found)
        seen(len(found))
    compare_tensor(stored, own.hexdigest())
    compare_tensor(decoded, weights.hexdigest())
