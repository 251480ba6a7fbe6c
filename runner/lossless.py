"""Coded strips of bfloat16 matrices: the high bytes of each panel deflated, the low bytes as they are.

strip     panel, panel, ..., zeros up to a multiple of 16
panel     length of what follows (4 bytes), the deflated high bytes; the low bytes
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from runner.prepared import PANEL_COLUMNS, STRIP_ROWS, strip_count

__all__ = ["PANEL_COLUMNS", "STRIP_ROWS", "decode_strips", "strip_count"]


def decode_strips(coded, offsets: Sequence[int], rows: int, columns: int, out) -> None:
    """Decode consecutive strips of `rows` rows in all into `out`, bf16 bits; `ValueError` where they are damaged."""
    coded, out = memoryview(coded), memoryview(out)
    if len(out) != rows * columns * 2 or len(offsets) != strip_count(rows) + 1:
        raise ValueError("the buffers do not fit the strips")
    if list(offsets) != sorted(offsets) or offsets[0] < 0 or offsets[-1] > len(coded):
        raise ValueError("the strips do not lie in the coded bytes")
    for index in range(strip_count(rows)):
        first = index * STRIP_ROWS
        last = min(rows, first + STRIP_ROWS)
        target = out[first * columns * 2 : last * columns * 2]
        _decode_strip(coded[offsets[index] : offsets[index + 1]], last - first, columns, target)


def _decode_strip(coded: memoryview, rows: int, columns: int, out: memoryview) -> None:
    position = 0
    for first in range(0, columns, PANEL_COLUMNS):
        width = min(PANEL_COLUMNS, columns - first)
        length = int.from_bytes(coded[position : position + 4], "little")
        position += 4
        high = _inflated(coded[position : position + length], rows * width)
        position += length
        low = coded[position : position + rows * width]
        position += rows * width
        if len(low) != rows * width:
            raise ValueError("a panel ends too early")
        panel = bytearray(2 * rows * width)
        panel[0::2], panel[1::2] = low, high
        for row in range(rows):
            start = 2 * (row * columns + first)
            out[start : start + 2 * width] = panel[2 * row * width : 2 * (row + 1) * width]
    if any(coded[position:]) or len(coded) - position >= 16:
        raise ValueError("a strip does not end where its panels do")


def _inflated(data: memoryview, nbytes: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, nbytes + 1)
    except zlib.error as error:
        raise ValueError(f"a panel is damaged: {error}") from None
    if len(found) != nbytes or not stream.eof or stream.unused_data:
        raise ValueError("a panel is damaged")
    return found
