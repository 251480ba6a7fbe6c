"""A tensor of a source checkpoint: where its bytes lie, and what they are read as."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.hyperparameters import DTYPES
from runner.format.safetensors import BYTES_PER_ELEMENT


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source shard: `nbytes` bytes, little endian, that begin at `offset`, row-major unless `strides`.

    `dtype` is the safetensors name, or torch's own if safetensors has none. `strides` are in elements.
    `object` holds the bytes if `file` is a pointer of Git LFS.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    object: Path | None = None

    @property
    def place(self) -> Path:
        """The file that holds the bytes: the shard itself, or the object that it is a pointer to."""
        return self.object or self.file

    @property
    def itemsize(self) -> int:
        """Bytes of an element; its dtype is one of `DTYPES`."""
        return BYTES_PER_ELEMENT[self.dtype]


def common_dtype(tensors: Iterable[SourceTensor]) -> str:
    """The one dtype of all tensors; `BloomdeskError` if they differ or it is none of `DTYPES`."""
    first: SourceTensor | None = None
    for tensor in tensors:
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
