"""Progress of long work on standard error: bars on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0


class WorkProgress:
    """A `toolkit.io.progress.Progress` that shows what all files together and each one at hand have done.

    On a terminal bars with rate and time left, gone at the end; elsewhere a line every ten seconds. It may be
    called from several threads.
    """

    def __init__(self, verb: str, total: int, notes: TextIO) -> None:
        """`verb` says what is done ("converting"), `total` is the bytes of all files."""
        self._verb, self._total, self._notes = verb, total, notes
        self._done_by_file: dict[str, int] = {}
        self._done = 0
        self._start = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bars = _Bars(verb, total, notes) if notes.isatty() else None

    def __enter__(self) -> WorkProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, file: str, done: int, total: int) -> None:
        with self._lock:
            self._done += done - self._done_by_file.get(file, 0)
            self._done_by_file[file] = done
            if self._bars:
                self._bars.show(file, done, total, self._done)
            elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
                self._said = time.monotonic()
                self._notes.write(self._line(file) + "\n")
                self._notes.flush()

    def _line(self, file: str) -> str:
        seconds = time.monotonic() - self._start
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        share = self._done / self._total if self._total else 1.0
        return (
            f"{self._verb}: {gigabytes(self._done)} of {gigabytes(self._total)} ({share:.0%}), {file}, "
            f"{rate / 1e6:,.0f} MB/s, {duration(left)} left"
        )


class _Bars:
    """Bars of the rich library: one for all files, and one for each file at hand."""

    def __init__(self, verb: str, total: int, notes: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}", justify="left"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(file=notes), transient=True)
        self._all = self._progress.add_task(verb, total=total)
        self._files: dict[str, TaskID] = {}

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def show(self, file: str, done: int, total: int, overall: int) -> None:
        if file not in self._files:
            self._files[file] = self._progress.add_task(file, total=total)
        self._progress.update(self._files[file], completed=done)
        self._progress.update(self._all, completed=overall)
        if done >= total:
            self._progress.remove_task(self._files.pop(file))


def gigabytes(count: int) -> str:
    """A number of bytes for people: "352.49 GB", "7.2 MB", "58,279 bytes"."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1)):
        if count >= size:
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:,} bytes"


def parameters(count: int) -> str:
    """A model's size for people: "176 billion parameters"."""
    unit, size = ("billion", 1e9) if count >= 1e9 else ("million", 1e6)
    return f"{count / size:,.3g} {unit} parameters"


def duration(seconds: float) -> str:
    """A time for people: "8 s", "5 min", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
