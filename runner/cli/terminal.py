"""Text that grows on a terminal, and one status line behind its end."""

from __future__ import annotations

import math
import os
import time
import unicodedata
from shutil import get_terminal_size
from typing import TextIO

SAVE, RESTORE, ERASE_TO_END = "\x1b7", "\x1b8", "\x1b[K"
SECONDS_BETWEEN_STATUSES = 0.1


class StatusLine:
    """Shows a status on the terminal `notes`, behind the text that was written to `out`.

    A new status replaces the one before, and more text removes it. A status is cut to the terminal's width; behind
    text, one that does not fit is left out, because a terminal that scrolls would keep parts of it. If `notes` is not
    a terminal, a status is a line every `seconds_between_lines`, by default none.
    """

    def __init__(
        self, notes: TextIO, out: TextIO | None = None, *, seconds_between_lines: float = math.inf
    ) -> None:
        self._notes, self._out = notes, out
        self._is_terminal = is_screen(notes)
        self._counts_columns = out is not None and out.isatty()
        self._interval = SECONDS_BETWEEN_STATUSES if self._is_terminal else seconds_between_lines
        self._next = 0.0 if self._is_terminal else time.monotonic() + self._interval
        self._column = 0
        self._is_shown = False

    @property
    def is_due(self) -> bool:
        """Whether a status would be shown now; more of them than an eye can follow are not."""
        return time.monotonic() >= self._next

    def show(self, *statuses: str) -> None:
        """Show the first of `statuses` that fits, if one is due; the last one is cut if it may be."""
        if not self.is_due:
            return
        room = get_terminal_size().columns - self._column - 1
        if self._is_terminal and self._column:
            statuses = tuple(f" {status}" for status in statuses)
        fitting = (status for status in statuses if len(status) <= room or not self._is_terminal)
        status = next(fitting, statuses[-1])
        if self._is_terminal and self._column and len(status) > room:
            return
        self._put(f"{SAVE}{status[:room]}{ERASE_TO_END}{RESTORE}" if self._is_terminal else f"{status}\n")
        self._is_shown = self._is_terminal
        self._next = time.monotonic() + self._interval

    def show_part(self, part: int, parts: int, before: str = "") -> None:
        """Show that `part` of the `parts` of a pass is done."""
        self.show(f"{before} [part {part} of {parts}]".lstrip())

    def write(self, text: str) -> None:
        """Write text to `out` at once, in place of the status."""
        self.clear()
        self._out.write(text)
        self._out.flush()
        if self._counts_columns:
            self._column = column_after(text, self._column, get_terminal_size().columns)

    def clear(self) -> None:
        """Remove the status."""
        if self._is_shown:
            # What Ctrl-C leaves on a line without text is removed, too.
            self._put(ERASE_TO_END if self._column else f"\r{ERASE_TO_END}")
            self._is_shown = False

    def _put(self, text: str) -> None:
        self._notes.write(text)
        self._notes.flush()


def is_screen(stream: TextIO) -> bool:
    """Whether a line on the terminal `stream` can be replaced by another one; a dumb terminal gets lines, as a log."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def column_after(text: str, column: int, width: int) -> int:
    """The cursor's column after `text` was printed from `column` on, in a terminal of `width` columns."""
    for character in text:
        if character == "\n":
            column = 0
        elif not unicodedata.combining(character):
            cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            column = cells if column + cells > width else column + cells
    return column
