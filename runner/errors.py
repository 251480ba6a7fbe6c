"""The base of all errors that users see: what went wrong, and what to do next."""


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
