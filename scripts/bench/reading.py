"""Ways to read a prepared part in order, side by side: GB a second, and what share of a core each takes.

    python -m scripts.bench.reading DIR/block_00.safetensors [--rounds 5]

Every way reads the file cold, in chunks of 32 MB that are let go at once, in turns. To see a small readahead setting,
set /sys/block/DISK/queue/read_ahead_kb to 128 before.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch

from runner.system import files, memory
from runner.weights.chunks import LARGEST_CHUNK
from scripts.bench.harness import Column, at_once, interleaved, save, table

COLUMNS = (
    Column("way", "way"),
    Column("GB/s", "rate", ".2f", 1e9),
    Column("range of rounds", "rates", ".2f", 1e9),
    Column("share of a core", "core"),
)
Read = Callable[[int, int], None]  # start, bytes
MADV_POPULATE_READ = 22  # Linux 5.14; Python's mmap module does not name it
ASKED_AT_ONCE = 128 * 2**10  # the kernel may leave undone what is more than its readahead


def through_calls(path: Path, past_the_cache: bool, small_pages: bool = False) -> Iterator[Read]:
    """Reads into memory of our own, in huge pages unless said; one reader for each thread."""
    while True:
        own = memory.anonymous(LARGEST_CHUNK)
        if small_pages:
            own.madvise(mmap.MADV_NOHUGEPAGE)
        view = memoryview(own)
        file = files.open_for_streaming(path, past_the_cache=past_the_cache)

        def read(start: int, nbytes: int, file=file, view=view) -> None:
            file.seek(start)
            done = 0
            while done < nbytes:
                done += file.readinto(view[done:nbytes])
            if not past_the_cache:
                files.forget(file, start, nbytes)

        yield read


def through_a_mapping(path: Path, ahead: bool) -> Iterator[Read]:
    """Pages of a mapping, asked for ahead, or by touching them."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    bytes_ = torch.frombuffer(mapping, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)  # unlike mmap.madvise it leaves the interpreter's lock free
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def read(start: int, nbytes: int) -> None:
        address = bytes_.data_ptr() + start
        if ahead:
            for offset in range(0, nbytes, ASKED_AT_ONCE):
                libc.madvise(address + offset, min(ASKED_AT_ONCE, nbytes - offset), mmap.MADV_WILLNEED)
            libc.madvise(address, nbytes, MADV_POPULATE_READ)
        else:
            bytes_[start : start + nbytes : mmap.PAGESIZE].sum()
        libc.madvise(address, nbytes, mmap.MADV_DONTNEED)
        with path.open("rb", buffering=0) as file:
            files.forget(file, start, nbytes)

    while True:
        yield read


def seconds(path: Path, ways: Iterator[Read], threads: int) -> tuple[float, float]:
    """Wall and processor seconds to read the file once, cold."""
    size = path.stat().st_size // LARGEST_CHUNK * LARGEST_CHUNK
    with path.open("rb", buffering=0) as file:
        files.forget(file, 0, 0)
    starts = iter(range(0, size, LARGEST_CHUNK))

    def work(read: Read) -> None:
        for start in starts:  # one step of a range's iterator cannot be taken by two threads
            read(start, LARGEST_CHUNK)

    readers = [partial(work, next(ways)) for _ in range(threads)]
    processor = time.process_time()
    return at_once(readers), time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to read a prepared part in order, side by side.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    size = given.file.stat().st_size // LARGEST_CHUNK * LARGEST_CHUNK
    readers: dict[str, Callable[[], Iterator[Read]]] = {
        "past the page cache": lambda: through_calls(given.file, True),
        "the same into small pages": lambda: through_calls(given.file, True, small_pages=True),
        "through the page cache": lambda: through_calls(given.file, False),
        "mapped, MADV_POPULATE_READ": lambda: through_a_mapping(given.file, True),
        "mapped, touched": lambda: through_a_mapping(given.file, False),
    }
    ways = {
        f"{name}, {threads} threads": lambda make=make, threads=threads: seconds(given.file, make(), threads)
        for threads in (1, 2, 4)
        for name, make in readers.items()
    }
    rows = [
        {
            "way": name,
            "rate": median(size / wall for wall, _ in found),
            "rates": [size / wall for wall, _ in found],
            "core": median(processor / wall for wall, processor in found),
        }
        for name, found in interleaved(ways, given.rounds).items()
    ]
    save(given.json, "reading", {"measured": rows})
    print(table(COLUMNS, rows))


if __name__ == "__main__":
    main()
