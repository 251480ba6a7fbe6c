"""A part as memory: its pages are those of the page cache, there at once if it has them, and shared by processes."""

from __future__ import annotations

import io
import math
import warnings

import torch

from runner.kernel.page_faults import WatchedRange
from runner.system import memory


class Mapping:
    """The whole of an open file as read-only memory, for as long as this object lives."""

    def __init__(self, file: io.FileIO) -> None:
        self._memory = memory.mapped(file)
        with warnings.catch_warnings():
            # That nobody may write to it is as it should be.
            warnings.simplefilter("ignore")
            self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._watched = WatchedRange(self._bytes.data_ptr(), len(self._bytes))

    @property
    def has_failed(self) -> bool:
        """Whether the file no longer had some of its bytes when they were used."""
        return self._watched.has_failed

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The bytes from `start` as a tensor; it must not outlive this object."""
        return self._bytes[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def page_in(self, start: int, nbytes: int) -> bool:
        """Whether the system has brought these bytes into RAM and mapped them."""
        return memory.page_in(self._bytes.data_ptr(), start, nbytes)

    def drop(self, start: int, nbytes: int) -> None:
        """Take the pages of this range out of this process."""
        memory.drop_pages(self._memory, start, nbytes)
