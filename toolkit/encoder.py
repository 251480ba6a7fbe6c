"""Encodes rows of bfloat16 matrices into the strips that runner/lossless.py decodes."""

from __future__ import annotations

import zlib

from runner.lossless import PANEL_COLUMNS, STRIP_ROWS


def encode_strips(rows, columns: int) -> tuple[bytes, list[int]]:
    """The coded bytes of whole rows of bf16 bits, and the length of each strip."""
    data = memoryview(rows).cast("B")
    strips = [_strip(data[start : start + STRIP_ROWS * columns * 2], columns)
              for start in range(0, len(data), STRIP_ROWS * columns * 2)]  # fmt: skip
    return b"".join(strips), [len(strip) for strip in strips]


def _strip(data: memoryview, columns: int) -> bytes:
    coded = bytearray()
    for first in range(0, columns, PANEL_COLUMNS):
        width = min(PANEL_COLUMNS, columns - first)
        panel = b"".join(
            data[start : start + 2 * width] for start in range(2 * first, len(data), 2 * columns)
        )
        high = zlib.compress(panel[1::2], 1)
        coded += len(high).to_bytes(4, "little") + high + panel[0::2]
    return bytes(coded + bytes(-len(coded) % 16))
