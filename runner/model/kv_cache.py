"""The KV cache: keys and values of all positions so far in memory that is reserved once, and products with them.

Sequences that begin with the same tokens share the cache of these, a prefix; a prefix may have one itself:

    positions    0 ........ start ........ capacity
                 `prefix`   own keys and values
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch

from runner.kernel.matmul import LANES, Finish, Kernel
from runner.kernel.operations import store


class CacheShape(Protocol):
    """What decides the size of a position: blocks, and the heads of this process."""

    @property
    def n_layer(self) -> int: ...

    @property
    def n_head(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class OwnHeads:
    """The shape of caches for some of a model's heads; there may be none."""

    n_layer: int
    n_head: int
    head_dim: int


@dataclass(frozen=True)
class BlockCache:
    """One block's keys [H, capacity, D] and values [H, D, capacity], so that both are rows of a product.

    Positions that were never written hold zeros, so that products may include them. The first of them is position
    `start` of the sequence; `prefix` has those before it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kernel: Kernel
    start: int = 0
    prefix: BlockCache | None = None

    @property
    def n_head(self) -> int:
        return self.keys.shape[0]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[2]

    def write(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Store [H, T, D] each, from position `start` on."""
        first, last = start - self.start, start - self.start + keys.shape[1]
        self.keys[:, first:last] = keys
        self.values[:, :, first:last] = values.transpose(1, 2)

    def store(self, fused: torch.Tensor, start: int) -> None:
        """Store the keys and values of queries, keys and values [T, H, 3, D] float32, from position `start` on."""
        store(self.kernel, fused, self.keys, self.values, start - self.start)

    def scores(self, queries: torch.Tensor, length: int) -> torch.Tensor:
        """queries [H, T, D] float32 times the keys of the first S = `length` positions -> [H, T, S] float32."""
        H, T, _ = queries.shape
        out = torch.empty(H, T, length)
        # A prefix may have no memory for the last lanes.
        if self.start + self.keys.shape[1] < length:
            out[:, :, self.start + self.keys.shape[1] :] = 0
        block, end = self, length
        while block:
            keys = block.keys[:, : end - block.start]
            part = out[:, :, block.start : block.start + keys.shape[1]]
            self.kernel.accumulate(queries, keys, part, Finish(rounds=False))
            block, end = block.prefix, block.start
        return out

    def context(self, weights: torch.Tensor, out: torch.Tensor, joined: JoinedValues | None = None) -> None:
        """The values of the first S positions summed with weights [H, T, S] float32, as out [H, T, D] float32.

        A prefix, and a cache with one, needs `joined`: a sum over positions has one order, so these must lie side by
        side, and end with a whole number of lanes.
        """
        S = weights.shape[2]
        values = joined.of(self, S) if joined else self.values[:, :, :S]
        self.kernel.accumulate(weights, values, out, Finish())


class JoinedValues:
    """Memory for one block's values of a sequence with those of its prefix before them, [H, D, `capacity`].

    What it has of a prefix serves all sequences in turn that share it, so only their own values are copied for each.
    It is of one pass: a prefix must not change between two of its sequences.
    """

    def __init__(self, shape: CacheShape, capacity: int, dtype: torch.dtype) -> None:
        self._values = torch.empty(shape.n_head, shape.head_dim, whole_lanes(capacity), dtype=dtype)
        self._prefix: BlockCache | None = None

    def of(self, block: BlockCache, length: int) -> torch.Tensor:
        """The values of the first S = `length` positions of `block`, with zeros after the last: [H, D, S].

        The next call overwrites them.
        """
        if self._prefix is not block.prefix:
            each, end = block.prefix, block.start
            while each:
                self._values[:, :, each.start : end] = each.values[:, :, : end - each.start]
                each, end = each.prefix, each.start
            self._prefix = block.prefix
        own = block.values[:, :, : length - block.start]
        end = block.start + own.shape[2]
        self._values[:, :, block.start : end] = own
        self._values[:, :, end:length] = 0
        return self._values[:, :, :length]

    @staticmethod
    def nbytes(shape: CacheShape, capacity: int, dtype: torch.dtype) -> int:
        """Bytes for sequences of up to `capacity` positions."""
        return whole_lanes(capacity) * shape.n_head * shape.head_dim * dtype.itemsize


class KVCache:
    """The caches of all blocks: 2 * n_layer * E elements for each position, 4.0 MB of them for BLOOM-176B.

    The memory is reserved at once; the system provides its pages as it fills. `length` is the number of valid
    positions: a pass adds its rows to it at its end, so that an interrupted pass can simply be run again.
    The memory is freed with the last reference to the cache.

    With a `prefix`, the positions before its capacity are those of the prefix, and count in `length` from the start: a
    pass may carry rows for this cache once the prefix is full, or carries the rows that fill it first. One that
    `is_prefix` itself ends anywhere: its sequences have the rest of its last lanes.

    Another form of the model may write what it guesses behind `length`, by `for_guesses`:

        positions    0 ........ length ........ guessed ........ capacity
                     computed   guesses         zeros
    """

    def __init__(
        self,
        shape: CacheShape,
        capacity: int,
        dtype: torch.dtype,
        kernel: Kernel,
        prefix: KVCache | None = None,
        *,
        is_prefix: bool = False,
    ) -> None:
        self.start = prefix.capacity if prefix else 0
        # Number of positions that memory is reserved for, without those of the prefix.
        self.positions = (capacity if is_prefix else whole_lanes(capacity)) - self.start
        H, D, room = shape.n_head, shape.head_dim, self.positions
        self.blocks = tuple(
            BlockCache(
                torch.zeros(H, room, D, dtype=dtype),
                torch.zeros(H, D, room, dtype=dtype),
                kernel,
                self.start,
                before,
            )
            for before in (prefix.blocks if prefix else [None] * shape.n_layer)
        )
        self.prefix, self.is_prefix = prefix, is_prefix
        self.capacity = capacity
        self.length = self.start
        # End of the positions that may hold guesses.
        self.guessed = 0

    @property
    def chain(self) -> tuple[KVCache, ...]:
        """The prefixes, the first positions first, and this cache."""
        return (*self.prefix.chain, self) if self.prefix else (self,)

    @property
    def is_joined(self) -> bool:
        """Whether attention needs `JoinedValues`."""
        return self.is_prefix or self.prefix is not None

    @property
    def is_full(self) -> bool:
        return self.length == self.capacity

    def stored(self, first: int, last: int) -> torch.Tensor:
        """Keys and values of positions `first` to `last`: [n_layer, 2, H, T, D], contiguous."""
        first_block = self.blocks[0]
        H, D, dtype = first_block.n_head, first_block.head_dim, first_block.keys.dtype
        out = torch.empty(len(self.blocks), 2, H, last - first, D, dtype=dtype)
        for cache in self.chain:
            begin, end = max(first, cache.start), min(last, cache.capacity)
            for (keys, values), block in zip(
                out[:, :, :, begin - first : end - first], cache.blocks, strict=True
            ):
                if begin < end:
                    keys.copy_(block.keys[:, begin - cache.start : end - cache.start])
                    values.copy_(block.values[:, :, begin - cache.start : end - cache.start].transpose(1, 2))
        return out

    def load(self, stored: torch.Tensor) -> None:
        """Append positions as `stored` gave them, [n_layer, 2, H, T, D]."""
        for block, (keys, values) in zip(self.blocks, stored, strict=True):
            block.write(keys, values, self.length)
        self.length += stored.shape[3]

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError if the cache has fewer, or they are its prefix's."""
        if not self.start <= length <= self.length:
            raise ValueError(f"a cache of {self.length} positions cannot go back to {length}")
        self.clear(length, self.length)
        self.length = length

    def for_guesses(self, count: int) -> KVCache:
        """This cache for a draft: the same memory with a length of its own, for up to `count` more positions.

        What the draft writes never counts here, also if it is interrupted.
        """
        draft = copy(self)
        self.guessed = max(self.guessed, min(self.length + count, self.capacity))
        return draft

    def drop_guesses(self) -> None:
        """Set what a draft has written to zeros, as a pass expects it."""
        if self.guessed > self.length:
            self.clear(self.length, self.guessed)
        self.guessed = 0

    def first_unsound_block(self) -> int | None:
        """The first block with a key or a value that is not finite, of its prefixes too."""
        for index, blocks in enumerate(zip(*(cache.blocks for cache in self.chain), strict=True)):
            if not all(block.keys.isfinite().all() and block.values.isfinite().all() for block in blocks):
                return index
        return None

    def clear(self, first: int, last: int) -> None:
        """Set positions `first` to `last` of all blocks to zeros."""
        for block in self.blocks:
            block.keys[:, first - self.start : last - self.start] = 0
            block.values[:, :, first - self.start : last - self.start] = 0

    @staticmethod
    def nbytes(shape: CacheShape, capacity: int, dtype: torch.dtype) -> int:
        """Bytes of a cache for `capacity` positions."""
        width = shape.n_head * shape.head_dim
        return 2 * shape.n_layer * whole_lanes(capacity) * width * dtype.itemsize


@dataclass(frozen=True)
class Segment:
    """Rows of one sequence in a pass: `ids` are appended to its cache, and the last `logits` of them give logits."""

    ids: Sequence[int]
    cache: KVCache
    logits: int = 1

    @property
    def length(self) -> int:
        """Number of positions in the cache after the pass."""
        return self.cache.length + len(self.ids)


def whole_lanes(positions: int) -> int:
    """The next multiple of the kernel's lanes, so that the sums of a row do not depend on how many rows follow it."""
    return -(-positions // LANES) * LANES
