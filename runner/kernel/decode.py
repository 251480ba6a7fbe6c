"""The decoder of the lossless form: row groups of 12 rows, each a chain of panels of up to 4,096 columns.

A row group is found by its offset, so any rows can be decoded alone. docs/format.md describes the bytes of a panel. A
pass decodes a panel right before it multiplies with it: matmul.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from runner.format.coded import row_group_count
from runner.kernel.library import load_kernel

# Bytes of a weight.
ELEMENT = 2
# Bytes of a panel's header, and the byte of it that is 1 if the weights follow uncoded.
HEADER, STORED = 32, 12
# Symbols of a group, and bytes of their codes.
GROUP, CODES = 64, 16


def decode_row_groups(coded: object, offsets: Sequence[int], rows: int, columns: int, out: object) -> None:
    """Decode the row groups in the buffer `coded` into the buffer `out`: `rows` rows of `columns` bfloat16 weights.

    `offsets` say where each row group begins in `coded`, and where the last ends. Raises ValueError if these or `out`
    do not fit, or the coded bytes are damaged. The interpreter's lock is free meanwhile.
    """
    source, target = as_array(coded), as_array(out)
    whole = list(offsets)
    fits = len(target) == rows * columns * ELEMENT and len(whole) == row_group_count(rows) + 1
    if not fits or whole != sorted(whole) or whole[0] < 0 or whole[-1] > len(source):
        raise ValueError(f"{len(source):,} coded bytes do not hold {rows:,} rows of {columns:,}")
    kernel = load_kernel()
    places = (ctypes.c_int64 * len(whole))(*whole)
    scratch = (ctypes.c_ubyte * kernel.scratch_bytes_of_decoder())()
    if kernel.decode_rows(source, places, rows, columns, target, scratch):
        raise ValueError("the coded weights are damaged")


def as_array(buffer: object) -> ctypes.Array[ctypes.c_ubyte]:
    """The bytes of a buffer for machine code: in place, or a copy if the buffer is read-only."""
    view = memoryview(buffer).cast("B")
    kind = ctypes.c_ubyte * len(view)
    return kind.from_buffer_copy(view) if view.readonly else kind.from_buffer(view)
