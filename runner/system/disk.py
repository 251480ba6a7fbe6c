"""The disk that a path is on."""

from __future__ import annotations

import shutil
from pathlib import Path

# Of a file system that cannot tell: more than any disk has, so that work begins.
UNKNOWN_SPACE = 2**62


def existing_directory(path: Path) -> Path:
    """The directory `path`, or the nearest one above it that exists."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on, or `UNKNOWN_SPACE`; `path` need not exist yet."""
    disk = shutil.disk_usage(existing_directory(path))
    # FUSE and shared folders may say 0 of 0.
    return disk.free if disk.free or disk.total else UNKNOWN_SPACE
