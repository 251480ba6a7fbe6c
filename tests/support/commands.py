"""The `bloomdesk` command as a user gives it: in this process, in one of its own, or on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from toolkit.cli import app

COMMAND = [sys.executable, "-m", "toolkit.cli.app"]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Exit status and output of a command that runs in this process, by the entry of the real one."""
    given, out, errors = [*map(str, arguments)], StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        for name, value in environment.items():
            patch.setenv(name, value)
        status = app.run(given)
    return subprocess.CompletedProcess(given, status, out.getvalue(), errors.getvalue())


def refused(*arguments: str | Path, status: int = 1, **environment: str) -> str:
    """The one sentence on standard error of a command that fails as it should."""
    done = run(*arguments, **environment)
    assert done.returncode == status, done
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    return done.stderr


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def screen_of(*arguments: str | Path) -> str:
    """All that a command writes to a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    command, blocks = [*COMMAND, *map(str, arguments)], []
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "120"}):
        os.close(theirs)
        try:
            while block := os.read(ours, 65536):
                blocks.append(block)
        except OSError:  # how Linux says that nobody writes to the terminal any more
            pass
    os.close(ours)
    return b"".join(blocks).decode()
