"""What differs between operating systems: reading past the page cache, huge pages, memory to spare.

Linux is the tuned one. Everywhere else, and wherever a call is refused, the plain form of the same thing is used:
slower or less exact about memory, and just as right.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

PAGE = 4096  # what reads past the page cache are aligned to; no disk has larger sectors
LINUX_CALLS = sys.platform == "linux"
_CACHED_STEP = 2**20
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 2**20  # malloc.h

_OWN_STATUS = Path("/proc/self/status")
_OWN_GROUPS, _GROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def open_for_streaming(path: Path, *, past_the_cache: bool) -> io.FileIO:
    """The file at `path`, to be read in multiples of `PAGE` at multiples of `PAGE` into aligned memory.

    Raises OSError with EINVAL where `past_the_cache` is asked for and the system, or the file system, cannot do that.
    """
    return _opened(path, "r", past_the_cache)


def open_for_writing(path: Path, *, past_the_cache: bool) -> io.FileIO:
    """The file at `path`, which is there, to be written in the same way. Raises OSError as the other does."""
    return _opened(path, "r+", past_the_cache)


def _opened(path: Path, mode: str, past_the_cache: bool) -> io.FileIO:
    if not past_the_cache:
        return io.FileIO(path, mode)
    if not LINUX_CALLS:
        raise OSError(errno.EINVAL, "nothing goes past the page cache here", str(path))
    return io.FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))


def open_for_rows(path: Path) -> io.FileIO:
    """The file at `path`, to be read a few kilobytes here and there: nothing is read ahead."""
    file = io.FileIO(path, "r")
    if LINUX_CALLS:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


@contextlib.contextmanager
def scratch_file(directory: Path) -> Iterator[Path]:
    """A path to a new, empty file in `directory`, which is gone afterwards; on Linux however the process ends."""
    if LINUX_CALLS:
        with tempfile.TemporaryFile(dir=directory) as file:  # it has no name from the beginning
            yield Path(f"/proc/self/fd/{file.fileno()}")
        return
    descriptor, name = tempfile.mkstemp(prefix="bloomdesk-", dir=directory)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink()


def forget(file: io.FileIO, start: int, nbytes: int) -> None:
    """Give the page cache's copy of a range back, where nobody has it mapped."""
    if LINUX_CALLS:
        os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def anonymous(nbytes: int) -> mmap.mmap:
    """Page-aligned memory of our own, in huge pages where the system gives them."""
    if not LINUX_CALLS:
        return mmap.mmap(-1, nbytes)
    # Shared memory, which is what Python would take, gets no huge pages on most systems.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def read_cached(path: Path, start: int, view: memoryview) -> int:
    """Read what the page cache has of a range, from its beginning on, without waiting for the disk; the bytes read.

    A page that is looked for in vain is on its way into the page cache afterwards, so it begins with a single one.
    """
    if not LINUX_CALLS:
        return 0
    done = 0
    with open_for_rows(path) as file, contextlib.suppress(OSError):  # it has no more, or cannot say
        while done < len(view):
            step = _CACHED_STEP if done else PAGE
            count = os.preadv(file.fileno(), [view[done : done + step]], start + done, os.RWF_NOWAIT)
            if not count:
                break
            done += count
    return done


def give_freed_memory_back() -> None:
    """Have large blocks of memory go back to the system as soon as they are freed, where the C library listens.

    glibc learns to keep them, up to 32 MB each: after a pass over a long prompt it held hundreds of megabytes.
    """
    if LINUX_CALLS:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def memory_to_spare() -> int:
    """Bytes that this process may still take: what the machine has left, and no more than its control group has."""
    spare = psutil.virtual_memory().available
    if LINUX_CALLS:
        spare = min([spare, *(left for group in _control_groups() if (left := _left_in(group)) is not None)])
    return max(0, spare)


def memory_in_use() -> int:
    """Bytes of RAM that this process occupies."""
    return psutil.Process().memory_info().rss


def memory_of_its_own() -> int:
    """The same without the files that it has mapped, where the system tells: those count as memory to spare."""
    info = psutil.Process().memory_info()
    return info.rss - (info.shared if LINUX_CALLS else 0)


def peak_memory() -> int | None:
    """The most bytes of RAM that this process ever occupied; None where the system does not say."""
    if LINUX_CALLS:  # where rusage still counts what the process was before it became this program
        with contextlib.suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB$", _OWN_STATUS.read_text(), re.MULTILINE)
            if found:
                return int(found[1]) * 1024
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bytes_read_from_disk() -> int | None:
    """Bytes that the kernel fetched from storage for this process so far; None where it does not count them."""
    try:
        return psutil.Process().io_counters().read_bytes
    except (AttributeError, psutil.Error, OSError):
        return None


def _control_groups() -> list[Path]:
    """The directories of this process's memory control groups, from its own up to the root."""
    groups: list[Path] = []
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _GROUP_ROOT / controllers
        inner = root / path.lstrip("/")
        # Inside a container the path may be that of the host; its own limits are then at the root.
        while inner != root:
            groups.append(inner)
            inner = inner.parent
        groups.append(root)
    return groups


def _left_in(group: Path) -> int | None:
    """What a control group has left, page cache that can be dropped counted as free; None without a limit."""
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
