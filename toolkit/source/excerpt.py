"""The bytes of a shard that hold the rows of a slice, and where they lie if only these are there.

shard      | head |   rows   |          |   rows   |   | vector |
excerpt    |   rows   |   rows   | vector |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runner.format.safetensors import BYTES_PER_ELEMENT, tensor_nbytes
from toolkit.source.tensor import SourceTensor

# Bytes between two stretches that come along for nothing: asking for the second one apart would take longer.
LARGEST_GAP = 64 * 2**10


@dataclass(frozen=True)
class Excerpt:
    """Stretches of a file in order, each its first byte and the one after its last, as they lie one after another."""

    stretches: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.stretches)

    def position(self, place: int) -> int:
        """Where the byte at `place` of the file lies in the excerpt, which has it."""
        before = 0
        for start, stop in self.stretches:
            if start <= place < stop:
                return before + place - start
            before += stop - start
        raise ValueError(f"the byte {place:,} is not in the excerpt")

    def after(self, count: int) -> list[tuple[int, int]]:
        """What is left of the stretches after the first `count` bytes."""
        left = []
        for start, stop in self.stretches:
            skipped = min(count, stop - start)
            count -= skipped
            if start + skipped < stop:
                left.append((start + skipped, stop))
        return left

    def kept(self, place: int, block: bytes | memoryview) -> Iterator[memoryview]:
        """What belongs to the excerpt of a `block` of the file's bytes that begins at `place`."""
        view = memoryview(block)
        for start, stop in self.stretches:
            first, last = max(start, place), min(stop, place + len(view))
            if first < last:
                yield view[first - place : last - place]


def excerpt_of(tensors: Iterable[SourceTensor]) -> Excerpt:
    """The excerpt that has all bytes of these tensors of one shard."""
    stretches: list[tuple[int, int]] = []
    for start, stop in sorted(map(stretch_of, tensors)):
        if start == stop:
            continue
        if stretches and start <= stretches[-1][1] + LARGEST_GAP:
            stretches[-1] = stretches[-1][0], max(stop, stretches[-1][1])
        else:
            stretches.append((start, stop))
    return Excerpt(tuple(stretches))


def stretch_of(tensor: SourceTensor) -> tuple[int, int]:
    """The first byte of a tensor in its file, and the one after its last."""
    nbytes = tensor_nbytes(tensor.stored, tensor.shape)
    if tensor.strides is not None and nbytes:
        steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        nbytes = (sum(steps) + 1) * BYTES_PER_ELEMENT[tensor.stored]
    return tensor.offset, tensor.offset + nbytes


def rows_of(tensor: SourceTensor, rows: range) -> SourceTensor:
    """These rows of a matrix as a tensor of its own."""
    shape = len(rows), tensor.shape[1]
    step = tensor.strides[0] if tensor.strides is not None else tensor.shape[1]
    offset = tensor.offset + rows.start * step * BYTES_PER_ELEMENT[tensor.stored]
    # The rows of a padded matrix may still be gathered; no row has no strides.
    strides = tensor.strides if len(rows) else None
    return replace(
        tensor, shape=shape, offset=offset, nbytes=tensor_nbytes(tensor.dtype, shape), strides=strides
    )


def in_excerpt(tensor: SourceTensor, excerpt: Excerpt, place: Path) -> SourceTensor:
    """The same tensor where an excerpt of its shard, in the file `place`, has it."""
    start, stop = stretch_of(tensor)
    return replace(tensor, offset=excerpt.position(start) if start < stop else 0, object=place)
