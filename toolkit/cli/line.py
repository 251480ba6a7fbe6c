"""The line to the Hub as the options of download, prepare and repair want it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from runner.errors import BloomdeskError
from runner.units import parse_duration, parse_size
from toolkit.cli.progress import print_above_status

if TYPE_CHECKING:
    from toolkit.hub.line import Line


def line_of(patience: str, limit_rate: str | None) -> Line:
    """A line that says its pauses on standard error. Raises `BloomdeskError` for a time or a rate that is none."""
    from toolkit.hub.line import Line

    return Line(patience=parse_duration(patience), rate=_rate(limit_rate), say=print_above_status)


def _rate(text: str | None) -> int | None:
    """ "20MB/s" and "20MB" are 20,000,000 bytes a second."""
    if text is None:
        return None
    try:
        return parse_size(re.sub(r"/s(ec)?$", "", text.strip(), flags=re.IGNORECASE))
    except BloomdeskError:
        raise BloomdeskError(f"--limit-rate {text[:40]!r} is not a rate", "write it like 20MB/s") from None
