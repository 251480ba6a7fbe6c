"""Text and its status on a terminal, as a screen would show them."""

from __future__ import annotations

import io
from os import terminal_size

import pytest

from runner.cli import terminal as module
from runner.cli.terminal import StatusLine, column_after


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_terminal_size", lambda: terminal_size((40, 24)))
    monkeypatch.setattr(module, "SECONDS_BETWEEN_STATUSES", 0.0)


def test_a_status_stands_behind_the_text_and_goes_before_more_comes() -> None:
    screen = Tty()
    line = StatusLine(screen, screen)
    line.write("The answer")
    line.show("[part 3 of 72]")
    line.write(" is")
    assert screen.getvalue() == "The answer\x1b7 [part 3 of 72]\x1b[K\x1b8\x1b[K is"


def test_without_a_terminal_there_is_nothing_but_text() -> None:
    out, notes = io.StringIO(), io.StringIO()
    line = StatusLine(notes, out)
    line.show("[part 1 of 72]")
    line.write("text")
    line.show("[part 2 of 72]")
    line.clear()
    assert (out.getvalue(), notes.getvalue()) == ("text", "")


def test_a_status_goes_to_the_terminal_while_text_goes_to_a_file() -> None:
    out, notes = io.StringIO(), Tty()
    line = StatusLine(notes, out)
    line.write("x" * 39)
    line.show("[part 2 of 72]")
    assert "part 2 of 72" in notes.getvalue()


def test_a_status_that_would_wrap_behind_text_is_left_out() -> None:
    screen = Tty()
    line = StatusLine(screen, screen)
    line.write("x" * 30)
    line.show("[part 3 of 72]")
    assert screen.getvalue() == "x" * 30


def test_a_status_without_text_is_cut_to_the_width_and_taken_away() -> None:
    screen = Tty()
    line = StatusLine(screen)
    line.show("x" * 100)
    line.clear()
    assert screen.getvalue() == f"\x1b7{'x' * 39}\x1b[K\x1b8\r\x1b[K"


def test_a_status_elsewhere_is_a_line_now_and_then() -> None:
    notes = io.StringIO()
    line = StatusLine(notes, seconds_between_lines=0.0)
    line.show("one")
    line.clear()
    line.show("two")
    assert notes.getvalue() == "one\ntwo\n"


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
def test_the_column_after_text_counts_cells(text: str, column: int) -> None:
    assert column_after(text, 0, 40) == column


def test_a_dumb_terminal_gets_lines_as_a_log_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Tty()
    line = StatusLine(screen, seconds_between_lines=0.0)
    line.show("a status that is longer than the forty columns of the terminal", "short")
    line.clear()
    assert screen.getvalue() == "a status that is longer than the forty columns of the terminal\n"
