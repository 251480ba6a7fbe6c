"""The one base error: what went wrong and what to do next."""


class BloomdeskError(Exception):
    """A failure that the user can understand and act on.

    `message` is one sentence that says what, where, and expected against found.
    `hint` is the next command to run or thing to do, or empty where there is none.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        # It may quote a file's names; those must not reach the terminal as commands, or break the one line.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message)
        self.message = message
        self.hint = hint

    def worded(self) -> str:
        """The one form in which an error is shown to the user."""
        return f"error: {self.message}" + (f"\n  next: {self.hint}" if self.hint else "")
