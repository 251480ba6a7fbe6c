"""The base of all errors that users see: what went wrong, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class BloomdeskError(Exception):
    """A failure that the user can understand and act on.

    `message` is one sentence: what, where, expected against found. `hint` is the next command to run, or empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        # Names from files may be quoted in it: they must not control the terminal, nor break the line.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message)
        self.message = message
        self.hint = hint

    def worded(self) -> str:
        """The text that is shown to the user."""
        return f"error: {self.message}" + (f"\n  next: {self.hint}" if self.hint else "")


@contextmanager
def reading(path: Path, hint: str = "", place: str = "") -> Iterator[None]:
    """Raise `BloomdeskError` in place of an OSError: the file at `path` is missing, or cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise BloomdeskError(f"{path} is missing", hint) from None
    except OSError as error:
        raise BloomdeskError(f"{path} cannot be read{place}: {error.strerror or error}", hint) from error
