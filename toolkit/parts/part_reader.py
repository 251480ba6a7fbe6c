"""The tensors of a part as they were in the source: read ahead, and decoded if they are stored coded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from runner.errors import BloomdeskError, explained
from runner.format.coded import ROW_GROUPS_SUFFIX, read_row_groups
from runner.format.part_record import PartRecord, TensorRecord
from runner.format.quantised import SCALES_SUFFIX, Coding
from runner.format.safetensors import open_regular
from toolkit.io.reader import ByteRange, ReadAhead
from toolkit.parts.regions import Region, regions_of
from toolkit.parts.row_groups import (
    IN_PROGRESS,
    Coders,
    QuantisedRows,
    RowGroups,
    batches_of_row_groups,
    row_batches,
)


class DamagedTensor(Exception):
    """The tensor's bytes are cut off or can't be decoded; the text says which and why."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a pass, the region of its bytes, and what else a coded one takes to be decoded.

    That is the region of its row groups' offsets or, if it is stored in fewer bits as `coding` says, of its scales.
    """

    tensor: TensorRecord
    region: Region
    row_groups: Region | None = None
    scales: Region | None = None
    coding: Coding | None = None


def stored_tensors(part: PartRecord) -> tuple[StoredTensor, ...]:
    """The tensors that a pass takes from `part`, in its order."""
    regions = {region.tensor: region for region in regions_of(part)}
    codings = part.codings
    return tuple(
        StoredTensor(
            tensor,
            regions[tensor.name],
            regions.get(tensor.name + ROW_GROUPS_SUFFIX),
            regions.get(tensor.name + SCALES_SUFFIX),
            codings.get(tensor.name),
        )
        for tensor in part.weights
    )


class PartReader(ReadAhead):
    """Reads `tensors` of the part at `path` in their order; memory is some tens of megabytes."""

    def __init__(self, path: Path, tensors: Sequence[StoredTensor], coders: Coders) -> None:
        """Raises `DamagedTensor` if the offsets of a coded one's row groups are not sound."""
        self._path, self._tensors, self._coders = path, tensors, coders
        self._groups: list[list[RowGroups]] = []
        self._batches: list[list[QuantisedRows]] = []
        # The index of the range at which each tensor begins.
        self._first: list[int] = []
        ranges: list[ByteRange] = []
        for stored in tensors:
            groups = _groups(path, stored, stored.row_groups) if stored.row_groups is not None else []
            places = [(group.start, group.nbytes) for group in groups] or [(0, stored.region.nbytes)]
            batches = []
            self._first.append(len(ranges))
            if stored.scales is not None and stored.coding is not None:
                ranges.append(ByteRange(path, stored.scales.start, stored.scales.nbytes))
                batches = row_batches(stored.tensor.shape, stored.coding)
                sizes = [rows.data_nbytes for rows in batches]
                places = list(zip(accumulate(sizes, initial=0), sizes, strict=False))
            self._groups.append(groups)
            self._batches.append(batches)
            ranges += [ByteRange(path, stored.region.start + start, nbytes) for start, nbytes in places]
        is_coded = any(self._groups) or any(self._batches)
        super().__init__(ranges, held=IN_PROGRESS if is_coded else 2)

    def bits(self, index: int) -> Iterator[memoryview | bytearray]:
        """The bytes of the tensor at `index` in blocks, each valid while the next one is used.

        Tensors are asked for in their order. Raises `DamagedTensor` if they can't be decoded, and `BloomdeskError` if
        they can't be read, and so may be sound.
        """
        name, groups, first = self._tensors[index].tensor.name, self._groups[index], self._first[index]
        with _damage_of(self._path, name):
            if groups:
                coded = ((group, self.whole(index)) for index, group in enumerate(groups, first))
                yield from self._coders.decoded(coded, self._tensors[index].tensor.shape[1])
            elif self._batches[index]:
                yield from self._quantised(index)
            else:
                yield from self.blocks(first)

    def _quantised(self, index: int) -> Iterator[bytearray]:
        stored, first = self._tensors[index], self._first[index]
        assert stored.coding is not None
        scales = bytearray(self.whole(first))
        given = (
            rows.holding(self.whole(place), scales)
            for place, rows in enumerate(self._batches[index], first + 1)
        )
        tensor = stored.tensor
        yield from self._coders.dequantised(given, tensor.shape[1], stored.coding, tensor.dtype)


def _groups(path: Path, stored: StoredTensor, row_groups: Region) -> list[RowGroups]:
    rows, columns = stored.tensor.shape
    with _damage_of(path, stored.tensor.name + ROW_GROUPS_SUFFIX), open_regular(path) as file:
        file.seek(row_groups.start)
        offsets = read_row_groups(file.read(row_groups.nbytes), rows, columns, stored.region.nbytes)
        return batches_of_row_groups(offsets, rows, columns)


@contextmanager
def _damage_of(path: Path, tensor: str) -> Iterator[None]:
    """Turn an error of reading or decoding a tensor of the part at `path` into what `bits` raises."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedTensor(f"{tensor}: the file is missing") from None
    except OSError as error:
        why, step = explained(error, path)
        raise BloomdeskError(f"{path} cannot be read at {tensor}: {why}", step) from error
    except EOFError as error:
        raise DamagedTensor(f"{tensor}: {error}") from None
    except ValueError as error:
        raise DamagedTensor(f"{tensor} can't be decoded: {error}") from None
