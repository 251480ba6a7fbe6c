"""The matrix product of a pass, compiled for this processor: float32 rows times weights in the form they are stored in.

    out[b, t, n] += sum over k of x[b, t, k] * weight[b, n, k]

Every sum is taken in one order, whatever the number of rows, the cut of the matrix into pieces, or the number of
threads: 8 lanes over each 1,024 columns, the lanes folded in halves, these partial sums one after another, each
multiplication fused with its addition. So a row's result has the same bits alone and in company, and on every
processor. Columns beyond the last multiple of 8 come after the lanes, one by one; zeros up to it change nothing.

How it is fast: a few rows and a few columns are multiplied at a time with all their sums in registers (`TILES`), and
a group of columns stays in the cache until all rows have used it. One row runs at the memory's speed; many rows at
that of the multipliers. docs/performance.md has the measurements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from runner.workers import Workers

LANES = 8  # float32 in one 256-bit register
COLUMN_CHUNK = 1024  # of x and of the weights: 4 rows of x are 16 kB, and stay in the first-level cache
ROWS_IN_CACHE = 64  # rows of x that are multiplied with a group of outputs before the next group
OUTPUTS_IN_CACHE = 12  # a multiple of all that TILES names
WORTH_SHARING = 2**18  # multiplications; fewer are done before another thread has begun
TILES = {1: 4, 2: 4, 3: 3, 4: 3}  # rows -> outputs at a time; sums, weights and x share 16 registers

_INDEX, _SINGLE, _LANE = ir.IntType(64), ir.FloatType(), ir.IntType(32)
_STORED = {torch.bfloat16: ir.IntType(16), torch.float16: ir.HalfType(), torch.float32: _SINGLE}
_VOID = ir.VoidType()


class Kernel:
    """The product for weights of one dtype, on the threads of `workers`."""

    def __init__(self, dtype: torch.dtype, workers: Workers) -> None:
        self._workers = workers
        self._product = _compiled(dtype)

    def accumulate(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Add `x @ weight.T` to `out`: x [T, K] float32, weight [N, K], out [T, N] float32; all dense along rows."""
        N = weight.shape[0]
        groups = -(-N // OUTPUTS_IN_CACHE)

        def share(index: int, count: int) -> None:
            start = groups * index // count * OUTPUTS_IN_CACHE
            stop = min(N, groups * (index + 1) // count * OUTPUTS_IN_CACHE)
            if start < stop:
                self._run(x[None], weight[None, start:stop], out[None, :, start:stop])

        self._workers.run(share)

    def accumulate_each(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """The same for B products at once: x [B, T, K], weight [B, N, K], out [B, T, N]."""
        B = len(x)

        def share(index: int, count: int) -> None:
            each = slice(B * index // count, B * (index + 1) // count)
            self._run(x[each], weight[each], out[each])

        if weight.shape.numel() * x.shape[1] < WORTH_SHARING:
            share(0, 1)
        else:
            self._workers.run(share)

    def _run(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        B, T, K = x.shape
        if not (x.stride(2) == weight.stride(2) == out.stride(2) == 1 or min(out.shape) == 0):
            raise ValueError("the rows of a product must be dense")
        self._product(
            weight.data_ptr(), weight.stride(0), weight.stride(1), x.data_ptr(), x.stride(0), x.stride(1),
            out.data_ptr(), out.stride(0), out.stride(1), B, T, weight.shape[1], K,
        )  # fmt: skip


@cache
def _compiled(dtype: torch.dtype) -> Callable[..., None]:
    """The machine code for one dtype as a function that runs without the interpreter's lock; takes half a second."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    host = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=host, opt=3, jit=True
    )
    module = llvm.parse_assembly(str(_module(dtype)))
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    signature = ctypes.CFUNCTYPE(None, *[pointer, number, number] * 3, *[number] * 4)
    function = signature(engine.get_function_address("product"))
    function.engine = engine  # the code lives as long as the engine does
    return function


def _module(dtype: torch.dtype) -> ir.Module:
    """`product(weight, its strides over b and n, x, over b and t, out, over b and t, B, T, N, K)`, in elements."""
    module = ir.Module("bloomdesk")
    module.triple = llvm.get_default_triple()
    stored = _STORED[dtype]
    tiles = {(rows, n): _tile(module, stored, rows, n) for rows, most in TILES.items() for n in (most, 1)}
    pointers = [stored.as_pointer(), _SINGLE.as_pointer(), _SINGLE.as_pointer()]
    types = [kind for pointer in pointers for kind in (pointer, _INDEX, _INDEX)]
    function = ir.Function(module, ir.FunctionType(_VOID, types + [_INDEX] * 4), "product")
    weights, weight_step, weight_stride, xs, x_step, x_stride, outs, out_step, out_stride, B, T, N, K = (
        function.args
    )
    b = ir.IRBuilder(function.append_basic_block())
    at = _offset(b)

    def tile(rows: int, outputs: int, t: ir.Value, n: ir.Value, k: ir.Value) -> None:
        columns = _smaller(b, _index(COLUMN_CHUNK), b.sub(K, k))
        b.call(
            tiles[rows, outputs],
            [at(weight, n, weight_stride, k), weight_stride, at(x, t, x_stride, k), x_stride,
             at(out, t, out_stride, n), out_stride, columns],
        )  # fmt: skip

    def outputs_of(rows: int, t: ir.Value, start: ir.Value, stop: ir.Value, k: ir.Value) -> None:
        most = TILES[rows]
        whole = b.sub(stop, b.srem(b.sub(stop, start), _index(most)))
        with _loop(b, start, whole, most) as n:
            tile(rows, most, t, n, k)
        with _loop(b, whole, stop, 1) as n:
            tile(rows, 1, t, n, k)

    most_rows = max(TILES)
    with _loop(b, _index(0), B, 1) as each:
        weight, x, out = (
            at(base, each, step, _index(0))
            for base, step in ((weights, weight_step), (xs, x_step), (outs, out_step))
        )
        with _loop(b, _index(0), T, ROWS_IN_CACHE) as first:
            last = _smaller(b, T, b.add(first, _index(ROWS_IN_CACHE)))
            rest = b.srem(b.sub(last, first), _index(most_rows))
            whole = b.sub(last, rest)
            with _loop(b, _index(0), N, OUTPUTS_IN_CACHE) as start:
                stop = _smaller(b, N, b.add(start, _index(OUTPUTS_IN_CACHE)))
                with _loop(b, _index(0), K, COLUMN_CHUNK) as k:
                    with _loop(b, first, whole, most_rows) as t:
                        outputs_of(most_rows, t, start, stop, k)
                    for rows in range(1, most_rows):
                        with b.if_then(b.icmp_signed("==", rest, _index(rows))):
                            outputs_of(rows, whole, start, stop, k)
    b.ret_void()
    return module


def _tile(module: ir.Module, stored: ir.Type, rows: int, outputs: int) -> ir.Function:
    """`rows` x `outputs` sums over one chunk of columns, all of them in registers, added to `out` at its end."""
    types = [stored.as_pointer(), _INDEX, _SINGLE.as_pointer(), _INDEX, _SINGLE.as_pointer(), _INDEX, _INDEX]
    function = ir.Function(module, ir.FunctionType(_VOID, types), f"tile_{rows}_{outputs}")
    function.linkage = "internal"
    function.attributes.add("noinline")  # the registers are counted for one tile
    weight, weight_stride, x, x_stride, out, out_stride, K = function.args
    b = ir.IRBuilder(function.append_basic_block())
    at = _offset(b)
    weight_rows = [at(weight, _index(n), weight_stride, _index(0)) for n in range(outputs)]
    x_rows = [at(x, _index(t), x_stride, _index(0)) for t in range(rows)]
    places = [(t, n) for t in range(rows) for n in range(outputs)]

    vector = ir.VectorType(_SINGLE, LANES)
    lanes = {place: b.alloca(vector) for place in places}
    for slot in lanes.values():
        b.store(ir.Constant(vector, [0.0] * LANES), slot)
    whole = b.and_(K, _index(-LANES))
    with _loop(b, _index(0), whole, LANES) as k:
        weights = [_widened(b, _load(b, row, k, LANES)) for row in weight_rows]
        for t, row in enumerate(x_rows):
            values = _load(b, row, k, LANES)
            for n in range(outputs):
                slot = lanes[t, n]
                b.store(_fused(b, weights[n], values, b.load(slot)), slot)

    sums = {place: b.alloca(_SINGLE) for place in places}
    for place in places:
        b.store(_folded(b, b.load(lanes[place])), sums[place])
    with _loop(b, whole, K, 1) as k:  # columns beyond the last whole vector
        for (t, n), slot in sums.items():
            weight_value = _widened(b, _load(b, weight_rows[n], k, 1))
            b.store(_fused(b, weight_value, _load(b, x_rows[t], k, 1), b.load(slot)), slot)
    for (t, n), slot in sums.items():
        place = at(out, _index(t), out_stride, _index(n))
        b.store(b.fadd(b.load(place), b.load(slot)), place)
    b.ret_void()
    return function


def _index(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)


def _smaller(b: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", left, right), left, right)


def _offset(b: ir.IRBuilder) -> Callable[[ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]:
    """The address of `[row, column]` in a matrix of a given stride."""
    return lambda base, row, stride, column: b.gep(base, [b.add(b.mul(row, stride), column)])


@contextmanager
def _loop(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
    """`for index in range(start, stop, step)`."""
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(_INDEX)
    index.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", index, stop), body, done)
    b.position_at_end(body)
    yield index
    index.add_incoming(b.add(index, _index(step)), b.block)
    b.branch(head)
    b.position_at_end(done)


def _load(b: ir.IRBuilder, row: ir.Value, k: ir.Value, count: int) -> ir.Value:
    """`count` elements from column k on; a vector where that is more than one."""
    element = row.type.pointee
    kind = ir.VectorType(element, count) if count > 1 else element
    value = b.load(b.bitcast(b.gep(row, [k]), kind.as_pointer()))
    value.align = 4 if element == _SINGLE else 2
    return value


def _widened(b: ir.IRBuilder, stored: ir.Value) -> ir.Value:
    """Stored weights as float32, exactly; bfloat16 comes as its bits, the upper half of a float32's."""
    count = getattr(stored.type, "count", 1)
    element = stored.type.element if count > 1 else stored.type
    as_vector = (lambda kind: ir.VectorType(kind, count)) if count > 1 else (lambda kind: kind)
    if element == _SINGLE:
        return stored
    if isinstance(element, ir.HalfType):
        return b.fpext(stored, as_vector(_SINGLE))
    sixteen = ir.Constant(as_vector(_LANE), [16] * count if count > 1 else 16)
    return b.bitcast(b.shl(b.zext(stored, as_vector(_LANE)), sixteen), as_vector(_SINGLE))


def _fused(b: ir.IRBuilder, left: ir.Value, right: ir.Value, addend: ir.Value) -> ir.Value:
    """left * right + addend, rounded once."""
    name = f"llvm.fma.v{LANES}f32" if isinstance(left.type, ir.VectorType) else "llvm.fma.f32"
    known = b.module.globals.get(name)
    kind = left.type
    return b.call(
        known or ir.Function(b.module, ir.FunctionType(kind, [kind] * 3), name), [left, right, addend]
    )


def _folded(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of all lanes: the upper half is added to the lower until one is left."""
    width = LANES
    while width > 1:
        nothing = ir.Constant(vector.type, ir.Undefined)
        half = ir.VectorType(_LANE, width // 2)
        lower = b.shuffle_vector(vector, nothing, ir.Constant(half, list(range(width // 2))))
        upper = b.shuffle_vector(vector, nothing, ir.Constant(half, list(range(width // 2, width))))
        vector = b.fadd(lower, upper)
        width //= 2
    return b.extract_element(vector, ir.Constant(_LANE, 0))
