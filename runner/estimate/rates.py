"""What this machine gives: its disk to a stream, its memory to a product of one row, its cores to many rows."""

from __future__ import annotations

import errno
import io
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from runner.errors import BloomdeskError
from runner.format.coded import ROW_GROUP_ROWS
from runner.kernel.matmul import Kernel
from runner.kernel.panel import CODES, GROUP, HEADER
from runner.system import files, memory, platform
from runner.system.disk import free_bytes
from runner.weights.chunks import LARGEST_CHUNK
from runner.weights.stream import READERS

COLUMNS = 4096
MEMORY_BYTES = 256 * 2**20  # no cache of a desktop's processor holds as much
COMPUTE_ROWS = 64
ROUNDS = 5
DISK_SECONDS = 3.0
DISK_BYTES = 2**30
SMALLEST_SCRATCH = LARGEST_CHUNK  # one of less says nothing about a disk
_WRITING_SECONDS = 5.0  # a slow disk need not take all of it


@dataclass(frozen=True)
class Rates:
    """Bytes of a cold file a second, bytes of weights a second at one row, multiply-adds a second at many rows.

    `decoded` is that of losslessly coded weights at one row, counted as what they decode to.
    """

    disk: float
    memory: float
    compute: float
    decoded: float


def disk_rate(paths: Sequence[Path], seconds: float = DISK_SECONDS, nbytes: int = DISK_BYTES) -> float:
    """Bytes a second of these files one after another, cold, read in the way of a stream.

    It ends with the files, or after so many seconds or bytes. Raises `BloomdeskError` where one cannot be read.
    """
    sizes = {path: path.stat().st_size for path in paths}
    chunks = iter([(path, start) for path in paths for start in range(0, sizes[path], LARGEST_CHUNK)])
    lock, over = threading.Lock(), threading.Event()
    counts = [0] * READERS
    failures: list[OSError] = []

    def read(number: int) -> None:
        buffer = memoryview(buffers[number])
        while time.perf_counter() < deadline and sum(counts) < nbytes and not over.is_set():
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            path, start = chunk
            wanted = min(LARGEST_CHUNK, sizes[path] - start)
            try:
                files.read_uncached(path, start, buffer, wanted)
                counts[number] += wanted
            except OSError as error:
                failures.append(error)
                over.set()

    buffers = [_touched(LARGEST_CHUNK) for _ in counts]
    for path in paths:
        with io.FileIO(path) as file:
            files.forget(file, 0, sizes[path])
    began = time.perf_counter()
    deadline = began + seconds
    threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(READERS)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:  # also after Ctrl-C nobody is left reading
        over.set()
        for thread in threads:
            thread.join()
    taken = time.perf_counter() - began
    if failures:
        raise BloomdeskError(f"{paths[0].parent} cannot be read: {failures[0].strerror}") from failures[0]
    return sum(counts) / taken


@contextmanager
def scratch(directory: Path, nbytes: int = DISK_BYTES) -> Iterator[Path]:
    """A path to a file of up to `nbytes` bytes on the disk of `directory`, which is gone afterwards.

    It is smaller where the disk is slow or nearly full. Raises `BloomdeskError` where nothing can be written there.
    """
    try:
        room = free_bytes(directory) // 2
        if room < SMALLEST_SCRATCH:
            raise OSError(errno.ENOSPC, "there is no room to measure it")
        with files.scratch_file(directory) as path:
            files.past_the_cache_if_possible(lambda past: _fill_with_noise(path, min(nbytes, room), past))
            yield path
    except OSError as error:
        raise BloomdeskError(
            f"{directory} cannot be measured: {error.strerror}",
            "name a directory on the disk in question, one that you may write to: bloomdesk plan DIRECTORY",
        ) from error


def _fill_with_noise(path: Path, nbytes: int, past_the_cache: bool) -> None:
    buffer = memory.anonymous(LARGEST_CHUNK)
    buffer.write(os.urandom(LARGEST_CHUNK))  # a disk that compresses gains nothing
    deadline = time.perf_counter() + _WRITING_SECONDS
    with files.open_for_streaming(path, "r+", past_the_cache=past_the_cache) as file:
        while file.tell() < nbytes and time.perf_counter() < deadline:
            file.write(buffer)
            if not past_the_cache:
                os.fsync(file.fileno())


def kernel_rates(kernel: Kernel, dtype: torch.dtype) -> tuple[float, float, float]:
    """The product's `memory`, `compute` and `decoded` of `Rates`; `COMPUTE_ROWS` rows are many.

    It takes `MEMORY_BYTES` of memory while it measures.
    """
    buffer = memory.anonymous(MEMORY_BYTES)
    weight = torch.frombuffer(buffer, dtype=dtype).view(-1, COLUMNS).fill_(0.01)
    few = weight[: LARGEST_CHUNK // (COLUMNS * dtype.itemsize)]
    one_row = _seconds(lambda x, out: kernel.accumulate(x, weight, out), 1, len(weight))
    many_rows = _seconds(lambda x, out: kernel.accumulate(x, few, out), COMPUTE_ROWS, len(few))
    coded, row_groups, rows = _coded_noise(buffer)
    decoded = _seconds(lambda x, out: kernel.accumulate_coded(x, coded, row_groups, out), 1, rows)
    decoded_bytes = rows * COLUMNS * torch.bfloat16.itemsize
    return weight.nbytes / one_row, COMPUTE_ROWS * few.numel() / many_rows, decoded_bytes / decoded


def _coded_noise(buffer: mmap.mmap) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Coded bytes that fill `memory` as they may be in a real matrix, their row groups, and how many rows they are.

    In random codes each one in four is an escape, which normal weights come near.
    """
    weights = ROW_GROUP_ROWS * COLUMNS
    counts = [weights // 4**level for level in (1, 2, 3)]
    header = torch.zeros(HEADER, dtype=torch.uint8)
    header[:12] = torch.tensor(counts, dtype=torch.int32).view(torch.uint8)
    levels = [-(-count // GROUP) * CODES for count in counts[:2]]
    nbytes = HEADER + -(-weights // GROUP) * (CODES + GROUP) + sum(levels) + -(-counts[2] // CODES) * CODES
    count = len(buffer) // nbytes
    coded = torch.frombuffer(buffer, dtype=torch.uint8, count=count * nbytes).view(count, nbytes)
    coded[:] = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    coded[:, :HEADER] = header
    return coded.flatten(), torch.arange(count + 1) * nbytes, count * ROW_GROUP_ROWS


def _seconds(product: Callable[[torch.Tensor, torch.Tensor], None], rows: int, outputs: int) -> float:
    """What a product of so many rows and outputs takes, the median of some."""
    x, out = torch.ones(rows, COLUMNS), torch.zeros(rows, outputs)
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        product(x, out)
        taken.append(time.perf_counter() - began)
    return median(taken)


def _touched(nbytes: int) -> mmap.mmap:
    """Memory whose pages are there already, as those of a buffer are after its first use."""
    buffer = memory.anonymous(nbytes)
    for start in range(0, nbytes, platform.PAGE):
        buffer[start] = 0
    return buffer
