"""Numbers for people: sizes, rates, durations and shares, with three digits at any magnitude; and such text read."""

from __future__ import annotations

import re

from runner.errors import BloomdeskError

_DURATION = re.compile(
    r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s(?:ec(?:onds?)?)?|m(?:in(?:utes?)?)?|h(?:ours?)?|d(?:ays?)?)?\s*",
    re.IGNORECASE | re.ASCII,
)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of `12GB`, `12 GB`, `1.5G` or `900MB`; with an i, as in `12GiB`, in powers of 1,024.

    Raises `BloomdeskError` for anything else, and for a size of 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE | re.ASCII)
    size = 0
    if found and (found[2] or not found[3]):
        unit = (1024 if found[3] else 1000) ** _POWERS[found[2].lower()]
        # More digits than any size has may become infinite, which is no integer.
        size = int(min(2.0**60, float(found[1])) * unit)
    if not 0 < size < 2**60:
        raise BloomdeskError(f"{text[:40]!r} is not an amount of memory", "write it like 12GB or 900MB")
    return size


def parse_rate(text: str) -> int:
    """Bytes a second of `20MB/s`, `20 MB/sec` or `20MB`. Raises `BloomdeskError` for anything else."""
    try:
        return parse_size(re.sub(r"/s(ec)?$", "", text.strip(), flags=re.IGNORECASE))
    except BloomdeskError:
        raise BloomdeskError(f"{text[:40]!r} is not a rate", "write it like 20MB/s") from None


def parse_duration(text: str) -> float:
    """Seconds of `12h`, `90 min`, `45s`, `2d`, `1.5 hours` or `0`.

    Raises `BloomdeskError` for anything else.
    """
    found = _DURATION.fullmatch(text)
    if found and float(found[1]) < 1e6 and (found[2] or not float(found[1])):
        return float(found[1]) * _SECONDS[found[2][0].lower() if found[2] else "s"]
    raise BloomdeskError(f"{text[:40]!r} is not a length of time", "write it like 12h, 90min or 45s")


def number(value: float) -> str:
    """Three digits without an exponent: "1,230", "12.3", "0.0123"."""
    text = f"{_rounded(value):,.6f}"
    return text.rstrip("0").rstrip(".")


def size(nbytes: float) -> str:
    """Bytes in decimal units: "352 GB", "7.2 MB", "58.3 kB", "17 bytes"."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if _rounded(nbytes) >= one:
            return f"{number(nbytes / one)} {unit}"
    return f"{number(nbytes)} bytes"


def rate(bytes_per_second: float) -> str:
    """ "2.35 GB/s"."""
    return f"{size(bytes_per_second)}/s"


def duration(seconds: float) -> str:
    """ "1.23 ms", "12.3 s", "5 min 7 s", "3 h 20 min"."""
    if 0 < _rounded(seconds) < 1:
        return f"{number(seconds * 1e3)} ms"
    if seconds < 99.95:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def percent(share: float) -> str:
    """ "97.3%", "0.61%"."""
    return f"{number(100 * share)}%"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
