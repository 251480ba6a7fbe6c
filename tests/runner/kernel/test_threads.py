"""The threads that compute: everybody takes part, nobody is late, and all end with the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import runner.kernel.threads
from runner.format.coded import PANEL_COLUMNS, ROW_GROUP_ROWS
from runner.kernel.panel import scratch_bytes
from runner.kernel.threads import ARGUMENTS, FAILED, SCRATCH_NBYTES, TURN, Workers

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
def test_every_thread_takes_part(count: int) -> None:
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


def test_what_is_not_shared_is_the_callers_alone() -> None:
    crew, seen = Workers(3), []

    @Task
    def task(*_) -> None:
        seen.append(threading.get_ident())

    crew.run(address(task), [], shared=False)
    time.sleep(0.01)
    assert seen == [threading.get_ident()]


def test_one_caller_at_a_time_has_the_others() -> None:
    """A second one computes alone in the meantime, and needs not wait."""
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


@pytest.fixture
def own_code() -> Iterator[None]:
    runner.kernel.threads._code.cache_clear()
    yield
    runner.kernel.threads._code.cache_clear()


def test_nobody_is_late(own_code, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever another thread does of a task, it does before `run` returns; also where it has just woken."""
    for looking in (0.0, 1e-6, 0.001):
        monkeypatch.setattr(runner.kernel.threads, "LOOKING_SECONDS", looking)
        runner.kernel.threads._code.cache_clear()
        crew, running, late = Workers(4), [False], []

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


def test_nobody_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread takes part in each task, also one that was about to sleep when it was opened."""
    code = runner.kernel.threads._code()

    def look_and_dawdle(table: int, seen: int, looks: int, scratch: int) -> int:
        seen = code.look(table, seen, 1, scratch)
        time.sleep(0.005)
        return seen

    monkeypatch.setattr(runner.kernel.threads, "_code", lambda: replace(code, look=look_and_dawdle))
    crew, all_here, alone = Workers(3), threading.Barrier(3), []

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
        patch.setattr(runner.kernel.threads._Worker, "wake", interrupt)
        crew.run(address(task), [], shared=True)
    assert done == [1] and crew._table[TURN] % 2 == 0
    crew.run(address(together), [], shared=True)
    assert not all_here.broken


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of one thread here")
def test_who_has_nothing_to_do_sleeps() -> None:
    crew = Workers(3)

    @Task
    def task(*_) -> None:
        pass

    def seconds() -> float:
        """Of the processor that the other threads have used."""
        clocks = [time.pthread_getcpuclockid(other._thread.ident) for other in crew._others]
        return sum(time.clock_gettime(clock) for clock in clocks)

    crew.run(address(task), [], shared=True)
    wait_until(lambda: all(other._sleeps for other in crew._others))
    began = seconds()
    time.sleep(0.2)
    assert seconds() - began < 0.02


def test_a_thread_has_room_for_a_panel() -> None:
    assert scratch_bytes(ROW_GROUP_ROWS * PANEL_COLUMNS) <= SCRATCH_NBYTES


@pytest.mark.parametrize("wait", ["", "; time.sleep(0.1)"], ids=["looking", "asleep"])
def test_the_process_ends_whatever_they_do(wait: str) -> None:
    """A thread that is cut off inside of foreign code at exit would abort the process."""
    program = (
        "import time, torch; from runner.kernel.matmul import Kernel; from runner.kernel.threads import workers;"
        "w, x, out = torch.zeros(4096, 4096, dtype=torch.bfloat16), torch.ones(1, 4096), torch.zeros(1, 4096);"
        f"Kernel(w.dtype, workers(3)).accumulate(x, w, out){wait}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
