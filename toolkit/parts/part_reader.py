"""The tensors of a part as they were in the source: read ahead, and decoded if they are stored coded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.format.coded import ROW_GROUPS_SUFFIX, read_row_groups
from runner.format.manifest import PartRecord, TensorRecord
from runner.format.safetensors import open_regular
from toolkit.io.reader import ByteRange, ReadAhead
from toolkit.parts.regions import Region, regions_of
from toolkit.parts.row_groups import IN_PROGRESS, Coders, RowGroups, batches_of_row_groups


class DamagedTensor(Exception):
    """The tensor's bytes can't be read or decoded; the text says which and why."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the source, the region of its bytes, and of a coded one the region of its row groups' offsets."""

    tensor: TensorRecord
    region: Region
    row_groups: Region | None


def stored_tensors(part: PartRecord) -> tuple[StoredTensor, ...]:
    """The tensors of the source that `part` was made of, in the order of a pass."""
    regions = {region.tensor: region for region in regions_of(part)}
    decoded = {tensor.name: tensor for tensor in part.decoded}
    tables = {name + ROW_GROUPS_SUFFIX for name in decoded}
    return tuple(
        StoredTensor(
            decoded.get(tensor.name, tensor),
            regions[tensor.name],
            regions.get(tensor.name + ROW_GROUPS_SUFFIX) if tensor.name in decoded else None,
        )
        for tensor in part.tensors
        if tensor.name not in tables
    )


class PartReader:
    """Reads `tensors` of the part at `path` in their order; memory is some tens of megabytes."""

    def __init__(self, path: Path, tensors: Sequence[StoredTensor], coders: Coders) -> None:
        """Raises `DamagedTensor` if the offsets of a coded one's row groups are not sound."""
        self._tensors, self._coders = tensors, coders
        self._groups: list[list[RowGroups]] = []
        # The index of the range at which each tensor begins.
        self._first: list[int] = []
        ranges: list[ByteRange] = []
        for stored in tensors:
            groups = _groups(path, stored, stored.row_groups) if stored.row_groups is not None else []
            places = [(group.start, group.nbytes) for group in groups] or [(0, stored.region.nbytes)]
            self._first.append(len(ranges))
            self._groups.append(groups)
            ranges += [ByteRange(path, stored.region.start + start, nbytes) for start, nbytes in places]
        self._ahead = ReadAhead(ranges, held=IN_PROGRESS if any(self._groups) else 2)

    def __enter__(self) -> PartReader:
        self._ahead.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.__exit__()

    def bits(self, index: int) -> Iterator[memoryview | bytearray]:
        """The bytes of the tensor at `index` in blocks, each valid while the next one is used.

        Tensors are asked for in their order. Raises `DamagedTensor` if they can't be read or decoded.
        """
        name, groups, first = self._tensors[index].tensor.name, self._groups[index], self._first[index]
        try:
            if groups:
                coded = ((group, self._ahead.whole(index)) for index, group in enumerate(groups, first))
                yield from self._coders.decoded(coded, self._tensors[index].tensor.shape[1])
            else:
                yield from self._ahead.blocks(first)
        except OSError as error:
            raise DamagedTensor(f"{name} cannot be read: {error.strerror}") from error
        except EOFError as error:
            raise DamagedTensor(f"{name}: {error}") from None
        except ValueError as error:
            raise DamagedTensor(f"{name} can't be decoded: {error}") from None


def _groups(path: Path, stored: StoredTensor, row_groups: Region) -> list[RowGroups]:
    rows, columns = stored.tensor.shape
    name = stored.tensor.name + ROW_GROUPS_SUFFIX
    try:
        with open_regular(path) as file:
            file.seek(row_groups.start)
            data = file.read(row_groups.nbytes)
        return batches_of_row_groups(
            read_row_groups(data, rows, columns, stored.region.nbytes), rows, columns
        )
    except OSError as error:
        raise DamagedTensor(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedTensor(f"{name}: {error}") from None
