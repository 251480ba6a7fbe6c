"""The encoder of the lossless form, in machine code since a checkpoint has 176 billion weights; format: panel.py."""

from __future__ import annotations

import ctypes
from functools import cache

from llvmlite import ir

from runner.format.coded import PANEL_COLUMNS, ROW_GROUP_ROWS, row_group_count
from runner.kernel.decode import ELEMENT, as_array
from runner.kernel.emit import (
    BYTE,
    BYTES,
    INDEX,
    LANE,
    VOID,
    compiled,
    index,
    load_bytes,
    loop,
    native,
    new_module,
    rounded_up,
    smaller,
    store,
    vector,
)
from runner.kernel.panel import CODES, ESCAPE, GROUP, HEADER, STORED, TABLES, emit_copy

_SHORT, _NO = ir.IntType(16), ir.Constant(ir.IntType(1), 0)
# Weights of a panel, padded: the unit of the scratch memory, in which these are the places of its regions.
_MOST = ROW_GROUP_ROWS * PANEL_COLUMNS + GROUP
_EXPONENTS, _OTHERS, _CODES, _ESCAPES, _CODED, _TABLES = 0, 1, 2, (3, 4), 5, 9
# Possible exponents, and counters of each.
_KINDS, _COUNTERS = 256, 4


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
    scratch = (ctypes.c_ubyte * (_TABLES * _MOST + 8192))()
    _encoder()(source, count, columns, out, lengths, scratch)
    return bytes(memoryview(out)[: sum(lengths)]), list(lengths)


@cache
def _encoder() -> ctypes._CFuncPtr:
    """`encode(rows, count, columns, out, lengths, scratch)`."""
    module = new_module()
    _emit_rows(module, _emit_panel(module))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    return native(compiled(module), "encode", None, pointer, number, number, pointer, pointer, pointer)


def _emit_rows(module: ir.Module, panel: ir.Function) -> None:
    types = [BYTES, INDEX, INDEX, BYTES, INDEX.as_pointer(), BYTES]
    function = ir.Function(module, ir.FunctionType(VOID, types), "encode")
    rows, count, columns, out, lengths, scratch = function.args
    b = ir.IRBuilder(function.append_basic_block())
    place = b.alloca(BYTES)
    b.store(out, place)
    with loop(b, index(0), count, ROW_GROUP_ROWS) as first:
        begin = b.load(place)
        height = smaller(b, index(ROW_GROUP_ROWS), b.sub(count, first))
        with loop(b, index(0), columns, PANEL_COLUMNS) as k:
            width = smaller(b, index(PANEL_COLUMNS), b.sub(columns, k))
            start = b.gep(rows, [b.mul(b.add(b.mul(first, columns), k), index(ELEMENT))])
            taken = b.call(panel, [start, columns, height, width, b.load(place), scratch])
            b.store(b.gep(b.load(place), [taken]), place)
        length = b.sub(b.ptrtoint(b.load(place), INDEX), b.ptrtoint(begin, INDEX))
        b.store(length, b.gep(lengths, [b.udiv(first, index(ROW_GROUP_ROWS))]))
    b.ret_void()


def _emit_panel(module: ir.Module) -> ir.Function:
    """`panel(weights, their stride, rows, columns, out, scratch)` -> bytes of the coded panel."""
    function = ir.Function(
        module, ir.FunctionType(INDEX, [BYTES, INDEX, INDEX, INDEX, BYTES, BYTES]), "panel"
    )
    function.linkage = "internal"
    weights, stride, rows, columns, out, scratch = function.args
    code = _emit_code(module)
    b = ir.IRBuilder(function.append_basic_block())
    exponents, others, codes, coded = (
        b.gep(scratch, [index(unit * _MOST)]) for unit in (_EXPONENTS, _OTHERS, _CODES, _CODED)
    )
    counts = b.bitcast(b.gep(scratch, [index(_TABLES * _MOST)]), LANE.as_pointer())
    tables = b.gep(scratch, [index(_TABLES * _MOST + 4 * _COUNTERS * _KINDS)])
    count = b.mul(rows, columns)
    _zero(b, coded, index(HEADER))
    _split(b, weights, stride, rows, columns, exponents, others)
    _choose(b, exponents, count, counts, tables, coded)
    _zero(b, b.gep(others, [count]), index(GROUP))

    source, left, place = exponents, count, index(HEADER)
    for level, escapes in enumerate((*_ESCAPES, _ESCAPES[0])):
        # The count of the first level is known.
        if level:
            number = b.bitcast(b.gep(coded, [index(4 * (level - 1))]), LANE.as_pointer())
            b.store(b.trunc(left, LANE), number)
        # The padding of the last group has the code 0.
        filler = b.load(b.gep(coded, [index(TABLES[level])]))
        b.call(_set(module), [b.gep(source, [left]), filler, index(GROUP), _NO])
        full = rounded_up(b, left, GROUP)
        table = b.gep(tables, [index(_KINDS * level)])
        target = b.gep(scratch, [index(escapes * _MOST)])
        left = b.call(code, [source, full, table, codes, target])
        # The codes of the first level lie beside mantissas and signs.
        step = CODES if level else CODES + GROUP
        with loop(b, index(0), full, GROUP) as symbol:
            group = b.gep(coded, [b.add(place, b.mul(b.udiv(symbol, index(GROUP)), index(step)))])
            _pack(b, b.gep(codes, [symbol]), group)
            if not level:
                emit_copy(b, b.gep(group, [index(CODES)]), b.gep(others, [symbol]), index(GROUP))
        place = b.add(place, b.mul(b.udiv(full, index(GROUP)), index(step)))
        source = target
    number = b.bitcast(b.gep(coded, [index(8)]), LANE.as_pointer())
    b.store(b.trunc(left, LANE), number)
    _zero(b, b.gep(coded, [b.add(place, left)]), index(CODES))
    emit_copy(b, b.gep(coded, [place]), source, left)
    end = b.add(place, rounded_up(b, left, CODES))
    stored = b.add(index(HEADER), rounded_up(b, b.mul(count, index(ELEMENT)), CODES))
    with b.if_then(b.icmp_signed("<", end, stored)):
        emit_copy(b, out, coded, end)
        b.ret(end)
    _store(b, weights, stride, rows, columns, out, stored)
    b.ret(stored)
    return function


def _split(
    b: ir.IRBuilder,
    weights: ir.Value,
    stride: ir.Value,
    rows: ir.Value,
    columns: ir.Value,
    exponents: ir.Value,
    others: ir.Value,
) -> None:
    """Split each weight, rotated left by one bit, into its exponent and its mantissa with the sign."""
    with loop(b, index(0), rows, 1) as row:
        start = b.gep(weights, [b.mul(b.mul(row, stride), index(ELEMENT))])
        place = b.mul(row, columns)
        whole = b.and_(columns, index(-CODES))
        for begin, end, count in ((index(0), whole, CODES), (whole, columns, 1)):
            with loop(b, begin, end, count) as column:
                some = load_bytes(b, b.gep(start, [b.mul(column, index(ELEMENT))]), ELEMENT * count)
                weight = b.bitcast(some, ir.VectorType(_SHORT, count))
                one, eight, fifteen = (vector(_SHORT, [bits] * count) for bits in (1, 8, 15))
                turned = b.or_(b.shl(weight, one), b.lshr(weight, fifteen))
                here, half = b.add(place, column), ir.VectorType(BYTE, count)
                store(b, b.trunc(b.lshr(turned, eight), half), b.gep(exponents, [here]))
                store(b, b.trunc(turned, half), b.gep(others, [here]))


def _choose(
    b: ir.IRBuilder, exponents: ir.Value, count: ir.Value, counts: ir.Value, tables: ir.Value, coded: ir.Value
) -> None:
    """Write the nine most common exponents into the header, and each level's code of every exponent into the tables.

    Of equally common exponents the lower one comes first.
    """
    kinds = index(_KINDS)
    _zero(b, b.bitcast(counts, BYTES), index(4 * _COUNTERS * _KINDS))
    b.call(_set(b.module), [tables, ir.Constant(BYTE, ESCAPE), index(len(TABLES) * _KINDS), _NO])
    whole = b.and_(count, index(-_COUNTERS))
    for begin, end, step in ((index(0), whole, _COUNTERS), (whole, count, 1)):
        with loop(b, begin, end, step) as place:
            # With one counter an exponent that comes twice in a row would wait for itself.
            for own in range(step):
                kind = b.zext(b.load(b.gep(exponents, [b.add(place, index(own))])), INDEX)
                counter = b.gep(counts, [b.add(kind, index(own * _KINDS))])
                b.store(b.add(b.load(counter), ir.Constant(LANE, 1)), counter)
    with loop(b, index(0), kinds, 1) as kind:
        total = b.load(b.gep(counts, [kind]))
        for own in range(1, _COUNTERS):
            total = b.add(total, b.load(b.gep(counts, [b.add(kind, index(own * _KINDS))])))
        b.store(total, b.gep(counts, [kind]))
    with b.goto_entry_block():
        best = b.alloca(INDEX)
    for number in range(len(TABLES) * ESCAPE):
        level, code = divmod(number, ESCAPE)
        b.store(index(0), best)
        with loop(b, index(1), kinds, 1) as kind:
            found, held = (b.load(b.gep(counts, [place])) for place in (kind, b.load(best)))
            b.store(b.select(b.icmp_signed(">", found, held), kind, b.load(best)), best)
        chosen = b.load(best)
        b.store(ir.Constant(LANE, -1), b.gep(counts, [chosen]))
        b.store(ir.Constant(BYTE, code), b.gep(tables, [b.add(chosen, index(_KINDS * level))]))
        b.store(b.trunc(chosen, BYTE), b.gep(coded, [index(TABLES[level] + code)]))


def _emit_code(module: ir.Module) -> ir.Function:
    """`code(symbols, count, table, codes, escapes)` -> number of escapes; writes the codes and the escaped symbols."""
    function = ir.Function(module, ir.FunctionType(INDEX, [BYTES, INDEX, BYTES, BYTES, BYTES]), "code")
    function.linkage = "internal"
    symbols, count, table, codes, escapes = function.args
    b = ir.IRBuilder(function.append_basic_block())
    escaped = b.alloca(INDEX)
    b.store(index(0), escaped)
    with loop(b, index(0), count, 1) as place:
        symbol = b.load(b.gep(symbols, [place]))
        code = b.load(b.gep(table, [b.zext(symbol, INDEX)]))
        b.store(code, b.gep(codes, [place]))
        b.store(symbol, b.gep(escapes, [b.load(escaped)]))
        more = b.zext(b.icmp_unsigned("==", code, ir.Constant(BYTE, ESCAPE)), INDEX)
        b.store(b.add(b.load(escaped), more), escaped)
    b.ret(b.load(escaped))
    return function


def _pack(b: ir.IRBuilder, codes: ir.Value, out: ir.Value) -> None:
    """Pack 64 codes into 16 bytes."""
    packed = load_bytes(b, codes, CODES)
    for quarter in range(1, 4):
        some = load_bytes(b, b.gep(codes, [index(quarter * CODES)]), CODES)
        packed = b.or_(packed, b.shl(some, vector(BYTE, [2 * quarter] * CODES)))
    store(b, packed, out)


def _store(
    b: ir.IRBuilder,
    weights: ir.Value,
    stride: ir.Value,
    rows: ir.Value,
    columns: ir.Value,
    out: ir.Value,
    whole: ir.Value,
) -> None:
    """Store a panel uncoded, in `whole` bytes."""
    _zero(b, out, index(HEADER))
    b.store(ir.Constant(BYTE, 1), b.gep(out, [index(STORED)]))
    _zero(b, b.gep(out, [b.sub(whole, index(CODES))]), index(CODES))
    nbytes = b.mul(columns, index(ELEMENT))
    with loop(b, index(0), rows, 1) as row:
        source = b.gep(weights, [b.mul(b.mul(row, stride), index(ELEMENT))])
        emit_copy(b, b.gep(out, [b.add(index(HEADER), b.mul(row, nbytes))]), source, nbytes)


def _zero(b: ir.IRBuilder, target: ir.Value, nbytes: ir.Value) -> None:
    b.call(_set(b.module), [target, ir.Constant(BYTE, 0), nbytes, _NO])


def _set(module: ir.Module) -> ir.Function:
    return module.declare_intrinsic("llvm.memset", [BYTES, INDEX])
