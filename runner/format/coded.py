"""Coded matrices of the lossless form: row groups, their offsets, and the header that describes them."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Sequence

from runner.format.safetensors import encode_header

PLAIN, LOSSLESS = "plain", "lossless"
# What is fixed of the coding; runner/kernel/decode.py knows the rest.
CODED_DTYPE = "BF16"
STRIP_ROWS = 12
PANEL_COLUMNS = 4096
CODING_KEY = "bloomdesk.lossless"  # in a part's __metadata__
CODING_VERSION = 1
STRIPS_SUFFIX = ".strips"
CODED_ALIGNMENT = 16
LARGEST_CODED = 10**14  # no matrix comes near; its digits are the room that a header keeps for a size
Shape = tuple[int, ...]
Described = tuple[str, str, Shape]  # a tensor's name, dtype and shape


def strip_count(rows: int) -> int:
    """Strips of a coded matrix: `STRIP_ROWS` rows each, the last one what is left."""
    return -(-rows // STRIP_ROWS)


def largest_strip(columns: int) -> int:
    """Bytes that no coded strip exceeds: twice those of its rows, and a page for each panel."""
    return 2 * STRIP_ROWS * columns * 2 + 4096 * -(-columns // PANEL_COLUMNS)


def read_strips(data: bytes | bytearray | memoryview, rows: int, columns: int, nbytes: int) -> array[int]:
    """The offsets of the strips of a coded matrix [rows, columns] of `nbytes` bytes, from the bytes of NAME.strips.

    Raises `ValueError` where they are not those of strips that lie one after another, each of a size that it can have.
    """
    offsets = array("q")
    offsets.frombytes(data)
    if sys.byteorder == "big":
        offsets.byteswap()
    if len(offsets) != strip_count(rows) + 1 or offsets[0] != 0 or offsets[-1] != nbytes:
        raise ValueError("its strips do not begin and end where the coded bytes do")
    largest = largest_strip(columns)
    for index in range(len(offsets) - 1):
        if not 0 < offsets[index + 1] - offsets[index] <= largest:
            raise ValueError(f"strip {index:,} cannot have {offsets[index + 1] - offsets[index]:,} bytes")
    return offsets


def part_header(stored: Sequence[Described], decoded: Sequence[Described] = ()) -> bytes:
    """The first bytes of a part, up to its data: it holds `stored`, of which `decoded` are coded.

    The length does not depend on the sizes of the coded tensors, so it is known before they are.
    """
    if not decoded:
        return encode_header(stored)
    tensors = {name: {"dtype": dtype, "shape": list(shape)} for name, dtype, shape in decoded}
    coding = {"version": CODING_VERSION, "tensors": tensors}
    metadata = {CODING_KEY: json.dumps(coding, separators=(",", ":"))}
    largest = [(name, dtype, (LARGEST_CODED,) if name in tensors else shape) for name, dtype, shape in stored]
    return encode_header(stored, metadata, room=len(encode_header(largest, metadata)))
