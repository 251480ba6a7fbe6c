"""The machine code of the matrix product; matmul.py says what it computes and why in this order.

How it is fast: a few rows and a few columns are multiplied at a time with all their sums in registers (`TILES`), and
a group of columns stays in the cache until all rows have used it. Coded weights are decoded a panel at a time into
memory that stays in the cache, right before their use. Short rows of weights are prefetched, since the processor alone
would fetch them too late. One row runs at the memory's speed, many rows at that of the multipliers; docs/performance.md
has the measurements.
"""

from __future__ import annotations

import torch
from llvmlite import ir

from runner.format.coded import PANEL_COLUMNS, ROW_GROUP_ROWS
from runner.kernel.emit import (
    BYTE,
    BYTES,
    INDEX,
    LANE,
    SINGLE,
    VOID,
    index,
    intrinsic,
    loop,
    new_module,
    offset,
    smaller,
)
from runner.kernel.panel import emit_decode
from runner.kernel.threads import ARGUMENTS, FAILED, SHARE, TASK

# float32 in one 256-bit register
LANES = 8
# Columns of x and of the weights at a time; fewer do not keep the memory busy.
COLUMN_CHUNK = PANEL_COLUMNS
# Rows of x that are multiplied with a group of outputs before the next group.
ROWS_IN_CACHE = 64
# A multiple of all numbers of outputs in TILES.
OUTPUTS_IN_CACHE = ROW_GROUP_ROWS
# rows -> outputs at a time; sums, weights and x share 16 registers.
TILES = {1: 6, 2: 4, 3: 3, 4: 3}

_STORED = {torch.bfloat16: ir.IntType(16), torch.float16: ir.HalfType(), torch.float32: SINGLE}


def product_module(dtype: torch.dtype | None) -> ir.Module:
    """`compute_shares(table, scratch)`, a `TASK`, for weights of a dtype; without one, for coded weights.

    Its arguments: weight, its strides over b and n; x, over b and t; out, over b and t; B, T, N, K, outputs in a share.
    Strides are in elements. Coded weights are bytes: the address of the offsets of their row groups replaces the stride
    over n, and B is 1. The task fails if they are damaged.
    """
    coded, module = dtype is None, new_module()
    product = _product(module, BYTE if coded else _STORED[dtype], _Decoded if coded else _Stored)
    weight_type, x_type, out_type = (product.args[place].type for place in (0, 2, 4))
    function = ir.Function(module, TASK, "compute_shares")
    table, scratch = function.args
    b = ir.IRBuilder(function.append_basic_block())
    at = offset(b)
    words = (b.load(b.gep(table, [index(ARGUMENTS + place)])) for place in range(14))

    def matrix(kind: ir.Type) -> tuple[ir.Value, ir.Value, ir.Value]:
        return b.inttoptr(next(words), kind), next(words), next(words)

    weight, weight_step, weight_stride = matrix(weight_type)
    x, x_step, x_stride = matrix(x_type)
    out, out_step, out_stride = matrix(out_type)
    B, T, N, K, share = words
    shares = b.sdiv(b.sub(b.add(N, share), index(1)), share)  # of each of the B products
    total = b.mul(B, shares)
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    mine = b.atomic_rmw("add", b.gep(table, [index(SHARE)]), index(1), "seq_cst")
    b.cbranch(b.icmp_signed("<", mine, total), body, done)
    b.position_at_end(body)
    each, n = b.sdiv(mine, shares), b.mul(b.srem(mine, shares), share)
    if coded:
        weight_stride = b.add(weight_stride, b.mul(b.sdiv(n, index(ROW_GROUP_ROWS)), index(8)))
    else:
        weight = at(at(weight, each, weight_step, index(0)), n, weight_stride, index(0))
    x, out = at(x, each, x_step, index(0)), at(out, each, out_step, n)
    count = smaller(b, share, b.sub(N, n))
    failed = b.gep(table, [index(FAILED)])
    b.call(product, [weight, weight_stride, x, x_stride, out, out_stride, T, count, K, failed, scratch])
    b.branch(head)
    b.position_at_end(done)
    b.ret_void()
    return module


class _Stored:
    """Weights that are used as they lie in memory."""

    in_memory = True

    def __init__(self, module: ir.Module, b: ir.IRBuilder, product: ir.Function) -> None:
        self._b = b
        self.weight, self.stride = product.args[:2]
        self.tile_type = self.weight.type

    def begin(self, start: ir.Value) -> None:
        """Begin the group of outputs from `start`, at their first column."""

    def chunk(self, start: ir.Value, stop: ir.Value, k: ir.Value, columns: ir.Value) -> None:
        """Begin the group's columns from `k`."""
        self._k = k

    def end(self) -> None:
        """End the group."""

    def row(self, n: ir.Value) -> ir.Value:
        """The address of output `n` in these columns."""
        return offset(self._b)(self.weight, n, self.stride, self._k)


class _Decoded:
    """Coded weights, decoded into `scratch` a panel at a time: those that `begin` and `chunk` name."""

    # They are in the cache when they are multiplied.
    in_memory = False

    def __init__(self, module: ir.Module, b: ir.IRBuilder, product: ir.Function) -> None:
        self._b, self._decode = b, emit_decode(module)
        self._coded, offsets = product.args[:2]
        self._failed, self._scratch = product.args[9:]
        self._offsets = b.inttoptr(offsets, INDEX.as_pointer())
        self._panel, self._end = b.alloca(BYTES), b.alloca(BYTES)
        self.tile_type = _STORED[torch.bfloat16].as_pointer()

    def begin(self, start: ir.Value) -> None:
        b = self._b
        row_group = b.sdiv(start, index(ROW_GROUP_ROWS))
        for buffer, place in ((self._panel, row_group), (self._end, b.add(row_group, index(1)))):
            b.store(b.gep(self._coded, [b.load(b.gep(self._offsets, [place]))]), buffer)

    def chunk(self, start: ir.Value, stop: ir.Value, k: ir.Value, columns: ir.Value) -> None:
        b = self._b
        panel, weights = b.load(self._panel), b.mul(b.sub(stop, start), columns)
        taken = b.call(self._decode, [panel, b.load(self._end), weights, self._scratch])
        self._give_up_if(b.icmp_signed("<", taken, index(0)))
        b.store(b.gep(panel, [taken]), self._panel)
        self._start, self.stride = start, columns

    def end(self) -> None:
        b = self._b
        # A row group consists of its panels and nothing else.
        self._give_up_if(b.icmp_unsigned("!=", b.load(self._panel), b.load(self._end)))

    def _give_up_if(self, damaged: ir.Value) -> None:
        b = self._b
        with b.if_then(damaged, likely=False):
            b.atomic_rmw("xchg", self._failed, index(1), "seq_cst")
            b.ret_void()

    def row(self, n: ir.Value) -> ir.Value:
        b = self._b
        weights = b.bitcast(self._scratch, self.tile_type)
        return offset(b)(weights, b.sub(n, self._start), self.stride, index(0))


def _product(module: ir.Module, stored: ir.Type, source: type[_Stored | _Decoded]) -> ir.Function:
    """One product on one thread: `product(weight, stride, x, stride, out, stride, T, N, K, failed, scratch)`."""
    types = [stored.as_pointer(), INDEX, SINGLE.as_pointer(), INDEX, SINGLE.as_pointer(), *[INDEX] * 4]
    function = ir.Function(module, ir.FunctionType(VOID, [*types, INDEX.as_pointer(), BYTES]), "product")
    function.linkage = "internal"
    x, x_stride, out, out_stride, T, N, K = function.args[2:9]
    b = ir.IRBuilder(function.append_basic_block())
    at = offset(b)
    weights = source(module, b, function)
    element = weights.tile_type.pointee
    tiles = {
        (rows, n): _tile(module, element, rows, n, fetches_ahead=source.in_memory and n == most)
        for rows, most in TILES.items()
        for n in (most, 1)
    }
    ahead = index(0)
    # The processor fetches long rows well enough by itself.
    if source.in_memory:
        ahead = b.select(b.icmp_signed("<=", K, index(COLUMN_CHUNK)), weights.stride, ahead)

    def tile(rows: int, outputs: int, t: ir.Value, n: ir.Value, k: ir.Value, columns: ir.Value) -> None:
        b.call(
            tiles[rows, outputs],
            [weights.row(n), weights.stride, ahead, at(x, t, x_stride, k), x_stride,
             at(out, t, out_stride, n), out_stride, columns],
        )  # fmt: skip

    def outputs_of(
        rows: int, t: ir.Value, start: ir.Value, stop: ir.Value, k: ir.Value, columns: ir.Value
    ) -> None:
        most = TILES[rows]
        whole = b.sub(stop, b.srem(b.sub(stop, start), index(most)))
        with loop(b, start, whole, most) as n:
            tile(rows, most, t, n, k, columns)
        with loop(b, whole, stop, 1) as n:
            tile(rows, 1, t, n, k, columns)

    most_rows = max(TILES)
    with loop(b, index(0), T, ROWS_IN_CACHE) as first:
        last = smaller(b, T, b.add(first, index(ROWS_IN_CACHE)))
        rest = b.srem(b.sub(last, first), index(most_rows))
        whole = b.sub(last, rest)
        with loop(b, index(0), N, OUTPUTS_IN_CACHE) as start:
            stop = smaller(b, N, b.add(start, index(OUTPUTS_IN_CACHE)))
            weights.begin(start)
            with loop(b, index(0), K, COLUMN_CHUNK) as k:
                columns = smaller(b, index(COLUMN_CHUNK), b.sub(K, k))
                weights.chunk(start, stop, k, columns)
                with loop(b, first, whole, most_rows) as t:
                    outputs_of(most_rows, t, start, stop, k, columns)
                for rows in range(1, most_rows):
                    with b.if_then(b.icmp_signed("==", rest, index(rows))):
                        outputs_of(rows, whole, start, stop, k, columns)
            weights.end()
    b.ret_void()
    return function


def _tile(module: ir.Module, stored: ir.Type, rows: int, outputs: int, *, fetches_ahead: bool) -> ir.Function:
    """`rows` x `outputs` sums over one chunk of columns, kept in registers and added to `out` at its end.

    One that fetches ahead prefetches the weights of the next outputs, at a stride of `ahead`.
    """
    types = [stored.as_pointer(), INDEX, INDEX, SINGLE.as_pointer(), INDEX, SINGLE.as_pointer(), INDEX, INDEX]
    function = ir.Function(module, ir.FunctionType(VOID, types), f"tile_{rows}_{outputs}")
    function.linkage = "internal"
    # The registers are counted for one tile.
    function.attributes.add("noinline")
    weight, weight_stride, ahead, x, x_stride, out, out_stride, K = function.args
    b = ir.IRBuilder(function.append_basic_block())
    at = offset(b)
    weight_rows = [at(weight, index(n), weight_stride, index(0)) for n in range(outputs)]
    x_rows = [at(x, index(t), x_stride, index(0)) for t in range(rows)]
    places = [(t, n) for t in range(rows) for n in range(outputs)]

    vector = ir.VectorType(SINGLE, LANES)
    lanes = {place: b.alloca(vector) for place in places}
    for buffer in lanes.values():
        b.store(ir.Constant(vector, [0.0] * LANES), buffer)
    whole = b.and_(K, index(-LANES))
    with loop(b, index(0), whole, LANES) as k:
        for n in range(outputs if fetches_ahead else 0):
            _fetch(b, at(weight, index(outputs + n), ahead, k))
        weights = [_widened(b, _load(b, row, k, LANES)) for row in weight_rows]
        for t, row in enumerate(x_rows):
            values = _load(b, row, k, LANES)
            for n in range(outputs):
                buffer = lanes[t, n]
                b.store(_fused(b, weights[n], values, b.load(buffer)), buffer)

    sums = {place: b.alloca(SINGLE) for place in places}
    for place in places:
        b.store(_folded(b, b.load(lanes[place])), sums[place])
    # Columns beyond the last whole vector.
    with loop(b, whole, K, 1) as k:
        for (t, n), buffer in sums.items():
            weight_value = _widened(b, _load(b, weight_rows[n], k, 1))
            b.store(_fused(b, weight_value, _load(b, x_rows[t], k, 1), b.load(buffer)), buffer)
    for (t, n), buffer in sums.items():
        place = at(out, index(t), out_stride, index(n))
        b.store(b.fadd(b.load(place), b.load(buffer)), place)
    b.ret_void()
    return function


def _load(b: ir.IRBuilder, row: ir.Value, k: ir.Value, count: int) -> ir.Value:
    """`count` elements from column k; a vector if that is more than one."""
    element = row.type.pointee
    kind = ir.VectorType(element, count) if count > 1 else element
    value = b.load(b.bitcast(b.gep(row, [k]), kind.as_pointer()))
    value.align = 4 if element == SINGLE else 2
    return value


def _fetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Prefetch the cache line with this address, which may lie outside of the process's memory."""
    # For reading, kept in all caches, data.
    hints = [ir.Constant(LANE, hint) for hint in (0, 3, 1)]
    intrinsic(b, "llvm.prefetch.p0i8", VOID, [b.bitcast(address, BYTES), *hints])


def _widened(b: ir.IRBuilder, stored: ir.Value) -> ir.Value:
    """Stored weights as exact float32; bfloat16 comes as its bits, the upper half of a float32's."""
    count = getattr(stored.type, "count", 1)
    element = stored.type.element if count > 1 else stored.type
    as_vector = (lambda kind: ir.VectorType(kind, count)) if count > 1 else (lambda kind: kind)
    if element == SINGLE:
        return stored
    if isinstance(element, ir.HalfType):
        return b.fpext(stored, as_vector(SINGLE))
    sixteen = ir.Constant(as_vector(LANE), [16] * count if count > 1 else 16)
    return b.bitcast(b.shl(b.zext(stored, as_vector(LANE)), sixteen), as_vector(SINGLE))


def _fused(b: ir.IRBuilder, left: ir.Value, right: ir.Value, addend: ir.Value) -> ir.Value:
    """left * right + addend, rounded once."""
    name = f"llvm.fma.v{LANES}f32" if isinstance(left.type, ir.VectorType) else "llvm.fma.f32"
    return intrinsic(b, name, left.type, [left, right, addend])


def _folded(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of all lanes: the upper half is added to the lower half until one lane is left."""
    width = LANES
    while width > 1:
        nothing = ir.Constant(vector.type, ir.Undefined)
        half = ir.VectorType(LANE, width // 2)
        lower = b.shuffle_vector(vector, nothing, ir.Constant(half, list(range(width // 2))))
        upper = b.shuffle_vector(vector, nothing, ir.Constant(half, list(range(width // 2, width))))
        vector = b.fadd(lower, upper)
        width //= 2
    return b.extract_element(vector, ir.Constant(LANE, 0))
