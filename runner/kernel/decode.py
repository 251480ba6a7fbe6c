"""The decoder of the lossless form: row groups of 12 rows, each a chain of panels of up to 4,096 columns.

A row group is found by its offset, so any rows can be decoded alone. panel.py decodes one panel; a pass decodes panels
right before it multiplies with them, in product.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from runner.format.coded import PANEL_COLUMNS, ROW_GROUP_ROWS, row_group_count

if TYPE_CHECKING:
    from llvmlite import ir

# Bytes of a weight.
ELEMENT = 2


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
    decode, scratch_bytes = compile_decoder()
    places = (ctypes.c_int64 * len(whole))(*whole)
    scratch = (ctypes.c_ubyte * scratch_bytes)()
    if decode(source, places, rows, columns, target, scratch):
        raise ValueError("the coded weights are damaged")


def as_array(buffer: object) -> ctypes.Array[ctypes.c_ubyte]:
    """The bytes of a buffer for machine code: in place, or a copy if the buffer is read-only."""
    view = memoryview(buffer).cast("B")
    kind = ctypes.c_ubyte * len(view)
    return kind.from_buffer_copy(view) if view.readonly else kind.from_buffer(view)


@cache
def compile_decoder() -> tuple[ctypes._CFuncPtr, int]:
    """`decode(coded, offsets, rows, columns, out, scratch)` -> 0, or 1 for damage; and the bytes of its scratch.

    The first call takes half a second, and some memory that is kept.
    """
    from runner.kernel.emit import compiled, native, new_module
    from runner.kernel.panel import scratch_bytes

    module = new_module()
    _emit_rows(module)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    types = (number, pointer, pointer, number, number, pointer, pointer)
    return native(compiled(module), "decode_rows", *types), scratch_bytes(ROW_GROUP_ROWS * PANEL_COLUMNS)


def _emit_rows(module: ir.Module) -> None:
    from llvmlite import ir

    from runner.kernel.emit import BYTES, INDEX, index, loop, smaller
    from runner.kernel.panel import emit_copy, emit_decode

    panel_of = emit_decode(module)
    types = [BYTES, INDEX.as_pointer(), INDEX, INDEX, BYTES, BYTES]
    function = ir.Function(module, ir.FunctionType(INDEX, types), "decode_rows")
    coded, offsets, rows, columns, out, scratch = function.args
    b = ir.IRBuilder(function.append_basic_block())
    panel = b.alloca(BYTES)
    with loop(b, index(0), rows, ROW_GROUP_ROWS) as first:
        row_group = b.udiv(first, index(ROW_GROUP_ROWS))
        begin, end = (
            b.gep(coded, [b.load(b.gep(offsets, [place]))])
            for place in (row_group, b.add(row_group, index(1)))
        )
        b.store(begin, panel)
        count = smaller(b, index(ROW_GROUP_ROWS), b.sub(rows, first))
        with loop(b, index(0), columns, PANEL_COLUMNS) as k:
            width = smaller(b, index(PANEL_COLUMNS), b.sub(columns, k))
            taken = b.call(panel_of, [b.load(panel), end, b.mul(count, width), scratch])
            with b.if_then(b.icmp_signed("<", taken, index(0)), likely=False):
                b.ret(index(1))
            b.store(b.gep(b.load(panel), [taken]), panel)
            nbytes = b.mul(width, index(ELEMENT))
            with loop(b, index(0), count, 1) as row:
                place = b.add(b.mul(b.add(first, row), columns), k)
                target = b.gep(out, [b.mul(place, index(ELEMENT))])
                emit_copy(b, target, b.gep(scratch, [b.mul(row, nbytes)]), nbytes)
        # A row group consists of its panels and nothing else.
        with b.if_then(b.icmp_unsigned("!=", b.load(panel), end), likely=False):
            b.ret(index(1))
    b.ret(index(0))
