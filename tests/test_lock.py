"""Two processes on one directory: the second is told so and leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner import BloomdeskError
from toolkit.lock import sole_writer

HOLD = """
import sys, pathlib
from toolkit.lock import sole_writer
with sole_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


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
