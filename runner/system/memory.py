"""Memory: huge pages, mapped files, what this process uses, and what it may still take."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import re
import sys
from functools import cache
from pathlib import Path

import psutil

from runner.system import platform

# glibc's malloc.h; blocks of this size and more are given back when they are freed.
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 2**20
# Of Linux 5.14; Python's mmap module does not name it.
_MADV_POPULATE_READ = 22
# The control groups of this process, and the directory that describes them.
OWN_GROUPS, GROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def anonymous(nbytes: int) -> mmap.mmap:
    """Page-aligned memory that belongs to no file, in huge pages if the system has them."""
    if not platform.LINUX_CALLS:
        return mmap.mmap(-1, nbytes)
    # Python's default is shared memory, which gets no huge pages on most systems.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel may have no huge pages.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def mapped(file: io.FileIO) -> mmap.mmap:
    """The whole of a file as read-only memory. Raises OSError if its file system cannot be mapped."""
    if not platform.LINUX_CALLS:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Some file systems of user space have only private maps.
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def page_in(address: int, start: int, nbytes: int) -> bool:
    """Map the pages of `nbytes` bytes from byte `start` of a file that is mapped at `address`, read where needed.

    False if this system cannot do that, or not now. Other threads go on in the meantime.
    """
    if not platform.LINUX_CALLS:
        return False
    first = start - start % mmap.PAGESIZE
    madvise = _libc().madvise
    while (result := madvise(address + first, start + nbytes - first, _MADV_POPULATE_READ)) == -1:
        if ctypes.get_errno() != errno.EINTR:
            break
    return result == 0


def drop_pages(mapping: mmap.mmap, start: int, nbytes: int) -> None:
    """Take the pages of a range of a mapped file out of this process; whoever uses one has it from the file again."""
    first = start - start % mmap.PAGESIZE
    if platform.LINUX_CALLS:
        mapping.madvise(mmap.MADV_DONTNEED, first, start + nbytes - first)


@cache
def _libc() -> ctypes.CDLL:
    """The C library; unlike Python's own calls these let other threads run."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def give_freed_memory_back() -> None:
    """Make glibc return large blocks of memory to the system as soon as they are freed.

    By default it learns to keep blocks of up to 32 MB: after a pass over a long prompt, hundreds of megabytes.
    """
    if platform.LINUX_CALLS:
        # Other C libraries have no mallopt.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def memory_to_spare() -> int:
    """Bytes that this process may still take: what the machine has left, within the limits of its control groups."""
    spare = psutil.virtual_memory().available
    if platform.LINUX_CALLS:
        spare = min([spare, *(left for group in _control_groups() if (left := _left_in(group)) is not None)])
    return max(0, spare)


def all_memory() -> int:
    """Bytes of RAM that the machine has."""
    return psutil.virtual_memory().total


def memory_in_use() -> int:
    """Bytes of RAM that this process occupies."""
    return psutil.Process().memory_info().rss


def memory_of_its_own() -> int:
    """Bytes of RAM of this process without mapped files, if the system tells: those count as memory to spare."""
    info = psutil.Process().memory_info()
    return info.rss - (info.shared if platform.LINUX_CALLS else 0)


def peak_memory() -> int | None:
    """The most bytes of RAM that this process ever occupied, or None if the system does not say."""
    # Linux's rusage also counts what the process was before it became this program.
    if platform.LINUX_CALLS:
        with contextlib.suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
            if found:
                return int(found[1]) * 1024
    info = psutil.Process().memory_info()
    # Windows
    if hasattr(info, "peak_wset"):
        return info.peak_wset
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bytes_read_from_disk() -> int | None:
    """Bytes that the kernel has fetched from storage for this process, or None if it does not count them."""
    try:
        return psutil.Process().io_counters().read_bytes
    except (AttributeError, psutil.Error, OSError):
        return None


def _control_groups() -> list[Path]:
    """The directories of this process's memory control groups, from the innermost to the root."""
    groups: list[Path] = []
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = GROUP_ROOT / controllers
        inner = root / path.lstrip("/")
        # Inside a container the path may be that of the host; its own limits are then at the root.
        while inner != root:
            groups.append(inner)
            inner = inner.parent
        groups.append(root)
    return groups


def _left_in(group: Path) -> int | None:
    """Bytes that a control group has left, with its droppable page cache; None if it has no limit."""
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = (group / limit_file).read_text().strip()
            most = 2**60 if limit == "max" else int(limit)
            usage = int((group / usage_file).read_text())
            counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most >= 2**60:
            return None
        file_pages = sum(
            int(counters.get(f"total_{name}", counters.get(name, 0)))
            for name in ("active_file", "inactive_file")
        )
        return most - usage + file_pages
    return None
