"""Text and notes on a terminal, as a screen would show them."""

from __future__ import annotations

import io
from os import terminal_size

import pytest

from runner.cli import terminal as module
from runner.cli.terminal import Terminal, column_after


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_terminal_size", lambda: terminal_size((40, 24)))
    monkeypatch.setattr(module, "SECONDS_BETWEEN_NOTES", 0.0)


def test_a_note_stands_behind_the_text_and_goes_before_more_comes() -> None:
    screen = Tty()
    terminal = Terminal(screen, screen)
    terminal.write("The answer")
    terminal.note(3, 72)
    terminal.write(" is")
    assert screen.getvalue() == "The answer\x1b7 [part 3 of 72]\x1b[K\x1b8\x1b[K is"


def test_nothing_but_text_where_there_is_no_terminal() -> None:
    out, notes = io.StringIO(), io.StringIO()
    terminal = Terminal(out, notes)
    terminal.note(1, 72)
    terminal.write("text")
    terminal.note(2, 72)
    terminal.clear()
    assert (out.getvalue(), notes.getvalue()) == ("text", "")


def test_notes_go_to_the_terminal_while_text_goes_to_a_file() -> None:
    out, notes = io.StringIO(), Tty()
    terminal = Terminal(out, notes)
    terminal.write("x" * 39)
    terminal.note(2, 72)
    assert "part 2 of 72" in notes.getvalue()


def test_a_note_that_would_wrap_is_left_out() -> None:
    screen = Tty()
    terminal = Terminal(screen, screen)
    terminal.write("x" * 30)
    terminal.note(3, 72)
    assert screen.getvalue() == "x" * 30


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("abc", 3),
        ("ab\nc", 1),
        ("x" * 40, 40),
        ("x" * 41, 1),
        ("房子", 4),
        ("e\u0301", 1),
        ("x" * 39 + "房", 2),
    ],
)
def test_columns(text: str, column: int) -> None:
    assert column_after(text, 0, 40) == column
