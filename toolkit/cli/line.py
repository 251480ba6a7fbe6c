"""The line to the Hub as the options of download, prepare and repair want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner.units import parse_duration, parse_rate
from toolkit.cli.progress import print_above_status

if TYPE_CHECKING:
    from toolkit.hub.line import Line


def line_of(patience: str, limit_rate: str | None) -> Line:
    """A line that says its pauses on standard error. Raises `BloomdeskError` for a time or a rate that is none."""
    from toolkit.hub.line import Line

    rate = None if limit_rate is None else parse_rate(limit_rate)
    return Line(patience=parse_duration(patience), rate=rate, say=print_above_status)
