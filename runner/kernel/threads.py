"""The threads that compute: the workers enter the tasks that an owner opens, behind an epoch barrier.

A pass is some hundred short tasks one after another. Waking a thread takes longer than a good part of one, so after a
task a worker spins for the next, in machine code and without the interpreter's lock, before it sleeps.

A task is a function's address and arguments in the words of a shared table, `struct task` of kernel.c; the function
takes the table and the thread's scratch memory, and counts in the table which share is next. The word `epoch` grows
with each task and is odd while one is open; `active` counts workers.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue

import torch

from runner.kernel.library import load_kernel

# Bytes of memory that a task has on each thread.
SCRATCH_NBYTES = 2**19
WORDS = 32
# The words of a table: those of the barrier, then for the function the next share, whether it failed, its arguments.
EPOCH, ACTIVE, FUNCTION, SHARE, FAILED, ARGUMENTS = range(6)

# How long a worker spins before it sleeps: longer than the time between two tasks of a pass that waits for no disk.
SPIN_SECONDS = 0.001
_SPINS_TO_TIME = 5_000


@dataclass(frozen=True)
class Barrier:
    """The functions of the epoch barrier, in kernel.c.

    `open(table)` opens the task; `close(table, scratch)` computes too, closes it, and waits until no worker is in it.
    `spin(table, seen, spins, scratch)` enters each task that is open, except that of the epoch `seen`; after `spins`
    turns without one it returns the last epoch. `spins` take the chosen seconds on this processor.
    """

    open: Callable[[int], None]
    close: Callable[[int, int], None]
    spin: Callable[[int, int, int, int], int]
    spins: int


@cache
def make_barrier(spin_seconds: float = SPIN_SECONDS) -> Barrier:
    """A barrier whose workers spin for `spin_seconds` before they sleep."""
    kernel = load_kernel()
    spin = kernel.spin_for_tasks
    empty = (ctypes.c_int64 * WORDS)()

    def seconds() -> float:
        began = time.perf_counter()
        spin(ctypes.addressof(empty), 0, _SPINS_TO_TIME, 0)
        return time.perf_counter() - began

    spins = round(_SPINS_TO_TIME * spin_seconds / min(seconds() for _ in range(3)))
    return Barrier(kernel.open_task, kernel.close_task, spin, max(1, spins))


@cache
def workers(count: int) -> Workers:
    """The `count` threads that all models of this process share."""
    return Workers(count)


class Workers:
    """`count` threads that compute: the caller's own, and `count - 1` workers."""

    def __init__(self, count: int, barrier: Barrier | None = None) -> None:
        self.count = count
        self.table = (ctypes.c_int64 * WORDS)()
        self._barrier = barrier or make_barrier()
        self._taken = threading.Lock()
        self.others = [Worker(self.table, self._barrier) for _ in range(1, count)]

    def run(self, function: int, arguments: Sequence[int], *, shared: bool) -> bool:
        """Call the task function at the address `function` with these arguments; whether it says that it failed.

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's small operations between the products on the caller's thread alone.

    Torch's other threads would spin between these operations, on cores that the kernel's threads need.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
