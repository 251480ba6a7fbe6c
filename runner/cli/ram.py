"""The option --ram."""

from __future__ import annotations

import sys

from runner.units import parse_size, size


def ram_of(text: str | None) -> int | None:
    """Bytes of a size like 12GB, or None without one; that it is more than the machine has is said.

    Raises `BloomdeskError` if it is no size.
    """
    if text is None:
        return None
    from runner.system.memory import all_memory  # what has no --ram starts without it

    wanted, there = parse_size(text), all_memory()
    if wanted > there:
        print(f"--ram {text} is more than this machine has, {size(there)}: it may swap", file=sys.stderr)
    return wanted
