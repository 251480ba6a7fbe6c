"""Two processes on one directory or one file of results: the second is told so and leaves."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from runner import BloomdeskError
from runner.cli.results import Results
from runner.system.lock import sole_writer

HOLD = """
import sys, pathlib
from runner.system.lock import sole_writer
with sole_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_another_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BloomdeskError, match="another bloomdesk is writing there"), sole_writer(tmp_path):
            pass
        holder.kill()
    with sole_writer(tmp_path):
        pass
    with sole_writer(tmp_path):  # and it is let go after use
        pass
    assert not any(tmp_path.iterdir()) or sys.platform == "win32"


def test_a_file_of_results_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        Results(path, ()),
        pytest.raises(BloomdeskError, match=r"out\.jsonl: another bloomdesk is writing there"),
    ):
        Results(path, ())
    with Results(path, ()):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="locks in another way")
def test_without_locks_two_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with sole_writer(tmp_path), sole_writer(tmp_path), Results(tmp_path / "out.jsonl", ()):
        pass
