"""The entry of the `bloomdesk` command. Ctrl-C while its modules are imported ends it without a traceback."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

# What shells report for a command ended by Ctrl-C.
INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command of this process, and end with its exit status."""
    # A shell that starts it in the background has it ignore Ctrl-C.
    is_heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_heeded:
        signal.signal(signal.SIGINT, _end)
    from toolkit.cli.app import main as run

    if is_heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # Nothing is begun, and nothing is to be cleared up.
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
