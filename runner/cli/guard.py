"""What all commands share: an exit status for whatever happens, and notes for whoever sits at the terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from runner.errors import BloomdeskError

INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C


@dataclass
class Guard:
    """Runs a command. `failure` is the exit status of one that fails; `debug` shows its traceback."""

    debug: bool = False
    failure: int = 1

    def run(self, command: Callable[[], int]) -> int:
        """The command's exit status, or `failure` after one clear sentence in place of a traceback."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A character that the terminal cannot show is escaped.
                stream.reconfigure(errors="backslashreplace")
        try:
            return command()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Nobody reads the output any more, so the flush at exit must not write there either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return self.failure
        except Exception as error:
            if self.debug:
                raise
            if not isinstance(error, BloomdeskError):
                error = BloomdeskError(
                    f"unexpected {type(error).__name__}: {error}",
                    "run it again with --debug for the traceback, and report it",
                )
            print(error.worded(), file=sys.stderr)
            return self.failure


def note(line: str) -> None:
    """Print a line if somebody sits at a terminal."""
    if sys.stderr.isatty():
        print(f"({line})", file=sys.stderr)
