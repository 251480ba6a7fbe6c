"""What an adapter adds to a tensor, computed block by block while the tensor is read.

torch sums each element of a product in the same order for any number of rows or columns, but for a few; so tiles of at
least `FEWEST` give the bits of the whole product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from toolkit.io.reader import Block
from toolkit.source.gather import DTYPES
from toolkit.source.tensor import Addition, SourceTensor

FEWEST, TILE = 64, 2**22


def merged(
    tensor: SourceTensor,
    addition: Addition,
    first: int,
    blocks: Iterable[Block],
    read: Callable[[SourceTensor], Block],
) -> Iterator[memoryview]:
    """The `blocks` of the elements from `first` on, in row-major order, with what the adapter adds.

    `read` gives all bytes of a tensor of the adapter, row-major.
    """
    rows = _Rows(tensor, addition, read)
    for block in blocks:
        data = bytearray(block)
        own = torch.frombuffer(data, dtype=DTYPES[tensor.dtype]) if data else torch.empty(0)
        done = 0
        while done < len(own):
            delta = rows.from_element(first + done)[: len(own) - done]
            # In float32, rounded once.
            own[done : done + len(delta)] += delta
            done += len(delta)
        first += done
        yield memoryview(data)


class _Rows:
    """The sum's second term in float32, a tile of rows at a time."""

    def __init__(
        self, tensor: SourceTensor, addition: Addition, read: Callable[[SourceTensor], Block]
    ) -> None:
        def load(source: SourceTensor) -> torch.Tensor:
            data = bytearray(read(source))
            return torch.frombuffer(data, dtype=DTYPES[source.dtype]).view(source.shape).float()

        self._left = load(addition.left)
        self._right = load(addition.right) if addition.right is not None else None
        self._addition, self._dtype = addition, DTYPES[tensor.dtype]
        self._columns = math.prod(tensor.shape[1:])
        count = tensor.shape[0]
        # The last tile is not shorter than the others, so it has enough rows, too.
        tiles = max(1, count // max(FEWEST, TILE // self._columns))
        self._ends = [count * (index + 1) // tiles for index in range(tiles)]
        self._begin = self._end = 0
        self._tile = torch.empty(0)

    def from_element(self, first: int) -> torch.Tensor:
        """The elements from `first` to the end of its tile."""
        row = first // self._columns
        if not self._begin <= row < self._end:
            self._end = next(end for end in self._ends if row < end)
            self._begin = max((end for end in self._ends if end <= row), default=0)
            self._tile = self._product(self._begin, self._end).reshape(-1)
        return self._tile[first - self._begin * self._columns :]

    def _product(self, begin: int, end: int) -> torch.Tensor:
        if self._right is None:
            return self._left[begin:end] * self._addition.scaling
        if self._addition.is_transposed:
            found = (self._left @ self._right[:, begin:end]).T * self._addition.scaling
            return found.to(self._dtype).float()
        return (self._left[begin:end] @ self._right) * self._addition.scaling
