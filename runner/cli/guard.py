"""What all commands share: an exit status for whatever happens, and notes for whoever sits at the terminal."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from runner.cli import streams
from runner.errors import BloomdeskError, refused

INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C
# What a shell adds to the number of the signal that ended a command.
_ENDED_BY = 128

# How torch and Python say that the system has no more memory, or no more threads.
_IN_OTHER_WORDS = {
    "can't allocate memory": MemoryError(),
    "failed to map segment": MemoryError(),
    "can't start new thread": OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
}


class Terminated(KeyboardInterrupt):
    """The process was asked to end: by `kill`, or because its terminal has gone. It ends as it does after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = _ENDED_BY + number


@dataclass
class Guard:
    """Runs a command. `failure` is the exit status of one that fails; `debug` shows its traceback."""

    debug: bool = False
    failure: int = 1

    def run(self, command: Callable[[], int]) -> int:
        """The command's exit status, or `failure` after one clear sentence in place of a traceback."""
        streams.escape_what_cannot_be_shown()
        status = self._status_of(command)
        # What Python would only find out at the exit.
        unwritten = self._status_of(_flush_output)
        return status if status > _ENDED_BY else unwritten or status

    def _status_of(self, command: Callable[[], int]) -> int:
        try:
            return command()
        except KeyboardInterrupt as stop:
            print("interrupted", file=sys.stderr)
            return status_after(stop)
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else self.failure * bool(done.code)
        except Exception as error:
            if isinstance(error, streams.OutputError):
                streams.abandon_output()
                if error.reader_left:
                    return self.failure
            if self.debug:
                traceback.print_exc()
            print(_worded(error), file=sys.stderr)
            return self.failure


def status_after(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that was ended by Ctrl-C or by another signal."""
    return getattr(stop, "status", INTERRUPTED)


def end_process(command: Callable[[], int]) -> NoReturn:
    """Run a guarded command as all that this process does, and end with its exit status."""
    streams.take_streams()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # `nohup` ignores one of them.
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _terminate)
    sys.exit(command())


def require_current_directory() -> None:
    """Raise `BloomdeskError` in a directory that was deleted: no relative path means anything, and torch aborts."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise BloomdeskError(
            "the current directory has been deleted", "change to a directory that exists"
        ) from None


def empty_argument(given: Mapping[str, object]) -> str | None:
    """What is wrong with the first empty one of the arguments that were given, or None if there is none.

    As a path it would be the current directory.
    """
    empty = (name for name, value in given.items() if value == "" or value == [""])
    return next((f"{name} is empty, as an unset variable of the shell is" for name in empty), None)


def note(line: str) -> None:
    """Print a line if somebody sits at a terminal."""
    if sys.stderr.isatty():
        print(f"({line})", file=sys.stderr)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    # A terminal that goes sends several: what ends the work is not to be ended itself.
    signal.signal(number, signal.SIG_IGN)
    raise Terminated(number)


def _flush_output() -> int:
    sys.stdout.flush()
    return 0


def _worded(error: Exception) -> str:
    if isinstance(error, RuntimeError):
        error = next((real for words, real in _IN_OTHER_WORDS.items() if words in str(error)), error)
    if isinstance(error, OSError | MemoryError):
        error = refused(error)
    if not isinstance(error, BloomdeskError):
        error = BloomdeskError(
            f"unexpected {type(error).__name__}: {error}",
            "run it again with --debug for the traceback, and report it",
        )
    return error.worded()
