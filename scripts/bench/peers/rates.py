"""What the disk and the memory give, for the limits that a benchmark is compared with.

python -m scripts.bench.peers.rates disk --directory DIRECTORY --seconds 4 --threads 4
python -m scripts.bench.peers.rates memory --seconds 4 --threads 2
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from runner.system import memory

CHUNK = 2**23
MEMORY_BYTES = 2**31


def disk_rate(directory: Path, seconds: float, threads: int) -> float:
    """Bytes a second of cold files, read by several threads past the page cache where the system allows it.

    They read into huge pages, where a disk may be several times as fast: a request has room for so many pages only.
    """
    files = [(path, path.stat().st_size) for path in sorted(directory.glob("*.safetensors"))]
    places = iter([(path, offset) for path, size in files for offset in range(0, size, CHUNK)])
    buffers = [memory.anonymous(CHUNK) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(bytes(CHUNK))  # the pages are there before time counts
    start = time.perf_counter()

    def read(buffer: mmap.mmap) -> int:
        total = 0
        for path, offset in places:  # one step of a list's iterator cannot be taken by two threads
            descriptor = _opened(path)
            total += os.preadv(descriptor, [buffer], offset)
            os.close(descriptor)
            if time.perf_counter() - start > seconds:
                break
        return total

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, buffers))
    return total / (time.perf_counter() - start)


def _opened(path: Path) -> int:
    with suppress(OSError):
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    return os.open(path, os.O_RDONLY)


def memory_rate(seconds: float, threads: int) -> float:
    """Bytes a second that `threads` cores read from memory: the best of several products and sums."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(MEMORY_BYTES // 4)
    matrix = data.view(-1, 4096)
    row = torch.ones(4096)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for work in (lambda: data.sum(), lambda: torch.mv(matrix, row), lambda: data.amax()):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
    return MEMORY_BYTES / best


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes a second of the disk or the memory.")
    parser.add_argument("what", choices=("disk", "memory"))
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    if given.what == "disk":
        rate = disk_rate(given.directory, given.seconds, given.threads)
    else:
        rate = memory_rate(given.seconds, given.threads)
    print(json.dumps({"bytes_per_second": rate}))


if __name__ == "__main__":
    main()
