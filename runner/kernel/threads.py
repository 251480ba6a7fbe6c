"""Threads that compute: one has a task and opens it, and the others, who look out for one, take part.

A pass is some hundred short tasks one after another. Waking a thread takes longer than a good part of one, so after
a task the others keep looking for a while, in machine code and without the interpreter's lock, before they sleep.

A task is its function's address and arguments in the words of a table that all threads share; the function takes the
table and counts its shares off in there. Who takes part signs in first and then looks whether the task is still open;
who closes it does so first and then waits until all have signed out. So nobody is late. Who opens it does so first and
then wakes those that sleep; who goes to sleep says so first and then looks whether a task is open. So nobody misses it.
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

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from runner.kernel.emit import BYTES, INDEX, LANE, VOID, compiled, index, intrinsic, new_module

SCRATCH_NBYTES = 2**19  # of memory that a task has for itself on each thread
WORDS = 32
# The words of a table. The turn is odd while a task is open, and grows with each.
TURN, SIGNED_IN, FUNCTION = range(3)
# For the function: the next share, whether it failed, what it works on.
SHARE, FAILED, ARGUMENTS = range(3, 6)

TABLE = INDEX.as_pointer()
TASK = ir.FunctionType(VOID, [TABLE, BYTES])  # the table, and the calling thread's scratch memory

# How long to look for the next task. Between two of a pass that waits for no disk there is less than this.
LOOKING_SECONDS = 0.001
_LOOKS_TO_TIME = 5_000


@cache
def workers(count: int) -> Workers:
    """The `count` threads that all models of this process share."""
    return Workers(count)


class Workers:
    """`count` threads, of which the caller's own is one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._code = _code()
        self._table = (ctypes.c_int64 * WORDS)()
        self._taken = threading.Lock()
        self._others = [_Worker(self._table, self._code) for _ in range(1, count)]

    def run(self, function: int, arguments: Sequence[int], *, shared: bool) -> bool:
        """Call the `TASK` at the address `function` with these arguments; whether it says that it failed.

        With `shared` the other threads take part, unless they do in another caller's. Everything that it works on is
        free again on return.
        """
        shared = shared and self.count > 1 and self._taken.acquire(blocking=False)
        table = self._table if shared else (ctypes.c_int64 * WORDS)()
        here, scratch, code = ctypes.addressof(table), _scratch(), self._code
        try:
            table[FUNCTION : ARGUMENTS + len(arguments)] = [function, 0, 0, *arguments]
            try:
                code.open(here)
                if shared:
                    for other in self._others:
                        other.wake()
            finally:  # what is open is closed, also when an interrupt comes in between
                code.finish(here, scratch)
            return bool(table[FAILED])
        finally:
            if shared:
                self._taken.release()


class _Worker:
    """A thread that looks for tasks, or sleeps."""

    def __init__(self, table: ctypes.Array[ctypes.c_int64], code: _Code) -> None:
        self._table, self._code = table, code
        self._calls = SimpleQueue[bool]()
        self._sleeps = True
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def wake(self) -> None:
        """Have it look; nothing if it does."""
        if self._sleeps:
            self._sleeps = False
            self._calls.put(True)

    def _work(self) -> None:
        table, seen = ctypes.addressof(self._table), 0
        while self._calls.get():
            seen = self._code.look(table, seen, self._code.looks, _scratch())
            self._sleeps = True
            while self._table[TURN] % 2 and self._table[TURN] != seen:
                seen = self._code.look(table, seen, self._code.looks, _scratch())

    def _end(self) -> None:
        """Before the interpreter goes: it would end the thread inside of foreign code, which aborts the process."""
        self._calls.put(False)
        self._thread.join()


_of_thread = threading.local()


def _scratch() -> int:
    """The address of this thread's scratch memory."""
    if not hasattr(_of_thread, "memory"):
        _of_thread.memory = torch.empty(SCRATCH_NBYTES, dtype=torch.uint8)
    return _of_thread.memory.data_ptr()


@dataclass(frozen=True)
class _Code:
    """`open(table)` opens the task; `finish(table, scratch)` takes part, closes it, and waits for the others.

    `look(table, seen, looks, scratch)` takes part in each task that is open, but for the turn `seen`, and returns the
    last turn when it has looked in vain `looks` times.
    """

    open: Callable[[int], None]
    finish: Callable[[int, int], None]
    look: Callable[[int, int, int, int], int]
    looks: int  # that take `LOOKING_SECONDS` on this processor
    engine: llvm.ExecutionEngine  # the code lives as long as it does


@cache
def _code() -> _Code:
    module = new_module()
    _emit_open(module)
    _emit_finish(module)
    _emit_look(module)
    engine = compiled(module)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    open_ = ctypes.CFUNCTYPE(None, pointer)(engine.get_function_address("open"))
    finish = ctypes.CFUNCTYPE(None, pointer, pointer)(engine.get_function_address("finish"))
    look = ctypes.CFUNCTYPE(number, pointer, number, number, pointer)(engine.get_function_address("look"))
    empty = (ctypes.c_int64 * WORDS)()

    def seconds() -> float:
        began = time.perf_counter()
        look(ctypes.addressof(empty), 0, _LOOKS_TO_TIME, 0)
        return time.perf_counter() - began

    looks = round(_LOOKS_TO_TIME * LOOKING_SECONDS / min(seconds() for _ in range(3)))
    return _Code(open_, finish, look, max(1, looks), engine)


def _word(b: ir.IRBuilder, table: ir.Value, place: int) -> ir.Value:
    return b.gep(table, [index(place)])


def _take_part(b: ir.IRBuilder, table: ir.Value, scratch: ir.Value) -> None:
    task = b.inttoptr(b.load(_word(b, table, FUNCTION)), TASK.as_pointer())
    b.call(task, [table, scratch])


def _emit_open(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(VOID, [TABLE]), "open")
    b = ir.IRBuilder(function.append_basic_block())
    b.atomic_rmw("or", _word(b, function.args[0], TURN), index(1), "seq_cst")
    b.ret_void()


def _emit_finish(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(VOID, [TABLE, BYTES]), "finish")
    table, scratch = function.args
    b = ir.IRBuilder(function.append_basic_block())
    _take_part(b, table, scratch)
    turn = b.load_atomic(_word(b, table, TURN), "seq_cst", 8)
    b.store_atomic(b.add(b.or_(turn, index(1)), index(1)), _word(b, table, TURN), "seq_cst", 8)
    wait, done = b.append_basic_block("wait"), b.append_basic_block("done")
    b.branch(wait)
    b.position_at_end(wait)
    signed_in = b.load_atomic(_word(b, table, SIGNED_IN), "seq_cst", 8)
    b.cbranch(b.icmp_signed("==", signed_in, index(0)), done, wait)
    b.position_at_end(done)
    b.ret_void()


def _emit_look(module: ir.Module) -> None:
    function = ir.Function(module, ir.FunctionType(INDEX, [TABLE, INDEX, INDEX, BYTES]), "look")
    table, seen, looks, scratch = function.args
    b = ir.IRBuilder(function.append_basic_block())
    last, left = b.alloca(INDEX), b.alloca(INDEX)
    b.store(seen, last)
    b.store(looks, left)
    head, done = b.append_basic_block("head"), b.append_basic_block("done")
    b.branch(head)
    b.position_at_end(head)
    turn = b.load_atomic(_word(b, table, TURN), "seq_cst", 8)
    is_open = b.icmp_signed("==", b.and_(turn, index(1)), index(1))
    with b.if_else(b.and_(is_open, b.icmp_signed("!=", turn, b.load(last)))) as (found, nothing):
        with found:
            b.atomic_rmw("add", _word(b, table, SIGNED_IN), index(1), "seq_cst")
            still = b.load_atomic(_word(b, table, TURN), "seq_cst", 8)
            with b.if_then(b.icmp_signed("==", turn, still)):
                _take_part(b, table, scratch)
            b.atomic_rmw("sub", _word(b, table, SIGNED_IN), index(1), "seq_cst")
            b.store(turn, last)
            b.store(looks, left)
        with nothing:
            _pause(b)
            b.store(b.sub(b.load(left), index(1)), left)
    b.cbranch(b.icmp_signed(">", b.load(left), index(0)), head, done)
    b.position_at_end(done)
    b.ret(b.load(last))


def _pause(b: ir.IRBuilder) -> None:
    """Tell the processor that this thread waits, where it has an instruction for that."""
    machine = b.module.triple.split("-")[0]
    if machine in ("x86_64", "amd64"):
        intrinsic(b, "llvm.x86.sse2.pause", VOID, [])
    elif machine in ("aarch64", "arm64"):
        intrinsic(b, "llvm.aarch64.hint", VOID, [ir.Constant(LANE, 1)])
