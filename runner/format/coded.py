"""Coded matrices of the lossless form: row groups, their offsets, and the header that describes them."""

from __future__ import annotations

import sys
from array import array
from itertools import pairwise

PLAIN, LOSSLESS = "plain", "lossless"
# Constants of the coding that a file depends on; the bytes of a panel are described in docs/format.md.
CODED_DTYPE = "BF16"
ROW_GROUP_ROWS = 12
PANEL_COLUMNS = 4096
# In a part's __metadata__.
CODING_KEY, CODING_VERSION = "bloomdesk.lossless", 1
ROW_GROUPS_SUFFIX = ".strips"
CODED_ALIGNMENT = 16
# Bytes, far above every matrix; a header reserves space for the digits of this number.
LARGEST_CODED = 10**14


def row_group_count(rows: int) -> int:
    """Number of row groups of a matrix: `ROW_GROUP_ROWS` rows each, fewer in the last one."""
    return -(-rows // ROW_GROUP_ROWS)


def largest_row_group(columns: int) -> int:
    """The most bytes that a coded row group may have: twice those of its rows, and a page for each panel."""
    return 2 * ROW_GROUP_ROWS * columns * 2 + 4096 * -(-columns // PANEL_COLUMNS)


def read_row_groups(data: bytes | bytearray | memoryview, rows: int, columns: int, nbytes: int) -> array[int]:
    """The offsets of the row groups of a coded matrix [rows, columns] of `nbytes` bytes, from the bytes of NAME.strips.

    Raises `ValueError` unless the row groups lie one after another, each of a possible size.
    """
    offsets = array("q")
    offsets.frombytes(data)
    if sys.byteorder == "big":
        offsets.byteswap()
    if len(offsets) != row_group_count(rows) + 1 or offsets[0] != 0 or offsets[-1] != nbytes:
        raise ValueError("its row groups do not begin and end where the coded bytes do")
    largest = largest_row_group(columns)
    for index, (start, end) in enumerate(pairwise(offsets)):
        if not 0 < end - start <= largest:
            raise ValueError(f"row group {index:,} cannot have {end - start:,} bytes")
    return offsets
