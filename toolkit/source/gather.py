"""Elements of a tensor that are not as they should be: put in row-major order, and rounded to another dtype.

Memory is a few blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from runner.format.safetensors import BYTES_PER_ELEMENT
from toolkit.io.reader import BLOCK, OpenedFile, read_block
from toolkit.source.tensor import SourceTensor

# Integers of as many bytes as an element: bits are moved, never computed with.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Bytes between elements that one read may bring along for nothing.
LARGEST_GAP = 64 * 2**10


def rounded(block: bytes | bytearray | memoryview, stored: str, dtype: str) -> memoryview:
    """The bytes of a block's elements in another dtype, rounded as torch does it."""
    if stored == dtype or not len(block):
        return memoryview(block)
    count = len(block) // BYTES_PER_ELEMENT[stored]
    out = bytearray(count * BYTES_PER_ELEMENT[dtype])
    source = torch.frombuffer(block, dtype=DTYPES[stored])
    torch.frombuffer(out, dtype=DTYPES[dtype]).copy_(source)
    return memoryview(out)


def gathered(tensor: SourceTensor, first: int, last: int) -> Iterator[memoryview]:
    """The bytes of the elements `[first, last)` in row-major order, in blocks.

    Raises `OSError` if the file can't be read, and `EOFError` if it ends too early.
    """
    strides = tensor.strides or ()
    itemsize, row = BYTES_PER_ELEMENT[tensor.stored], math.prod(tensor.shape[1:])
    rows = max(1, BLOCK // (row * itemsize))
    file = OpenedFile(tensor.place)
    try:
        while first < last:
            begin = first // row
            end = min(begin + rows, -(-last // row))
            data = bytearray((end - begin) * row * itemsize)
            out = torch.frombuffer(data, dtype=WORDS[itemsize]).view(end - begin, *tensor.shape[1:])
            _fill(file, tensor.offset + begin * strides[0] * itemsize, strides, out)
            stop = min(last, end * row)
            yield memoryview(data)[(first - begin * row) * itemsize : (stop - begin * row) * itemsize]
            first = stop
    finally:
        file.close()


def _fill(file: OpenedFile, offset: int, strides: tuple[int, ...], out: torch.Tensor) -> None:
    """Put the elements that begin at byte `offset` and lie `strides` elements apart into `out`."""
    steps = [(size - 1) * stride for size, stride in zip(out.shape, strides, strict=True)]
    span, itemsize = sum(steps) + 1, out.element_size()
    if span * itemsize <= max(2 * out.nbytes, LARGEST_GAP):
        data = bytearray(span * itemsize)
        count = read_block(file, offset, memoryview(data), keep_cached=True)
        if count < len(data):
            raise EOFError(f"it ends {len(data) - count:,} bytes too early")
        out.copy_(torch.frombuffer(data, dtype=out.dtype).as_strided(out.shape, strides))
        return
    # The elements lie far apart along this axis.
    axis = steps.index(max(steps))
    half = out.shape[axis] // 2
    _fill(file, offset, strides, out.narrow(axis, 0, half))
    rest = out.narrow(axis, half, out.shape[axis] - half)
    _fill(file, offset + half * strides[axis] * itemsize, strides, rest)
