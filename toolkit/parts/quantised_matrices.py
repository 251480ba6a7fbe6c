"""Matrices in fewer bits: integers, and the scales that follow them. All sizes are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from runner.errors import BloomdeskError
from runner.format.part_record import TensorRecord
from runner.format.quantised import coding_of
from toolkit.parts.coded_part import Rows, Written, hashed
from toolkit.parts.part import PlannedPart
from toolkit.parts.row_groups import Block, Coders, QuantisedRows, row_batches


class QuantisedMatrices:
    """Those of one part; the scales stay in memory until they are read back."""

    def __init__(self, part: PlannedPart, coders: Coders) -> None:
        self._form, self._coders = part.form, coders
        self._scales: dict[str, bytearray] = {}

    def write(self, name: str, rows: Rows, written: Written) -> None:
        source, stored, weights = xxhash.xxh3_128(), xxhash.xxh3_128(), xxhash.xxh3_128()
        scales = self._scales[name] = bytearray()
        for batch in self._quantised(name, rows, source):
            written.file.write(batch.data)
            stored.update(batch.data)
            weights.update(batch.weights)
            scales += batch.scales
        written.file.write(bytes(scales))
        coding, dtype = coding_of(self._form, name), rows.tensor.dtype
        hashes = stored.hexdigest(), xxhash.xxh3_128_hexdigest(scales)
        for described, found in zip(coding.stored(name, rows.shape), hashes, strict=True):
            written.tensors.append(TensorRecord(*described, found))
        written.decoded.append(TensorRecord(name, dtype, rows.shape, weights.hexdigest()))
        written.originals.append(TensorRecord(name, dtype, rows.shape, source.hexdigest()))

    def pass_over(self, name: str, rows: Rows) -> None:
        for _ in self._quantised(name, rows):
            pass

    def _quantised(self, name: str, rows: Rows, *digests: xxhash.xxh3_128) -> Iterator[QuantisedRows]:
        """The rows in batches, in fewer bits; `digests` are of what they are made from."""
        tensor, chunks = rows.tensor, hashed(rows.chunks, *digests, rows.whole.original)
        try:
            coding = coding_of(self._form, name)
            for batch in self._coders.quantised(chunks, rows.shape[1], coding, tensor.dtype):
                rows.whole.decoded.update(batch.weights)
                yield batch
        except ValueError as error:
            raise BloomdeskError(
                f"{tensor.file}: {tensor.key} has no {self._form} form: {error}",
                "give --form lossless or --form plain, which keep every bit",
            ) from error

    def sizes(self, stored: TensorRecord, decoded: TensorRecord) -> list[int]:
        return [rows.data_nbytes for rows in self._batches(decoded)]

    def decode(self, decoded: TensorRecord, blocks: Iterator[Block]) -> Iterator[Block]:
        scales = self._scales[decoded.name]
        # The batches stand first, so that no block after the matrix's last one is taken.
        given = (
            rows.holding(data, scales) for rows, data in zip(self._batches(decoded), blocks, strict=False)
        )
        coding = coding_of(self._form, decoded.name)
        return self._coders.dequantised(given, decoded.shape[1], coding, decoded.dtype)

    def _batches(self, decoded: TensorRecord) -> list[QuantisedRows]:
        return row_batches(decoded.shape, coding_of(self._form, decoded.name))
