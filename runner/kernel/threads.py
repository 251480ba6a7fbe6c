"""The threads that compute: the workers enter the tasks that an owner opens, behind an epoch barrier.

A pass is some hundred short tasks one after another. Waking a thread takes longer than a good part of one, so after a
task a worker spins for the next, in machine code and without the interpreter's lock, before it sleeps.

A task is a function's address and arguments in the words of a shared table; the function takes the table, and counts
there which share is next. The word `epoch` grows with each task and is odd while one is open; `active` counts workers.

    owner    open    bump `epoch` to odd, then wake the workers that sleep
             close   compute too, bump `epoch` to even, then spin until `active` is 0
    worker   enter   increment `active`, then re-read `epoch`; if it changed, leave, else compute
             leave   decrement `active`
             sleep   say so, then re-read `epoch`; if a task is open, spin again

So no worker is still in a task that is closed, and none sleeps through a task that is open.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue

import torch
from llvmlite import ir

from runner.kernel.emit import BYTES, INDEX, LANE, VOID, compiled, index, intrinsic, native, new_module

# Bytes of memory that a task has on each thread.
SCRATCH_NBYTES = 2**19
WORDS = 32
# The words of a table: those of the barrier, then for the function the next share, whether it failed, its arguments.
EPOCH, ACTIVE, FUNCTION, SHARE, FAILED, ARGUMENTS = range(6)

TABLE = INDEX.as_pointer()
# The function of a task takes the table, and the calling thread's scratch memory.
TASK = ir.FunctionType(VOID, [TABLE, BYTES])

# How long a worker spins before it sleeps: longer than the time between two tasks of a pass that waits for no disk.
SPIN_SECONDS = 0.001
_SPINS_TO_TIME = 5_000


@dataclass(frozen=True)
class Barrier:
    """The machine code of the epoch barrier.

    `open(table)` opens the task; `close(table, scratch)` computes too, closes it, and waits until no worker is in it.
    `spin(table, seen, spins, scratch)` enters each task that is open, except that of the epoch `seen`; after `spins`
    turns without one it returns the last epoch. `spins` take the chosen seconds on this processor.
    """

    open: Callable[[int], None]
    close: Callable[[int, int], None]
    spin: Callable[[int, int, int, int], int]
    spins: int


@cache
def compile_barrier(spin_seconds: float = SPIN_SECONDS) -> Barrier:
    """A barrier whose workers spin for `spin_seconds` before they sleep."""
    module = new_module()
    _emit_open(module)
    _emit_close(module)
    _emit_spin(module)
    engine = compiled(module)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    open_, close = native(engine, "open", None, pointer), native(engine, "close", None, pointer, pointer)
    spin = native(engine, "spin", number, pointer, number, number, pointer)
    empty = (ctypes.c_int64 * WORDS)()

    def seconds() -> float:
        began = time.perf_counter()
        spin(ctypes.addressof(empty), 0, _SPINS_TO_TIME, 0)
        return time.perf_counter() - began

    spins = round(_SPINS_TO_TIME * spin_seconds / min(seconds() for _ in range(3)))
    return Barrier(open_, close, spin, max(1, spins))


@cache
def workers(count: int) -> Workers:
    """The `count` threads that all models of this process share."""
    return Workers(count)


class Workers:
    """`count` threads that compute: the caller's own, and `count - 1` workers."""

    def __init__(self, count: int, barrier: Barrier | None = None) -> None:
        self.count = count
        self.table = (ctypes.c_int64 * WORDS)()
        self._barrier = barrier or compile_barrier()
        self._taken = threading.Lock()
        self.others = [Worker(self.table, self._barrier) for _ in range(1, count)]

    def run(self, function: int, arguments: Sequence[int], *, shared: bool) -> bool:
        """Call the `TASK` at the address `function` with these arguments; whether it says that it failed.

        With `shared` the workers enter it, unless another caller's task has them. On return no thread touches its
        memory any more.
        """
        shared = shared and self.count > 1 and self._taken.acquire(blocking=False)
        table = self.table if shared else (ctypes.c_int64 * WORDS)()
        here, scratch, barrier = ctypes.addressof(table), _scratch(), self._barrier
        try:
            table[FUNCTION : ARGUMENTS + len(arguments)] = [function, 0, 0, *arguments]
            try:
                barrier.open(here)
                if shared:
                    for other in self.others:
                        other.wake()
            finally:
                # What is open is closed, even if an interrupt comes in between.
                barrier.close(here, scratch)
            return bool(table[FAILED])
        finally:
            if shared:
                self._taken.release()


class Worker:
    """A thread that spins for tasks, or sleeps."""

    def __init__(self, table: ctypes.Array[ctypes.c_int64], barrier: Barrier) -> None:
        self._table, self._barrier = table, barrier
        self._calls = SimpleQueue[bool]()
        self.sleeps = True
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        atexit.register(self._end)

    def wake(self) -> None:
        """Make it spin, if it sleeps."""
        if self.sleeps:
            self.sleeps = False
            self._calls.put(True)

    def _work(self) -> None:
        table, seen, barrier = ctypes.addressof(self._table), 0, self._barrier
        while self._calls.get():
            seen = barrier.spin(table, seen, barrier.spins, _scratch())
            self.sleeps = True
            while self._table[EPOCH] % 2 and self._table[EPOCH] != seen:
                seen = barrier.spin(table, seen, barrier.spins, _scratch())

    def _end(self) -> None:
        """End the thread before the interpreter does: inside of machine code, that would abort the process."""
        self._calls.put(False)
        self.thread.join()


_of_thread = threading.local()


def _scratch() -> int:
    """The address of this thread's scratch memory."""
    if not hasattr(_of_thread, "memory"):
        _of_thread.memory = torch.empty(SCRATCH_NBYTES, dtype=torch.uint8)
    return _of_thread.memory.data_ptr()


def _word(b: ir.IRBuilder, table: ir.Value, place: int) -> ir.Value:
    return b.gep(table, [index(place)])


def _call_task(b: ir.IRBuilder, table: ir.Value, scratch: ir.Value) -> None:
    task = b.inttoptr(b.load(_word(b, table, FUNCTION)), TASK.as_pointer())
    b.call(task, [table, scratch])


def _emit_open(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(VOID, [TABLE]), "open")
    b = ir.IRBuilder(function.append_basic_block())
    b.atomic_rmw("or", _word(b, function.args[0], EPOCH), index(1), "seq_cst")
    b.ret_void()


def _emit_close(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(VOID, [TABLE, BYTES]), "close")
    table, scratch = function.args
    b = ir.IRBuilder(function.append_basic_block())
    _call_task(b, table, scratch)
    epoch = b.load_atomic(_word(b, table, EPOCH), "seq_cst", 8)
    b.store_atomic(b.add(b.or_(epoch, index(1)), index(1)), _word(b, table, EPOCH), "seq_cst", 8)
    wait, done = b.append_basic_block("wait"), b.append_basic_block("done")
    b.branch(wait)
    b.position_at_end(wait)
    active = b.load_atomic(_word(b, table, ACTIVE), "seq_cst", 8)
    b.cbranch(b.icmp_signed("==", active, index(0)), done, wait)
    b.position_at_end(done)
    b.ret_void()


def _emit_spin(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(INDEX, [TABLE, INDEX, INDEX, BYTES]), "spin")
    table, seen, spins, scratch = function.args
    b = ir.IRBuilder(function.append_basic_block())
    last, left = b.alloca(INDEX), b.alloca(INDEX)
    b.store(seen, last)
    b.store(spins, left)
    head, done = b.append_basic_block("head"), b.append_basic_block("done")
    b.branch(head)
    b.position_at_end(head)
    epoch = b.load_atomic(_word(b, table, EPOCH), "seq_cst", 8)
    is_open = b.icmp_signed("==", b.and_(epoch, index(1)), index(1))
    with b.if_else(b.and_(is_open, b.icmp_signed("!=", epoch, b.load(last)))) as (found, nothing):
        with found:
            b.atomic_rmw("add", _word(b, table, ACTIVE), index(1), "seq_cst")
            still = b.load_atomic(_word(b, table, EPOCH), "seq_cst", 8)
            with b.if_then(b.icmp_signed("==", epoch, still)):
                _call_task(b, table, scratch)
            b.atomic_rmw("sub", _word(b, table, ACTIVE), index(1), "seq_cst")
            b.store(epoch, last)
            b.store(spins, left)
        with nothing:
            _pause(b)
            b.store(b.sub(b.load(left), index(1)), left)
    b.cbranch(b.icmp_signed(">", b.load(left), index(0)), head, done)
    b.position_at_end(done)
    b.ret(b.load(last))


def _pause(b: ir.IRBuilder) -> None:
    """Tell the processor that this thread spins, if it has an instruction for that."""
    machine = b.module.triple.split("-")[0]
    if machine in ("x86_64", "amd64"):
        intrinsic(b, "llvm.x86.sse2.pause", VOID, [])
    elif machine in ("aarch64", "arm64"):
        intrinsic(b, "llvm.aarch64.hint", VOID, [ir.Constant(LANE, 1)])
