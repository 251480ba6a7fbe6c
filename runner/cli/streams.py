"""The standard streams of a process: always open, so that no other file gets their descriptors, and safe to write.

What standard error does not take is dropped, and the work goes on. What standard output does not take is an error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import TextIO

from runner.errors import BloomdeskError, explained


class OutputError(BloomdeskError):
    """Standard output takes no more. `reader_left` says that nobody reads it: no failure to speak of."""

    def __init__(self, error: OSError) -> None:
        why, _ = explained(error)
        if error.errno == errno.EBADF:
            why = "it is closed"
        elif error.errno == errno.ENOSPC:
            # Which disk it is on, nobody knows.
            why = "its disk is full"
        super().__init__(f"standard output cannot be written: {why}")
        self.reader_left = error.errno == errno.EPIPE


class _Output(io.FileIO):
    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from error


class _Errors(io.FileIO):
    def write(self, data: bytes) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or 0
        return memoryview(data).nbytes


def take_streams() -> None:
    """Open whichever of the descriptors 0, 1 and 2 are closed, and guard what is written to 1 and 2."""
    # A read-only descriptor refuses what is written, as a closed one does.
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout = _guarded(sys.stdout, _Output, 1)
    sys.stderr = _guarded(sys.stderr, _Errors, 2)


def escape_what_cannot_be_shown() -> None:
    """Write a character that a stream's encoding lacks as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def abandon_output() -> None:
    """Have what is still written to standard output, at the exit for one, go nowhere."""
    # In place of the real one there may be one without a descriptor.
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)


def _guarded(stream: TextIO | None, kind: type[io.FileIO], descriptor: int) -> TextIO:
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
        return stream
    layer = stream.buffer if stream is not None else None
    if layer is not None and type(getattr(layer, "raw", layer)) is not io.FileIO:
        # Windows' console has a kind of its own.
        return stream
    raw = io.BufferedWriter(kind(descriptor, "w", closefd=False))
    return io.TextIOWrapper(
        raw,
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=stream is None or stream.line_buffering,
        write_through=stream is not None and stream.write_through,
    )
