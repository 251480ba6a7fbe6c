"""Tensors of source shards read ahead, row-major in one dtype, whatever their strides and dtype in the file.

row-major in the file ──> read ahead ─────────────────┐
                                                      ├──> rounded ──> adapter added ──> blocks of row-major bytes
any other strides ──> runs of elements, put in order ─┘    (both if need be)
coded, in a prepared directory ──> decoded
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runner.format.safetensors import BYTES_PER_ELEMENT
from toolkit.io.disk import read_errors
from toolkit.io.reader import Block, ByteRange, ReadAhead, joined
from toolkit.source.tensor import SourceTensor


@dataclass(frozen=True)
class Span:
    """The elements `[first, first + count)` of a tensor in row-major order; `nbytes` are those that are read as."""

    tensor: SourceTensor
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * BYTES_PER_ELEMENT[self.tensor.dtype]

    @property
    def range(self) -> ByteRange:
        """Its bytes in the file; none if they do not lie there in this order."""
        tensor = self.tensor
        if tensor.strides is not None or tensor.decoded is not None:
            return ByteRange(tensor.place, tensor.offset, 0)
        itemsize = BYTES_PER_ELEMENT[tensor.stored]
        return ByteRange(tensor.place, tensor.offset + self.first * itemsize, self.count * itemsize)


def spans_of(tensor: SourceTensor, nbytes: int | None = None) -> list[Span]:
    """The tensor as one span, or as consecutive ones of `nbytes` bytes and a shorter last one."""
    return _cut(tensor, 0, math.prod(tensor.shape), nbytes) or [Span(tensor, 0, 0)]


def row_spans(tensor: SourceTensor, rows: range, nbytes: int) -> list[Span]:
    """These rows of a matrix as consecutive spans of `nbytes` bytes and a shorter last one; none without rows."""
    columns = tensor.shape[1]
    return _cut(tensor, rows.start * columns, rows.stop * columns, nbytes)


def _cut(tensor: SourceTensor, first: int, last: int, nbytes: int | None) -> list[Span]:
    step = max(1, nbytes // BYTES_PER_ELEMENT[tensor.dtype] if nbytes else last - first)
    return [Span(tensor, start, min(step, last - start)) for start in range(first, last, step)]


class TensorReader(ReadAhead):
    """Reads `spans` of source tensors; a block stays valid until `held` further ones are requested.

    The page cache keeps what was read: the shard's hash reads the same bytes.
    """

    def __init__(self, spans: Sequence[Span], threads: int = 1, held: int = 2) -> None:
        super().__init__([each.range for each in spans], threads, held=held, keep_cached=True)
        self.spans = spans

    def blocks(self, index: int) -> Iterator[Block]:
        """The row-major bytes of the span at `index`, which must be after that of the last call.

        Raises `BloomdeskError` if the shard can't be read.
        """
        part = self.spans[index]
        tensor = part.tensor
        with read_errors(tensor.file):
            if tensor.decoded is not None:
                yield from tensor.decoded(part.first, part.first + part.count)
                return
            if tensor.strides is None and tensor.stored == tensor.dtype and tensor.addition is None:
                yield from super().blocks(index)
                return
            from toolkit.source.gather import gathered, rounded  # load torch, which few sources need

            blocks: Iterator[Block] = super().blocks(index)
            if tensor.strides is not None:
                blocks = gathered(tensor, part.first, part.first + part.count)
            blocks = (rounded(block, tensor.stored, tensor.dtype) for block in blocks)
            if tensor.addition is not None:
                from toolkit.source.merge import merged  # load torch, as above

                blocks = merged(tensor, tensor.addition, part.first, blocks, _read)
            yield from blocks

    def whole(self, index: int) -> Block:
        """All bytes of the span at `index`, in place if they are one block, else a copy; raises as `blocks` does."""
        return joined(self.blocks(index), self.spans[index].nbytes)


def _read(tensor: SourceTensor) -> Block:
    """All bytes of a tensor of its own, row-major."""
    with TensorReader(spans_of(tensor)) as reader:
        return bytes(reader.whole(0))
