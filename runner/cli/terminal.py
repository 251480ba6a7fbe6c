"""Generated text on a terminal, with a short note of the pass behind its end while the next token is computed."""

from __future__ import annotations

import time
import unicodedata
from shutil import get_terminal_size
from typing import TextIO

SAVE, RESTORE, ERASE_TO_END = "\x1b7", "\x1b8", "\x1b[K"
SECONDS_BETWEEN_NOTES = 0.1


class Terminal:
    """Writes text to `out`, and notes to `notes` where that is a terminal.

    A note stands behind the text on the same line and is gone before more text comes. Where it would not fit
    there it is left out: a terminal that scrolls would otherwise keep chunks of it.
    """

    def __init__(self, out: TextIO, notes: TextIO) -> None:
        self._out, self._notes = out, notes
        self._takes_notes, self._column_counts = notes.isatty(), out.isatty()
        self._column = 0
        self._noted = 0.0
        self._shown = False

    def write(self, text: str) -> None:
        """Show text at once."""
        self.clear()
        self._out.write(text)
        self._out.flush()
        if self._column_counts:
            self._column = column_after(text, self._column, get_terminal_size().columns)

    def note(self, done: int, total: int) -> None:
        """Show that `done` of `total` parts of the pass are through."""
        now = time.monotonic()
        if not self._takes_notes or now - self._noted < SECONDS_BETWEEN_NOTES:
            return
        note = f" [part {done} of {total}]"
        if self._column + len(note) < get_terminal_size().columns:
            self._notes.write(f"{SAVE}{note}{ERASE_TO_END}{RESTORE}")
            self._notes.flush()
            self._noted, self._shown = now, True

    def clear(self) -> None:
        """Take the note away."""
        if self._shown:
            self._notes.write(ERASE_TO_END)
            self._notes.flush()
            self._shown = False


class StatusLine:
    """One line on `notes` that is written over again and again, where that is a terminal."""

    def __init__(self, notes: TextIO) -> None:
        self._notes, self._is_terminal = notes, notes.isatty()
        self._said = float("-inf")
        self._shown = False

    def show(self, text: str) -> None:
        """Have the line say `text`, cut to the terminal's width; not more often than an eye can follow."""
        now = time.monotonic()
        if not self._is_terminal or now - self._said < SECONDS_BETWEEN_NOTES:
            return
        self._notes.write(f"\r{text[: get_terminal_size().columns - 1]}{ERASE_TO_END}")
        self._notes.flush()
        self._said, self._shown = now, True

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._notes.write(f"\r{ERASE_TO_END}")
            self._notes.flush()
            self._shown = False


def column_after(text: str, column: int, width: int) -> int:
    """The cursor's column after `text` was printed from `column` on, in a terminal of `width` columns."""
    for character in text:
        if character == "\n":
            column = 0
        elif not unicodedata.combining(character):
            cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            column = cells if column + cells > width else column + cells
    return column
