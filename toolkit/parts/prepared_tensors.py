"""The tensors of a prepared part as those of a source: in the file as they are, or decoded from the lossless form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from runner.errors import BloomdeskError, in_shell
from runner.format.coded import ROW_GROUP_ROWS, read_row_groups
from runner.format.layout import SPREADING
from runner.format.part_record import PartRecord
from runner.format.slice_set import being_spread
from runner.kernel.decode import decode_row_groups
from toolkit.io.reader import OpenedFile, read_block
from toolkit.parts.part_reader import StoredTensor, stored_tensors
from toolkit.parts.regions import regions_of
from toolkit.parts.row_groups import chunk_nbytes
from toolkit.source.tensor import SourceTensor


def prepared_tensors(directory: Path, record: PartRecord) -> dict[str, SourceTensor]:
    """The tensors of a part by name; it is plain or lossless."""
    path, found = directory / record.file, {}
    for stored in stored_tensors(record):
        tensor, decoded = stored.tensor, DecodedRows(path, stored) if stored.row_groups else None
        found[tensor.name] = SourceTensor(
            tensor.name, tensor.dtype, tensor.shape, path, stored.region.start, tensor.nbytes, decoded=decoded
        )
    return found


def tensors_as_stored(directory: Path, record: PartRecord) -> tuple[SourceTensor, ...]:
    """The tensors that the part's file has, whatever they stand for, in its order."""
    path, places = directory / record.file, {region.tensor: region for region in regions_of(record)}
    return tuple(
        SourceTensor(each.name, each.dtype, each.shape, path, places[each.name].start, each.nbytes)
        for each in record.tensors
    )


def damaged_part(path: Path, what: str) -> BloomdeskError:
    """The error for a part that is to be converted and is not what its manifest records."""
    mending, begun = f"bloomdesk repair {in_shell(path.parent)}", being_spread(path.parent)
    if begun is not None:
        # What has gone to the slices would be damage to a repair.
        mending = f"{begun.command(path.parent / SPREADING)} makes the slices from the source"
    return BloomdeskError(
        f"{path} is damaged: {what}", f"{mending}, then the same command again: finished parts are kept"
    )


@dataclass(frozen=True)
class DecodedRows:
    """Reads and decodes a losslessly coded matrix of the part at `path`."""

    path: Path
    stored: StoredTensor

    def __call__(self, first: int, last: int) -> Iterator[memoryview]:
        """The bytes of the elements `[first, last)` in row-major order, in blocks.

        Raises `BloomdeskError` if they can't be decoded, and OSError if the file can't be read.
        """
        rows, columns = self.stored.tensor.shape
        step = chunk_nbytes(columns) // (2 * columns)
        begin = first // columns // ROW_GROUP_ROWS * ROW_GROUP_ROWS
        file = OpenedFile(self.path)
        try:
            while begin * columns < last:
                end = min(begin + step, rows)
                data = memoryview(self._decoded(file, begin, end, columns))
                own = slice(2 * max(first - begin * columns, 0), 2 * (last - begin * columns))
                yield data[own]
                begin = end
        finally:
            file.close()

    def _decoded(self, file: OpenedFile, begin: int, end: int, columns: int) -> bytearray:
        own = self._row_groups[begin // ROW_GROUP_ROWS : -(-end // ROW_GROUP_ROWS) + 1]
        coded, out = bytearray(own[-1] - own[0]), bytearray(2 * (end - begin) * columns)
        self._read(file, self.stored.region.start + own[0], coded)
        try:
            decode_row_groups(coded, [offset - own[0] for offset in own], end - begin, columns, out)
        except ValueError as error:
            raise damaged_part(self.path, f"{self.stored.tensor.name}: {error}") from error
        return out

    @cached_property
    def _row_groups(self) -> tuple[int, ...]:
        region = self.stored.row_groups
        assert region is not None
        table, file = bytearray(region.nbytes), OpenedFile(self.path)
        try:
            self._read(file, region.start, table)
        finally:
            file.close()
        try:
            return tuple(read_row_groups(table, *self.stored.tensor.shape, self.stored.region.nbytes))
        except ValueError as error:
            raise damaged_part(self.path, f"{self.stored.tensor.name}: {error}") from error

    def _read(self, file: OpenedFile, start: int, buffer: bytearray) -> None:
        if read_block(file, start, memoryview(buffer)) != len(buffer):
            raise damaged_part(self.path, f"{self.stored.tensor.name} is cut off")
