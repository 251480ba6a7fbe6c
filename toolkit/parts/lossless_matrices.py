"""Matrices of the lossless form: coded row groups, and the offsets at which these begin.

The offsets are known last, and stand before the coded bytes: they are written last, into space left for them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import accumulate

import xxhash

from runner.format.coded import ROW_GROUPS_SUFFIX, read_row_groups, row_group_count
from runner.format.part_record import TensorRecord
from toolkit.parts.coded_part import Rows, Written, hashed
from toolkit.parts.part import PlannedPart
from toolkit.parts.row_groups import Block, Coders, RowGroups, batches_of_row_groups


class LosslessMatrices:
    """Those of one part; its tables of offsets stay in memory until they are read back."""

    def __init__(self, part: PlannedPart, coders: Coders) -> None:
        self._coders = coders
        self._tables: dict[str, bytes] = {}
        self._groups: dict[str, list[RowGroups]] = {}

    def write(self, name: str, rows: Rows, written: Written) -> None:
        bits, stored = xxhash.xxh3_128(), xxhash.xxh3_128()
        lengths: list[int] = []

        file = written.file
        position = file.position
        file.write(bytes(8 * (row_group_count(rows.count) + 1)))
        chunks = hashed(rows.chunks, bits, rows.whole.decoded)
        for coded, of_row_groups in self._coders.encoded(chunks, rows.shape[1]):
            file.write(coded)
            stored.update(coded)
            lengths += of_row_groups
        offsets = tuple(accumulate(lengths, initial=0))
        table = struct.pack(f"<{len(offsets)}q", *offsets)
        written.late[position] = self._tables[name] = table
        hash_of_table = xxhash.xxh3_128_hexdigest(table)
        written.tensors.append(TensorRecord(name + ROW_GROUPS_SUFFIX, "I64", (len(offsets),), hash_of_table))
        written.tensors.append(TensorRecord(name, "U8", (offsets[-1],), stored.hexdigest()))
        written.decoded.append(TensorRecord(name, rows.tensor.dtype, rows.shape, bits.hexdigest()))

    def pass_over(self, name: str, rows: Rows) -> None:
        for chunk in rows.chunks:
            rows.whole.decoded.update(chunk)

    def sizes(self, stored: TensorRecord, decoded: TensorRecord) -> list[int]:
        offsets = read_row_groups(self._tables[stored.name], *decoded.shape, stored.nbytes)
        groups = self._groups[stored.name] = batches_of_row_groups(offsets, *decoded.shape)
        return [group.nbytes for group in groups]

    def decode(self, decoded: TensorRecord, blocks: Iterator[Block]) -> Iterator[Block]:
        # The groups stand first, so that no block after the matrix's last one is taken.
        return self._coders.decoded(zip(self._groups[decoded.name], blocks, strict=False), decoded.shape[1])
