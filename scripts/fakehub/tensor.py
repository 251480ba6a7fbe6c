"""A tensor of a checkpoint that is being written: its key, dtype and shape, and its bytes when they are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `pieces()` gives its bytes, row-major, little endian, one piece after another."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[memoryview]]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize
