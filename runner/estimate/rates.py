"""The rates of this machine: its disk's to a stream, its memory's to a product of one row, its cores' to many rows."""

from __future__ import annotations

import errno
import io
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from runner.errors import BloomdeskError
from runner.format.coded import ROW_GROUP_ROWS
from runner.format.quantised import INT4, INT8, Coding
from runner.format.safetensors import tensor_nbytes
from runner.kernel.decode import CODES, GROUP, HEADER
from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from runner.system import files, memory
from runner.system.disk import free_bytes
from runner.weights.checkpoint import TORCH_DTYPES
from runner.weights.chunks import LARGEST_CHUNK, STORED_DTYPES
from runner.weights.stream import READERS

COLUMNS = 4096
# No cache of a desktop's processor holds as much.
MEMORY_BYTES = 256 * 2**20
COMPUTE_ROWS = 64
ROUNDS = 5
DISK_SECONDS = 3.0
DISK_BYTES = 2**30
# A smaller file says nothing about a disk.
SMALLEST_SCRATCH = LARGEST_CHUNK
# A slow disk gets a smaller file.
_WRITING_SECONDS = 5.0
# Bytes a second of one share.
SHARE = 10**6


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    disk      bytes of cold files; if weights are spread over several disks, of all together as they are spread
    memory    bytes of plain weights in products of one row
    compute   multiply-adds in products of many rows
    decoded   bytes that losslessly coded weights decode to, in products of one row
    int8      bytes of plain weights that those of 8 bits stand for, in products of one row
    int4      the same of 4 bits
    disks     of each disk, if there are several
    """

    disk: float
    memory: float
    compute: float
    decoded: float
    int8: float
    int4: float
    disks: tuple[float, ...] = ()

    def with_disks(self, disks: tuple[float, ...]) -> Rates:
        """The same machine with other disks, each of which has rows in proportion to its rate."""
        return replace(self, disk=together(disks, shares_of(disks)), disks=disks)


def disk_rate(paths: Sequence[Path], seconds: float = DISK_SECONDS, nbytes: int = DISK_BYTES) -> float:
    """Bytes a second of these files one after another, cold, read as a stream reads them.

    It ends with the files, or after that many seconds or bytes. Raises `BloomdeskError` if one cannot be read.
    """
    sizes = {path: path.stat().st_size for path in paths}
    for path, size in sizes.items():
        with io.FileIO(path) as file:
            files.forget(file, 0, size)
    starts = [(path, start) for path, size in sizes.items() for start in range(0, size, LARGEST_CHUNK)]
    left = iter(starts[: -(-nbytes // LARGEST_CHUNK)])
    buffers = [memory.anonymous(LARGEST_CHUNK) for _ in range(READERS)]
    for buffer in buffers:
        buffer[:] = bytes(LARGEST_CHUNK)  # so that its pages are there, as after a buffer's first use
    began = time.perf_counter()

    def read(buffer: mmap.mmap) -> int:
        count = 0
        for path, start in left:  # each reader takes the next one
            wanted = min(LARGEST_CHUNK, sizes[path] - start)
            files.read_uncached(path, start, memoryview(buffer), wanted)
            count += wanted
            if time.perf_counter() - began >= seconds:
                break
        return count

    with ThreadPoolExecutor(READERS) as readers:
        try:
            count = sum(readers.map(read, buffers))
        except OSError as error:
            raise BloomdeskError(f"{paths[0].parent} cannot be read: {error.strerror}") from error
        finally:
            deque(left, maxlen=0)  # also after Ctrl-C the readers find nothing more
    return count / (time.perf_counter() - began)


def disk_rates(of_disks: Sequence[Sequence[Path]]) -> tuple[float, ...]:
    """The rate of the files on each of several disks, all of which are read at once; raises as `disk_rate` does."""
    with ThreadPoolExecutor(len(of_disks)) as threads:
        return tuple(threads.map(disk_rate, of_disks))


def scratch_rate(directory: Path) -> float:
    """The rate of a disk, by a file that is written there, read and deleted; raises as `scratch` does."""
    with scratch(directory) as path:
        return disk_rate([path])


def scratch_rates(directories: Sequence[Path]) -> tuple[float, ...]:
    """The rate of each of several disks, all of which are written and read at once; raises as `scratch` does."""
    with ThreadPoolExecutor(len(directories)) as threads:
        return tuple(threads.map(scratch_rate, directories))


def shares_of(disks: Sequence[float]) -> tuple[int, ...]:
    """Shares of the rows in proportion to what each disk gives."""
    return tuple(max(1, round(each / SHARE)) for each in disks)


def together(rates: Sequence[float], nbytes: Sequence[int]) -> float:
    """Bytes a second of disks that are read at once, each with its bytes of the weights: the last to end decides."""
    seconds = max(count / rate for rate, count in zip(rates, nbytes, strict=True))
    return sum(nbytes) / seconds if seconds else max(rates)


@contextmanager
def scratch(directory: Path, nbytes: int = DISK_BYTES) -> Iterator[Path]:
    """A path to a file of up to `nbytes` bytes on the disk of `directory`, deleted afterwards.

    It is smaller if the disk is slow or nearly full. Raises `BloomdeskError` if nothing can be written there.
    """
    try:
        space = free_bytes(directory) // 2
        if space < SMALLEST_SCRATCH:
            raise OSError(errno.ENOSPC, "there is too little free space")
        with files.scratch_file(directory) as path:
            files.past_the_cache_if_possible(lambda past: _fill_with_noise(path, min(nbytes, space), past))
            yield path
    except OSError as error:
        raise BloomdeskError(
            f"{directory} cannot be measured: {error.strerror}",
            "name a directory on that disk in which you may write: bloomdesk plan DIRECTORY",
        ) from error


def _fill_with_noise(path: Path, nbytes: int, past_the_cache: bool) -> None:
    buffer = memory.anonymous(LARGEST_CHUNK)
    buffer.write(os.urandom(LARGEST_CHUNK))  # which a disk that compresses cannot make smaller
    deadline = time.perf_counter() + _WRITING_SECONDS
    with files.open_for_streaming(path, "r+", past_the_cache=past_the_cache) as file:
        while file.tell() < nbytes and time.perf_counter() < deadline:
            file.write(buffer)
            if not past_the_cache:
                os.fsync(file.fileno())


def compiled(dtype: str) -> Kernel:
    """The kernel for weights of `dtype`, like "BF16", on all cores."""
    return Kernel(TORCH_DTYPES[dtype], workers(torch.get_num_threads()))


def kernel_rates(kernel: Kernel, dtype: torch.dtype) -> tuple[float, float, float, float, float]:
    """All of `Rates` but the disk's, in its order; `compute` is at `COMPUTE_ROWS` rows.

    Measuring takes `MEMORY_BYTES` of memory.
    """
    buffer = memory.anonymous(MEMORY_BYTES)
    weight = torch.frombuffer(buffer, dtype=dtype).view(-1, COLUMNS).fill_(0.01)
    few = weight[: LARGEST_CHUNK // (COLUMNS * dtype.itemsize)]
    one_row = _seconds(lambda x, out: kernel.accumulate(x, weight, out), 1, len(weight))
    many_rows = _seconds(lambda x, out: kernel.accumulate(x, few, out), COMPUTE_ROWS, len(few))
    coded, row_groups, rows = _coded_noise(buffer)
    decoded = _seconds(lambda x, out: kernel.accumulate_coded(x, coded, row_groups, out), 1, rows)
    decoded_bytes = rows * COLUMNS * torch.bfloat16.itemsize
    in_few_bits = (_quantised_rate(kernel, buffer, coding) * dtype.itemsize for coding in (INT8, INT4))
    return (
        weight.nbytes / one_row,
        COMPUTE_ROWS * few.numel() / many_rows,
        decoded_bytes / decoded,
        *in_few_bits,
    )


def _quantised_rate(kernel: Kernel, buffer: mmap.mmap, coding: Coding) -> float:
    """Weights a second in products of one row with noise that fills `buffer`."""
    one = 1, COLUMNS
    row, scales = coding.shape(one)[1], tensor_nbytes(coding.scale_dtype, coding.scales_shape(one))
    rows = len(buffer) // (row + scales)
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    # Finite in every dtype, whatever they stand for.
    whole.fill_(1)
    data = whole[: rows * row].view(STORED_DTYPES[coding.dtype]).view(rows, row)
    of_rows = whole[rows * row :][: rows * scales].view(STORED_DTYPES[coding.scale_dtype]).view(rows, -1)
    taken = _seconds(lambda x, out: kernel.accumulate_quantised(x, data, of_rows, coding, out), 1, rows)
    return rows * COLUMNS / taken


def _coded_noise(buffer: mmap.mmap) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A coded matrix that fills `buffer`: its bytes, where its row groups begin, and the number of its rows.

    One random code in four is an escape, about as many as in a matrix of normal weights.
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
    """Seconds of a product with that many rows and outputs, the median of `ROUNDS`."""
    x, out = torch.ones(rows, COLUMNS), torch.zeros(rows, outputs)
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        product(x, out)
        taken.append(time.perf_counter() - began)
    return median(taken)
