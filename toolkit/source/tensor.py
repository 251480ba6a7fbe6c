"""A tensor of a source checkpoint: where its bytes lie, and what they are read as."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runner.format.safetensors import tensor_nbytes


@dataclass(frozen=True)
class Addition:
    """What an adapter adds to a tensor [N, K]: `left` [N, r] times `right` [r, K], times `scaling`.

    Without `right` it is `left` [N] times `scaling`. If it `is_transposed`, `left` is [K, r] and `right` [r, N], and
    the product is rounded before it is added.
    """

    left: SourceTensor
    right: SourceTensor | None
    scaling: float
    is_transposed: bool = False


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source shard: elements, little endian, that begin at `offset`, row-major unless `strides`.

    It is read as `nbytes` bytes of `dtype`, which is the safetensors name, or torch's own if safetensors has none.
    `strides` are in elements. `object` holds the bytes if `file` is a pointer of Git LFS. `addition` is added when it
    is read. `decoded` gives the bytes of the elements from one to another if the file has them coded.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    object: Path | None = None
    rounded_from: str | None = None
    addition: Addition | None = None
    decoded: Callable[[int, int], Iterator[memoryview]] | None = None

    @property
    def place(self) -> Path:
        """The file that holds the bytes: the shard itself, or the object that it is a pointer to."""
        return self.object or self.file

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that its bytes depend on."""
        added = self.addition
        return (self.file,) if added is None else (self.file, added.left.file)

    @property
    def stored(self) -> str:
        """The dtype in the file."""
        return self.rounded_from or self.dtype

    def read_as(self, dtype: str) -> SourceTensor:
        """The same tensor, rounded to `dtype` when it is read."""
        return replace(self, dtype=dtype, nbytes=tensor_nbytes(dtype, self.shape), rounded_from=self.stored)
