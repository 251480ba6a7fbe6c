"""The threads that compute: every worker enters, none stays in a closed task, and all end with the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runner.kernel.library import load_kernel
from runner.kernel.threads import ARGUMENTS, EPOCH, FAILED, SCRATCH_NBYTES, Worker, Workers, make_barrier

ROOT = Path(__file__).resolve().parents[3]

Task = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p)


def address(task: Callable[..., None]) -> int:
    return ctypes.cast(task, ctypes.c_void_p).value


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_thread_enters_a_task(count: int) -> None:
    crew, seen, all_here = Workers(count), set(), threading.Barrier(count)

    @Task
    def task(table, scratch) -> None:
        seen.add((threading.get_ident(), scratch))
        all_here.wait(30)

    assert not crew.run(address(task), [], shared=True)
    assert len({thread for thread, _ in seen}) == len({scratch for _, scratch in seen}) == count
    assert threading.get_ident() in {thread for thread, _ in seen}


def test_a_task_gets_its_arguments_and_may_fail() -> None:
    @Task
    def task(table, _) -> None:
        table[FAILED] = table[ARGUMENTS] + table[ARGUMENTS + 1] == 12

    for crew in (Workers(1), Workers(3)):
        for shared in (True, False):
            assert crew.run(address(task), [5, 7], shared=shared)
            assert not crew.run(address(task), [5, 8], shared=shared)


def test_a_task_that_is_not_shared_runs_on_the_caller_alone() -> None:
    crew, seen = Workers(3), []

    @Task
    def task(*_) -> None:
        seen.append(threading.get_ident())

    crew.run(address(task), [], shared=False)
    time.sleep(0.01)
    assert seen == [threading.get_ident()]


def test_one_caller_at_a_time_has_the_workers() -> None:
    """A second caller computes alone meanwhile, and does not wait."""
    crew, inside, gate, seen = Workers(2), threading.Barrier(3), threading.Event(), []

    @Task
    def long(*_) -> None:
        inside.wait(30)
        gate.wait(30)

    @Task
    def short(*_) -> None:
        seen.append(threading.get_ident())

    first = threading.Thread(target=lambda: crew.run(address(long), [], shared=True), daemon=True)
    first.start()
    inside.wait(30)
    crew.run(address(short), [], shared=True)
    assert seen == [threading.get_ident()]
    gate.set()
    first.join(30)
    assert not first.is_alive()


def test_no_worker_is_in_a_task_after_it_has_returned() -> None:
    """Whatever another thread does of a task, it does before `run` returns, even if it has just woken."""
    for spin_seconds in (0.0, 1e-6, 0.001):
        crew, running, late = Workers(4, make_barrier(spin_seconds)), [False], []

        @Task
        def task(*_, running=running, late=late) -> None:
            if not running[0]:
                late.append(1)

        for pause in range(300):
            running[0] = True
            crew.run(address(task), [], shared=True)
            running[0] = False
            if pause % 3 == 0:
                time.sleep(pause * 1e-6)
        assert not late


def test_no_worker_sleeps_through_a_task() -> None:
    """Every thread enters each task, even one that was about to sleep when the task was opened."""
    barrier = make_barrier()

    def spin_and_dawdle(table: int, seen: int, spins: int, scratch: int) -> int:
        seen = barrier.spin(table, seen, 1, scratch)
        time.sleep(0.005)
        return seen

    crew = Workers(3, replace(barrier, spin=spin_and_dawdle))
    all_here, alone = threading.Barrier(3), []

    @Task
    def task(*_) -> None:
        try:
            all_here.wait(10)
        except threading.BrokenBarrierError:
            alone.append(1)

    for number in range(50):
        crew.run(address(task), [], shared=True)
        time.sleep(number % 10 * 0.001)
        assert not alone


def test_an_interrupted_caller_leaves_no_task_open(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, all_here, done = Workers(2), threading.Barrier(2), []

    @Task
    def task(*_) -> None:
        done.append(1)

    @Task
    def together(*_) -> None:
        all_here.wait(30)

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Worker, "wake", interrupt)
        crew.run(address(task), [], shared=True)
    assert done == [1] and crew.table[EPOCH] % 2 == 0
    crew.run(address(together), [], shared=True)
    assert not all_here.broken


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of one thread here")
def test_workers_without_a_task_sleep() -> None:
    crew = Workers(3)

    @Task
    def task(*_) -> None:
        pass

    def seconds() -> float:
        """Of the processor that the other threads have used."""
        clocks = [time.pthread_getcpuclockid(other.thread.ident) for other in crew.others]
        return sum(time.clock_gettime(clock) for clock in clocks)

    crew.run(address(task), [], shared=True)
    wait_until(lambda: all(other.sleeps for other in crew.others))
    began = seconds()
    time.sleep(0.2)
    assert seconds() - began < 0.02


def test_scratch_memory_is_large_enough() -> None:
    assert load_kernel().scratch_bytes_of_decoder() <= SCRATCH_NBYTES


@pytest.mark.slow
@pytest.mark.parametrize("wait", ["", "; time.sleep(0.1)"], ids=["spinning", "asleep"])
def test_the_process_ends_whatever_the_workers_do(wait: str) -> None:
    """A thread that is cut off inside of machine code at exit would abort the process."""
    program = (
        "import time, torch; from runner.kernel.matmul import Kernel; from runner.kernel.threads import workers;"
        "w, x, out = torch.zeros(4096, 4096, dtype=torch.bfloat16), torch.ones(1, 4096), torch.zeros(1, 4096);"
        f"Kernel(w.dtype, workers(3)).accumulate(x, w, out){wait}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
