"""The bytes of source tensors, read ahead from their shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from toolkit.io.disk import read_errors
from toolkit.io.reader import ByteRange, ReadAhead
from toolkit.source.shards import SourceTensor


class TensorReader(ReadAhead):
    """Reads `ranges` of source shards; a block stays valid while the next one is used, so it can be written meanwhile.

    The page cache keeps what was read: the shard's hash reads the same bytes.
    """

    def __init__(self, ranges: Sequence[ByteRange]) -> None:
        super().__init__(ranges, threads=1, held=2, keep_cached=True)

    def blocks(self, index: int) -> Iterator[memoryview]:
        """As `ReadAhead.blocks`, but raises `BloomdeskError` if the shard can't be read."""
        with read_errors(self.ranges[index].path):
            yield from super().blocks(index)


def ranges_of(tensor: SourceTensor, nbytes: int | None = None) -> list[ByteRange]:
    """The tensor's bytes as one range, or as consecutive ones of `nbytes` and a shorter last one."""
    step = max(1, nbytes or tensor.nbytes)
    return [
        ByteRange(tensor.file, tensor.offset + start, min(step, tensor.nbytes - start))
        for start in range(0, tensor.nbytes, step)
    ] or [ByteRange(tensor.file, tensor.offset, 0)]
