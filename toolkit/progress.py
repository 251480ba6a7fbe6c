"""What long work reports while it runs; the terminal's side of it is `terminal.py`."""

from __future__ import annotations

from collections.abc import Callable

# Called with a file's name, its bytes done so far, and its bytes in all.
Progress = Callable[[str, int, int], None]


def silent(file: str, done: int, total: int) -> None:
    """Report nothing."""
