"""The disk that a path is on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from runner.system import platform

# Of a file system that cannot tell: more than any disk has, so that work begins.
UNKNOWN_SPACE = 2**62
# As systems name the file systems whose files end below 4 GiB.
_FAT = {"vfat", "msdos", "fat", "fat32"}


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


def largest_file(path: Path) -> tuple[int, str]:
    """The most bytes that a file under `path` may have, and what limits it; `UNKNOWN_SPACE` and "" if nothing does."""
    if not platform.WINDOWS:
        import resource

        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if most != resource.RLIM_INFINITY:
            return most, "ulimit -f"
    return (2**32 - 1, "FAT") if _file_system(path) in _FAT else (UNKNOWN_SPACE, "")


def _file_system(path: Path) -> str:
    """The name of the file system that holds `path`, or "" if the system does not say."""
    import psutil  # what writes nothing starts without it

    place = os.path.realpath(existing_directory(path))
    holding = [
        (len(each.mountpoint), each.fstype.lower())
        for each in psutil.disk_partitions(all=True)
        if Path(place).is_relative_to(each.mountpoint)
    ]
    return max(holding, default=(0, ""))[1]
