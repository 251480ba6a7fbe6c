"""The disk that a path is on."""

from __future__ import annotations

import shutil
from pathlib import Path


def existing_directory(path: Path) -> Path:
    """The directory `path`, or the nearest one above it that exists."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on; `path` need not exist yet."""
    return shutil.disk_usage(existing_directory(path)).free
