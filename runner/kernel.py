"""The matrix product of a pass, compiled for this processor: float32 rows times weights in the form they are stored in.

    out[b, t, n] += sum over k of x[b, t, k] * weight[b, n, k]

Every sum is taken in one order, whatever the number of rows, the cut of the matrix into pieces, or the number of
threads: 8 lanes over each 4,096 columns, the lanes folded in halves, these partial sums one after another, each
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
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from runner.workers import Workers

LANES = 8  # float32 in one 256-bit register
COLUMN_CHUNK = 4096  # of x and of the weights; shorter ones do not keep the memory busy
ROWS_IN_CACHE = 64  # rows of x that are multiplied with a group of outputs before the next group
OUTPUTS_IN_CACHE = 12  # a multiple of all that TILES names
SHARES_A_THREAD = 6
WORTH_SHARING = 2**18  # multiplications; fewer are done before another thread has begun
TILES = {1: 6, 2: 4, 3: 3, 4: 3}  # rows -> outputs at a time; sums, weights and x share 16 registers

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
        self.accumulate_each(x[None], weight[None], out[None])

    def accumulate_each(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """The same for B products at once: x [B, T, K], weight [B, N, K], out [B, T, N].

        Raises ValueError where rows are not dense or shapes do not fit.
        """
        B, T, K = x.shape
        N = weight.shape[1]
        if weight.shape != (B, N, K) or out.shape != (B, T, N):
            raise ValueError(f"a product of {[*x.shape]} and {[*weight.shape]} does not give {[*out.shape]}")
        if not out.numel():
            return
        if not (x.stride(2) == weight.stride(2) == out.stride(2) == 1):
            raise ValueError("the rows of a product must be dense")
        shared = B * T * N * K >= WORTH_SHARING
        # Outputs that a thread takes at a time: few enough that all threads end at about the same time, on a
        # processor with faster and slower cores too.
        share = N // (SHARES_A_THREAD * self._workers.count) if shared else N
        share = max(1, share // OUTPUTS_IN_CACHE) * OUTPUTS_IN_CACHE if share < N else N
        progress = (ctypes.c_int64 * 2)()
        arguments = (
            weight.data_ptr(), weight.stride(0), weight.stride(1), x.data_ptr(), x.stride(0), x.stride(1),
            out.data_ptr(), out.stride(0), out.stride(1), B, T, N, K, share, ctypes.addressof(progress),
        )  # fmt: skip

        def take_part(_keep: object = (progress, weight, x, out)) -> None:
            self._product.take_part(*arguments)

        if shared:
            self._workers.invite(take_part)
        take_part()
        self._product.wait(ctypes.addressof(progress))


@dataclass(frozen=True)
class _Product:
    """The machine code for one dtype, as functions that run without the interpreter's lock.

    Any number of threads may `take_part` in one product: its shares are counted off in `progress`, and who comes when
    none is left does nothing. `wait` returns when all that have begun one are through.
    """

    take_part: Callable[..., None]
    wait: Callable[[int], None]
    engine: llvm.ExecutionEngine  # the code lives as long as it does


@cache
def _compiled(dtype: torch.dtype) -> _Product:
    """Compile for this processor; takes half a second."""
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
    take_part = ctypes.CFUNCTYPE(None, *[pointer, number, number] * 3, *[number] * 5, pointer)
    wait = ctypes.CFUNCTYPE(None, pointer)
    return _Product(
        take_part(engine.get_function_address("take_part")), wait(engine.get_function_address("wait")), engine
    )


def _module(dtype: torch.dtype) -> ir.Module:
    """`take_part(weight, its strides over b and n, x, over b and t, out, over b and t, B, T, N, K, share, progress)`
    and `wait(progress)`; strides in elements."""
    module = ir.Module("bloomdesk")
    module.triple = llvm.get_default_triple()
    product = _product(module, _STORED[dtype])
    weight_type, x_type, out_type = product.args[0].type, product.args[2].type, product.args[4].type
    types = [kind for pointer in (weight_type, x_type, out_type) for kind in (pointer, _INDEX, _INDEX)]
    types += [*[_INDEX] * 5, _INDEX.as_pointer()]
    function = ir.Function(module, ir.FunctionType(_VOID, types), "take_part")
    (
        weight,
        weight_step,
        weight_stride,
        x,
        x_step,
        x_stride,
        out,
        out_step,
        out_stride,
        B,
        T,
        N,
        K,
        share,
        progress,
    ) = function.args
    b = ir.IRBuilder(function.append_basic_block())
    at = _offset(b)
    at_work = b.gep(progress, [_index(1)])
    b.atomic_rmw("add", at_work, _index(1), "seq_cst")
    shares = b.sdiv(b.sub(b.add(N, share), _index(1)), share)  # of each of the B products
    total = b.mul(B, shares)
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    mine = b.atomic_rmw("add", progress, _index(1), "seq_cst")
    b.cbranch(b.icmp_signed("<", mine, total), body, done)
    b.position_at_end(body)
    each, n = b.sdiv(mine, shares), b.mul(b.srem(mine, shares), share)
    weight = at(at(weight, each, weight_step, _index(0)), n, weight_stride, _index(0))
    x, out = at(x, each, x_step, _index(0)), at(out, each, out_step, n)
    count = _smaller(b, share, b.sub(N, n))
    b.call(product, [weight, weight_stride, x, x_stride, out, out_stride, T, count, K])
    b.branch(head)
    b.position_at_end(done)
    b.atomic_rmw("sub", at_work, _index(1), "seq_cst")
    b.ret_void()
    _wait(module)
    return module


def _wait(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(_VOID, [_INDEX.as_pointer()]), "wait")
    b = ir.IRBuilder(function.append_basic_block())
    at_work = b.gep(function.args[0], [_index(1)])
    look, done = b.append_basic_block("look"), b.append_basic_block("done")
    b.branch(look)
    b.position_at_end(look)
    b.cbranch(b.icmp_signed("==", b.load_atomic(at_work, "seq_cst", 8), _index(0)), done, look)
    b.position_at_end(done)
    b.ret_void()


def _product(module: ir.Module, stored: ir.Type) -> ir.Function:
    """One product on one thread: `product(weight, stride, x, stride, out, stride, T, N, K)`."""
    tiles = {(rows, n): _tile(module, stored, rows, n) for rows, most in TILES.items() for n in (most, 1)}
    types = [stored.as_pointer(), _INDEX, _SINGLE.as_pointer(), _INDEX, _SINGLE.as_pointer(), *[_INDEX] * 4]
    function = ir.Function(module, ir.FunctionType(_VOID, types), "product")
    function.linkage = "internal"
    weight, weight_stride, x, x_stride, out, out_stride, T, N, K = function.args
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
    return function


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
