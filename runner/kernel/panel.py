"""The decoder of one panel of a losslessly coded matrix, in machine code, and the format that it reads.

A bfloat16 number, rotated left by one bit, is a byte of exponent and a byte of mantissa and sign. The latter is noise
and is kept; a panel has few exponents, which are coded in three levels of two bits. On each level codes 0 to 2 stand
for the level's three exponents, the most common that are left; code 3 is an escape to the next level. What escapes the
third is kept as bytes.

    header      32 bytes: counts of symbols on level 2, on level 3, and kept as bytes; whether the panel is stored
                uncoded; the exponents of the three levels
    groups      of 64 weights: 16 bytes of codes, 64 of mantissa and sign
    level 2     16 bytes of codes for 64 symbols
    level 3     the same
    bytes       padded to a multiple of 16

Byte j of 16 bytes of codes holds those of the symbols j, 16 + j, 32 + j and 48 + j, the first in the lowest bits. So
one shift and one mask extract 16 codes, and a table of 256 entries maps the escapes to the next level's symbols. A
panel that would not become smaller is stored: the header, then its weights.

Normal weights take 2 + 2 * 0.24 + 2 * 0.05 + 8 * 0.008 = 2.65 bits for an exponent, 0.666 of bfloat16 in all.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir

from runner.kernel.emit import (
    BYTE,
    BYTES,
    INDEX,
    LANE,
    constant_bytes,
    index,
    intrinsic,
    load_bytes,
    loop,
    rounded_up,
    store,
    vector,
)

HEADER = 32
# The byte of the header that is 1 if the weights follow uncoded, and where the exponents of each level begin.
STORED = 12
TABLES = (16, 20, 24)
# Symbols of a group, and bytes of their codes.
GROUP, CODES = 64, 16
ESCAPE = 3
# Bytes that may be read or written beyond what is asked for.
SLACK = 128

_HALVES = ir.IntType(16)
# For a mask of 8 codes: the rank of each escape among the escapes, and 128, which gives zero, for the others.
_PLACES = bytes(
    (mask & (1 << bit) - 1).bit_count() if mask >> bit & 1 else 128 for mask in range(256) for bit in range(8)
)
_BEHIND = bytes(count if place >= 8 else 0 for count in range(9) for place in range(16))


def scratch_bytes(weights: int) -> int:
    """Bytes of memory to decode a panel of `weights` weights: these first, then the symbols of levels 2, 3 and 4."""
    return 5 * (weights + SLACK)


def emit_decode(module: ir.Module, *, shuffles: bool | None = None) -> ir.Function:
    """`decode(panel, end, weights, scratch)` -> bytes of the panel, or -1 if it is damaged.

    It reads nothing at or beyond `end` and writes nothing outside of the scratch memory, whatever the panel holds.
    `shuffles` says whether to move bytes by x86's instruction for it; by default if the processor has it.
    """
    if shuffles is None:
        shuffles = bool(llvm.get_host_cpu_features().get("ssse3", False))
    function = ir.Function(module, ir.FunctionType(INDEX, [BYTES, BYTES, INDEX, BYTES]), "decode")
    function.linkage = "internal"
    function.attributes.add("noinline")
    panel, end, weights, scratch = function.args
    b = ir.IRBuilder(function.append_basic_block())
    step = b.add(weights, index(SLACK))
    levels = [b.gep(scratch, [b.mul(step, index(count))]) for count in (2, 3, 4)]
    room = b.sub(b.ptrtoint(end, INDEX), b.ptrtoint(panel, INDEX))
    with b.if_then(b.icmp_signed("<", room, index(HEADER)), likely=False):
        b.ret(index(-1))
    is_stored = b.icmp_unsigned("!=", b.load(b.gep(panel, [index(STORED)])), ir.Constant(BYTE, 0))
    with b.if_then(is_stored, likely=False):
        nbytes = b.mul(weights, index(2))
        whole = b.add(rounded_up(b, nbytes, CODES), index(HEADER))
        with b.if_then(b.icmp_signed("<", room, whole), likely=False):
            b.ret(index(-1))
        emit_copy(b, scratch, b.gep(panel, [index(HEADER)]), nbytes)
        b.ret(whole)
    counts = [_count(b, panel, place) for place in (0, 4, 8)]
    for count in counts:
        with b.if_then(b.icmp_signed(">", count, weights), likely=False):
            b.ret(index(-1))
    groups = b.udiv(rounded_up(b, weights, GROUP), index(GROUP))
    second = b.add(index(HEADER), b.mul(groups, index(CODES + GROUP)))
    third = b.add(second, _code_bytes(b, counts[0]))
    rest = b.add(third, _code_bytes(b, counts[1]))
    whole = b.add(rest, rounded_up(b, counts[2], CODES))
    with b.if_then(b.icmp_signed("<", room, whole), likely=False):
        b.ret(index(-1))
    emit_copy(b, levels[2], b.gep(panel, [rest]), counts[2])
    # From the last level to the first: each is the source of the one before.
    coded = [_Level(b, panel, *each, shuffles) for each in zip(TABLES, levels, strict=True)]
    _symbols(b, coded[2], b.gep(panel, [third]), counts[1], levels[1])
    _symbols(b, coded[1], b.gep(panel, [second]), counts[0], levels[0])
    _weights(b, coded[0], b.gep(panel, [index(HEADER)]), groups, scratch)
    b.ret(whole)
    return function


def _count(b: ir.IRBuilder, panel: ir.Value, place: int) -> ir.Value:
    value = b.load(b.bitcast(b.gep(panel, [index(place)]), LANE.as_pointer()))
    value.align = 1
    return b.zext(value, INDEX)


def _code_bytes(b: ir.IRBuilder, symbols: ir.Value) -> ir.Value:
    return b.udiv(rounded_up(b, symbols, GROUP), index(GROUP // CODES))


def emit_copy(b: ir.IRBuilder, target: ir.Value, source: ir.Value, nbytes: ir.Value) -> None:
    """Copy bytes that do not overlap."""
    copy = b.module.declare_intrinsic("llvm.memcpy", [BYTES, BYTES, INDEX])
    b.call(copy, [target, source, nbytes, ir.Constant(ir.IntType(1), 0)])


def _symbols(b: ir.IRBuilder, level: _Level, codes: ir.Value, count: ir.Value, target: ir.Value) -> None:
    """Write the `count` symbols of one level, padded, as bytes."""
    with loop(b, index(0), count, GROUP) as symbol:
        group = load_bytes(b, b.gep(codes, [b.udiv(symbol, index(GROUP // CODES))]), CODES)
        for quarter in range(4):
            place = b.add(symbol, index(quarter * CODES))
            store(b, level.symbols(group, quarter), b.gep(target, [place]))


def _weights(b: ir.IRBuilder, level: _Level, group: ir.Value, groups: ir.Value, target: ir.Value) -> None:
    """Write the weights: the symbols of the first level with the mantissas and signs that lie beside their codes."""
    with loop(b, index(0), groups, 1) as number:
        here = b.gep(group, [b.mul(number, index(CODES + GROUP))])
        codes = load_bytes(b, here, CODES)
        for quarter in range(4):
            exponents = level.symbols(codes, quarter)
            others = load_bytes(b, b.gep(here, [index(CODES * (quarter + 1))]), CODES)
            pairs = [half * CODES + lane for lane in range(CODES) for half in (0, 1)]
            turned = b.bitcast(
                b.shuffle_vector(others, exponents, vector(LANE, pairs)), ir.VectorType(_HALVES, CODES)
            )
            one, fifteen = (vector(_HALVES, [bits] * CODES) for bits in (1, 15))
            weights = b.or_(b.lshr(turned, one), b.shl(turned, fifteen))
            place = b.add(b.mul(number, index(2 * GROUP)), index(2 * CODES * quarter))
            store(b, weights, b.gep(target, [place]))


class _Level:
    """One level of codes: its table, and the address in `source` of its next escape, a symbol of the level after it."""

    def __init__(
        self, b: ir.IRBuilder, panel: ir.Value, table: int, source: ir.Value, shuffles: bool
    ) -> None:
        self._b, self._shuffles = b, shuffles
        # Only an alloca of the entry block can become a register.
        with b.goto_entry_block():
            self._next = b.alloca(BYTES)
        b.store(source, self._next)
        # The fourth byte of a table is zero in every sound panel; escapes have symbols of their own.
        four = load_bytes(b, b.gep(panel, [index(table)]), 4)
        zero = ir.Constant(four.type, [0] * 4)
        self._table = b.shuffle_vector(four, zero, vector(LANE, [0, 1, 2, *[4] * 13]))

    def symbols(self, group: ir.Value, quarter: int) -> ir.Value:
        """16 bytes: the symbols of one quarter of a group of codes."""
        b = self._b
        shifted = b.lshr(group, vector(BYTE, [2 * quarter] * CODES)) if quarter else group
        codes = b.and_(shifted, vector(BYTE, [ESCAPE] * CODES))
        return self._shuffled(codes) if self._shuffles else self._one_by_one(codes)

    def _shuffled(self, codes: ir.Value) -> ir.Value:
        b = self._b
        escapes = b.bitcast(b.icmp_unsigned("==", codes, vector(BYTE, [ESCAPE] * CODES)), _HALVES)
        low = b.zext(b.and_(escapes, ir.Constant(_HALVES, 255)), INDEX)
        high = b.zext(b.lshr(escapes, ir.Constant(_HALVES, 8)), INDEX)
        before, behind = (intrinsic(b, "llvm.ctpop.i64", INDEX, [mask]) for mask in (low, high))
        places = constant_bytes(b.module, "places", _PLACES)
        halves = [load_bytes(b, b.gep(places, [b.mul(mask, index(8))]), 8) for mask in (low, high)]
        both = b.shuffle_vector(*halves, vector(LANE, list(range(CODES))))
        table = constant_bytes(b.module, "behind", _BEHIND)
        both = b.add(both, load_bytes(b, b.gep(table, [b.mul(before, index(CODES))]), CODES))
        source = b.load(self._next)
        escaped = _moved(b, load_bytes(b, source, CODES), both)
        b.store(b.gep(source, [b.add(before, behind)]), self._next)
        return b.or_(_moved(b, self._table, codes), escaped)

    def _one_by_one(self, codes: ir.Value) -> ir.Value:
        b = self._b
        found = ir.Constant(codes.type, [0] * CODES)
        source = b.load(self._next)
        for lane in (ir.Constant(LANE, number) for number in range(CODES)):
            code = b.extract_element(codes, lane)
            escapes = b.icmp_unsigned("==", code, ir.Constant(BYTE, ESCAPE))
            known = b.extract_element(self._table, b.zext(code, LANE))
            found = b.insert_element(found, b.select(escapes, b.load(source), known), lane)
            source = b.gep(source, [b.zext(escapes, INDEX)])
        b.store(source, self._next)
        return found


def _moved(b: ir.IRBuilder, values: ir.Value, places: ir.Value) -> ir.Value:
    """16 bytes of `values` by index; zero for an index with its highest bit set."""
    return intrinsic(b, "llvm.x86.ssse3.pshuf.b.128", values.type, [values, places])
