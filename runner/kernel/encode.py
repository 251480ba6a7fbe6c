"""The encoder of the lossless form; docs/format.md describes the bytes."""

from __future__ import annotations

import ctypes

from runner.format.coded import PANEL_COLUMNS, row_group_count
from runner.kernel.decode import CODES, ELEMENT, HEADER, as_array
from runner.kernel.library import load_kernel


def encode_row_groups(rows: object, columns: int) -> tuple[bytes, list[int]]:
    """The coded form of whole rows of bfloat16 bits in the buffer `rows`, and the bytes of each row group.

    All calls for a matrix but the last give a multiple of 12 rows. The same rows always give the same bytes. Raises
    ValueError if the buffer does not hold whole rows. The interpreter's lock is free meanwhile.
    """
    source = as_array(rows)
    count, rest = divmod(len(source), columns * ELEMENT)
    if rest or not count:
        raise ValueError(f"{len(source):,} bytes are no rows of {columns:,} weights")
    row_groups, panels = row_group_count(count), -(-columns // PANEL_COLUMNS)
    # A panel that would not become smaller is stored, with a header and padding.
    out = (ctypes.c_ubyte * (len(source) + row_groups * panels * (HEADER + CODES)))()
    lengths = (ctypes.c_int64 * row_groups)()
    kernel = load_kernel()
    scratch = (ctypes.c_ubyte * kernel.scratch_bytes_of_encoder())()
    kernel.encode_rows(source, count, columns, out, lengths, scratch)
    return bytes(memoryview(out)[: sum(lengths)]), list(lengths)
