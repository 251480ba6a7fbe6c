"""A benchmark's turn: what comes back from a process that succeeds, fails, hangs or says nothing."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import turns
from scripts.bench.turns import CannotRun, Limits, take_turn

FREE = Limits(None, None)
PYTHON = (sys.executable, "-c")


@pytest.mark.slow
def test_the_last_line_is_the_report(tmp_path: Path) -> None:
    program = 'print("loading"); print(); print(\'{"seconds": [3.0, 1.0, 2.0]}\')'
    turn = take_turn([*PYTHON, program], FREE, tmp_path)
    assert turn.report == {"seconds": [3.0, 1.0, 2.0]}
    assert (turn.steps, turn.failure, turn.group, turn.group_peak) == ([1.0, 2.0], None, "none", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "failure"),
    [
        ("import sys; print('{}'); sys.exit('first line\\nthe reason')", "ended with 1: the reason"),
        ("import os; os.kill(os.getpid(), 9)", "killed: more memory than the group has"),
        ("print('no object')", "no report: Expecting value"),
        ("pass", "no report: Expecting value"),
        ("import time; time.sleep(60)", "not done after 2 s"),
    ],
)
def test_a_failure_in_words(tmp_path: Path, program: str, failure: str) -> None:
    turn = take_turn([*PYTHON, program], FREE, tmp_path, timeout=2.0)
    assert turn.failure.startswith(failure)
    assert turn.steps == []


def test_the_rate_of_a_limit_is_the_brakes_where_that_holds_the_disk() -> None:
    braked = Limits(None, 1e9)
    assert turns.rate_of_the_limit([0.7e9, 0.99e9], braked) == 1e9
    assert turns.rate_of_the_limit([1.2e9, 0.9e9], braked) == 1e9
    assert turns.rate_of_the_limit([0.7e9, 0.6e9], braked) == 0.7e9
    assert turns.rate_of_the_limit([3e9, 2e9], FREE) == 3e9


@pytest.mark.slow
def test_one_run_at_a_time_in_a_directory(tmp_path: Path) -> None:
    work = tmp_path / "new" / "work"
    with turns.sole_worker(work):
        program = (
            "import sys; from pathlib import Path; from scripts.bench import turns\n"
            "with turns.sole_worker(Path(sys.argv[1])): pass"
        )
        done = subprocess.run(
            [*PYTHON, program, work], cwd=turns.ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert f"CannotRun: another run works in {work}" in done.stderr
    with turns.sole_worker(work):
        pass


def test_too_little_room_is_refused(tmp_path: Path) -> None:
    turns.check_room(tmp_path / "not" / "there", 1)
    with pytest.raises(CannotRun, match=r"needs 1000000000\.0 GB of disk"):
        turns.check_room(tmp_path, 10**18)


def test_sizes() -> None:
    assert turns.sizes("3GB,512MiB,1.073GB/s,none,7") == [3e9, 2**29, 1.073e9, None, 7.0]
    for text in ("3 apples", "", "-1GB", "1.GB"):
        with pytest.raises(argparse.ArgumentTypeError):
            turns.size(text)


def test_limits_in_words() -> None:
    assert str(Limits(2 * 10**9, 1.073e9)) == "2 GB, 1.073 GB/s"
    assert str(FREE) == "all RAM, no brake"


def test_a_run_that_is_interrupted_still_has_its_results() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert turns.to_the_end(lambda: None)
    assert not turns.to_the_end(interrupted)
