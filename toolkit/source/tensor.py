"""A tensor of a source checkpoint: where its bytes lie, and reading them ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.hyperparameters import DTYPES
from toolkit.io.disk import read_errors
from toolkit.io.reader import ByteRange, ReadAhead


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source shard: its bytes, row-major and little endian, are `[offset, offset + nbytes)`.

    `dtype` is the safetensors name, or torch's own if safetensors has none.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def common_dtype(tensors: Mapping[str, SourceTensor]) -> str:
    """The one dtype of all tensors; `BloomdeskError` if they differ or it is none of `DTYPES`."""
    first: SourceTensor | None = None
    for tensor in tensors.values():
        first = first or tensor
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise BloomdeskError(f"{tensor.file}: {tensor.key} is {tensor.dtype}, expected one of {allowed}")
        if tensor.dtype != first.dtype:
            raise BloomdeskError(
                f"the source mixes dtypes: {first.key} is {first.dtype}, {tensor.key} is {tensor.dtype}"
            )
    if first is None:
        raise BloomdeskError("the source's weights hold no tensors")
    return first.dtype


class TensorReader(ReadAhead):
    """Reads `ranges` of source shards; a block stays valid until `held` further ones are requested.

    The page cache keeps what was read: the shard's hash reads the same bytes.
    """

    def __init__(self, ranges: Sequence[ByteRange], held: int = 2) -> None:
        super().__init__(ranges, threads=1, held=held, keep_cached=True)

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
