"""Loops, loads and vectors in LLVM's language, and their compilation for this processor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llvmlite.binding as llvm
from llvmlite import ir

INDEX, SINGLE, LANE, BYTE = ir.IntType(64), ir.FloatType(), ir.IntType(32), ir.IntType(8)
BYTES, VOID = BYTE.as_pointer(), ir.VoidType()


def new_module() -> ir.Module:
    """An empty module for this processor."""
    module = ir.Module("bloomdesk")
    module.triple = llvm.get_default_triple()
    return module


def compiled(module: ir.Module) -> llvm.ExecutionEngine:
    """The engine with the module's machine code, which lives as long as it; takes about half a second."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


def native(
    engine: llvm.ExecutionEngine, name: str, result: type | None, *arguments: type
) -> ctypes._CFuncPtr:
    """A function of an engine's machine code; it keeps the engine alive."""
    found = ctypes.CFUNCTYPE(result, *arguments)(engine.get_function_address(name))
    found.engine = engine
    return found


def index(value: int) -> ir.Constant:
    return ir.Constant(INDEX, value)


def smaller(b: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", left, right), left, right)


def rounded_up(b: ir.IRBuilder, value: ir.Value, step: int) -> ir.Value:
    """The next multiple of `step`, a power of two."""
    return b.and_(b.add(value, index(step - 1)), index(-step))


def offset(b: ir.IRBuilder) -> Callable[[ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]:
    """A function for the address of `[row, column]` in a matrix of a given stride."""
    return lambda base, row, stride, column: b.gep(base, [b.add(b.mul(row, stride), column)])


@contextmanager
def loop(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
    """`for index in range(start, stop, step)`."""
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    count = b.phi(INDEX)
    count.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", count, stop), body, done)
    b.position_at_end(body)
    yield count
    count.add_incoming(b.add(count, index(step)), b.block)
    b.branch(head)
    b.position_at_end(done)


def vector(kind: ir.Type, values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def load_bytes(b: ir.IRBuilder, address: ir.Value, count: int) -> ir.Value:
    """`count` bytes at an unaligned address, as a vector."""
    value = b.load(b.bitcast(address, ir.VectorType(BYTE, count).as_pointer()))
    value.align = 1
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Store a value at an unaligned address."""
    b.store(value, b.bitcast(address, value.type.as_pointer())).align = 1


def intrinsic(b: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """A call of one of LLVM's own functions."""
    known = b.module.globals.get(name)
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(known or ir.Function(b.module, kind, name), arguments)


def constant_bytes(module: ir.Module, name: str, data: bytes) -> ir.Value:
    """A pointer to constant bytes of the module."""
    kind = ir.ArrayType(BYTE, len(data))
    held = module.globals.get(name)
    if held is None:
        held = ir.GlobalVariable(module, kind, name)
        held.global_constant, held.linkage = True, "internal"
        held.initializer = ir.Constant(kind, bytearray(data))
    return held.bitcast(BYTES)
