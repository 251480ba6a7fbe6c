"""Matrices of zeros alone, which no trained model has: what a downloader leaves that first reserves the whole file."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import xxhash

from runner.format.part_record import PartRecord

BUFFER_BYTES = 2**20
EXAMPLES = 3


def zero_notes(records: Iterable[PartRecord]) -> tuple[str, ...]:
    """A sentence that names the matrices of these parts that are all zeros, or none if there are none."""
    found = [
        f"{record.file} {tensor.name}"
        for record in records
        for tensor in record.source_tensors
        if len(tensor.shape) == 2 and tensor.nbytes and tensor.xxh3_128 == _hash_of_zeros(tensor.nbytes)
    ]
    if not found:
        return ()
    more = f" and {len(found) - EXAMPLES:,} more" if len(found) > EXAMPLES else ""
    what = "1 matrix is" if len(found) == 1 else f"{len(found):,} matrices are"
    return (
        f"{what} all zeros in the source, as in a file that was not downloaded whole: "
        f"{', '.join(found[:EXAMPLES])}{more}",
    )


@cache
def _hash_of_zeros(nbytes: int) -> str:
    # A model has few sizes, and the buffer stays in the processor's cache.
    buffer, found = bytes(BUFFER_BYTES), xxhash.xxh3_128()
    for _ in range(nbytes // BUFFER_BYTES):
        found.update(buffer)
    found.update(buffer[: nbytes % BUFFER_BYTES])
    return found.hexdigest()
