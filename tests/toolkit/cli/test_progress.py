"""The status line of long work: how much is done, how fast, and, once that says something, the time left."""

from __future__ import annotations

import io
import os

import pytest

from toolkit.cli import progress
from toolkit.cli.progress import WorkProgress, print_above_status


@pytest.mark.parametrize(
    ("seconds", "done", "text"),
    [
        (0.5, 4_000, "converting: 4 kB of 400 GB (0%), block_00, 8 kB/s\n"),
        (3.0, 1_000_000, "converting: 1 MB of 400 GB (0%), block_00, 333 kB/s\n"),
        (3.0, 6 * 10**9, "converting: 6 GB of 400 GB (2%), block_00, 2 GB/s, 3 min 17 s left\n"),
        (60.0, 10**9, "converting: 1 GB of 400 GB (0%), block_00, 16.7 MB/s, 6 h 39 min left\n"),
        (60.0, 0, "converting: 0 bytes of 400 GB (0%), block_00, 0 bytes/s\n"),
    ],
)
def test_the_time_left_is_said_once_it_is_known(
    seconds: float, done: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    notes = io.StringIO()
    with WorkProgress("converting", 400 * 10**9, notes) as work:
        clock[0] += seconds
        work("block_00", done, 10**10)
    assert notes.getvalue() == text


def test_elsewhere_than_on_a_terminal_lines_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    notes = io.StringIO()
    work = WorkProgress("verifying", 1000, notes)
    for file in ("a", "b"):
        for done in range(0, 501, 50):
            clock[0] += 1.0
            work(file, done, 500)
    assert [line.split(",")[0] for line in notes.getvalue().splitlines()] == [
        "verifying: 450 bytes of 1 kB (45%)",
        "verifying: 900 bytes of 1 kB (90%)",
    ]


def test_what_earlier_runs_have_left_makes_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 GB are hashed at the disk's speed, then 10 MB/s come; then nothing for an hour; then 20 MB/s."""
    clock, came = [1000.0], [0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    notes, there = io.StringIO(), 300 * 10**9

    def last() -> str:
        return notes.getvalue().splitlines()[-1].partition("block_00, ")[2]

    with WorkProgress("downloading", 352 * 10**9, notes, received=lambda: came[0]) as work:

        def go_on(seconds: int, bytes_per_second: int) -> None:
            for _ in range(seconds):
                clock[0] += 1
                came[0] += bytes_per_second
                work("block_00", there + came[0], 352 * 10**9)

        for done in range(0, there + 1, 10**9):
            clock[0] += 1
            work("block_00", done, 352 * 10**9)
        assert last() == "0 bytes/s"
        go_on(30, 10**7)
        assert last().startswith("10 MB/s, 1 h 26 min left")
        clock[0] += 3600
        work("block_00", there + came[0], 352 * 10**9)
        go_on(90, 2 * 10**7)
        assert last().startswith("20 MB/s, 41 min ")


def test_shards_alone_say_how_far_a_preparation_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    notes = io.StringIO()
    with WorkProgress("preparing", 1000, notes, only=("a.bin", "b.bin"), received=lambda: 750) as work:
        work("a.bin", 500, 500)
        work("block_00", 500, 500)
        work("b.bin", 250, 500)
    assert [line.split(",")[0] for line in notes.getvalue().splitlines()] == [
        "preparing: 500 bytes of 1 kB (50%)",
        "preparing: 750 bytes of 1 kB (75%)",
    ]


def test_while_nothing_comes_a_log_gets_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    notes = io.StringIO()
    with WorkProgress("downloading", 1000, notes, received=lambda: 500) as work:
        for _ in range(3600):
            clock[0] += 1
            work("a", 500, 1000)
    assert len(notes.getvalue().splitlines()) == 1


@pytest.mark.parametrize(("terminal", "expected"), [(True, "\r\x1b[Ka word\n"), (False, "a word\n")])
def test_a_word_takes_the_place_of_the_status(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, expected: str
) -> None:
    errors = io.StringIO()
    errors.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", errors)
    print_above_status("a word")
    assert errors.getvalue() == expected


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (120, "converting: 6 GB of 400 GB (2%), block_00, 2 GB/s, 3 min 17 s left"),
        (60, "6 GB of 400 GB (2%), 2 GB/s, 3 min 17 s left"),
        (40, "6 GB of 400 GB (2%), 3 min 17 s left"),
        (20, "2%, 3 min 17 s left"),
        (10, "2%"),
    ],
)
def test_a_narrow_terminal_gets_the_figures(columns: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("runner.cli.terminal.get_terminal_size", lambda: os.terminal_size((columns, 24)))
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    screen.isatty = lambda: True
    work = WorkProgress("converting", 400 * 10**9, screen)
    clock[0] += 3.0
    work("block_00", 6 * 10**9, 10**10)
    assert screen.getvalue() == f"\x1b7{text}\x1b[K\x1b8"
