"""Coded matrices of the lossless form: row groups, their offsets, and the header that describes them."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Sequence

from runner.format.safetensors import Described, encode_header

PLAIN, LOSSLESS = "plain", "lossless"
# What is fixed of the coding; runner/kernel/decode.py knows the rest.
CODED_DTYPE = "BF16"
ROW_GROUP_ROWS = 12
PANEL_COLUMNS = 4096
CODING_KEY = "bloomdesk.lossless"  # in a part's __metadata__
CODING_VERSION = 1
ROW_GROUPS_SUFFIX = ".strips"
CODED_ALIGNMENT = 16
LARGEST_CODED = 10**14  # no matrix comes near; its digits are the room that a header keeps for a size


def row_group_count(rows: int) -> int:
    """Strips of a coded matrix: `ROW_GROUP_ROWS` rows each, the last one what is left."""
    return -(-rows // ROW_GROUP_ROWS)


def largest_row_group(columns: int) -> int:
    """Bytes that no coded row group exceeds: twice those of its rows, and a page for each panel."""
    return 2 * ROW_GROUP_ROWS * columns * 2 + 4096 * -(-columns // PANEL_COLUMNS)


def read_row_groups(data: bytes | bytearray | memoryview, rows: int, columns: int, nbytes: int) -> array[int]:
    """The offsets of the row groups of a coded matrix [rows, columns] of `nbytes` bytes, from the bytes of NAME.strips.

    Raises `ValueError` unless they are those of row groups that lie one after another, each of a possible size.
    """
    offsets = array("q")
    offsets.frombytes(data)
    if sys.byteorder == "big":
        offsets.byteswap()
    if len(offsets) != row_group_count(rows) + 1 or offsets[0] != 0 or offsets[-1] != nbytes:
        raise ValueError("its row groups do not begin and end where the coded bytes do")
    largest = largest_row_group(columns)
    for index in range(len(offsets) - 1):
        if not 0 < offsets[index + 1] - offsets[index] <= largest:
            raise ValueError(f"row group {index:,} cannot have {offsets[index + 1] - offsets[index]:,} bytes")
    return offsets


def part_header(stored: Sequence[Described], decoded: Sequence[Described] = ()) -> bytes:
    """The first bytes of a part, up to its data: it holds `stored`, of which `decoded` are coded.

    The length does not depend on the sizes of the coded tensors, so it is known before they are.
    """
    if not decoded:
        return encode_header(stored)
    tensors = {name: {"dtype": dtype, "shape": list(shape)} for name, dtype, shape in decoded}
    form = {"version": CODING_VERSION, "tensors": tensors}
    metadata = {CODING_KEY: json.dumps(form, separators=(",", ":"))}
    largest = [(name, dtype, (LARGEST_CODED,) if name in tensors else shape) for name, dtype, shape in stored]
    return encode_header(stored, metadata, room=len(encode_header(largest, metadata)))
