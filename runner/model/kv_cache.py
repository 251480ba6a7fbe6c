"""The KV cache: keys and values of all positions so far in memory that is reserved once, and products with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runner.format.hyperparameters import Hyperparameters
from runner.kernel.matmul import LANES, Kernel

LEAST_POSITIONS = 16


@dataclass(frozen=True)
class BlockCache:
    """One block's keys [H, capacity, D] and values [H, D, capacity], so that both are rows of a product.

    Positions that were never written hold zeros, so that products may include them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kernel: Kernel

    @property
    def n_head(self) -> int:
        return self.keys.shape[0]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[2]

    def write(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Store [H, T, D] each, from position `start` on."""
        end = start + keys.shape[1]
        self.keys[:, start:end] = keys
        self.values[:, :, start:end] = values.transpose(1, 2)

    def scores(self, queries: torch.Tensor, length: int) -> torch.Tensor:
        """queries [H, T, D] times the keys of the first S = `length` positions -> [H, T, S] float32."""
        H, T, _ = queries.shape
        out = torch.zeros(H, T, length)
        self.kernel.accumulate(queries.float().contiguous(), self.keys[:, :length], out)
        return out

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        """The values of the first S positions summed with weights [H, T, S] -> [H, T, D] float32."""
        H, T, S = weights.shape
        out = torch.zeros(H, T, self.head_dim)
        self.kernel.accumulate(weights.float(), self.values[:, :, :S], out)
        return out


class KVCache:
    """The caches of all blocks: 2 * n_layer * E elements for each position, 4.0 MB of them for BLOOM-176B.

    The memory is reserved at once; the system provides its pages as it fills. `length` is the number of valid
    positions: a pass adds its rows to it at its end, so that an interrupted pass can simply be run again.
    The memory is freed with the last reference to the cache.
    """

    def __init__(self, model: Hyperparameters, capacity: int, dtype: torch.dtype, kernel: Kernel) -> None:
        H, D, room = model.n_head, model.head_dim, whole_lanes(capacity)
        self.blocks = tuple(
            BlockCache(torch.zeros(H, room, D, dtype=dtype), torch.zeros(H, D, room, dtype=dtype), kernel)
            for _ in range(model.n_layer)
        )
        self.capacity = capacity
        self.length = 0

    def stored(self, first: int, last: int) -> torch.Tensor:
        """Keys and values of positions `first` to `last`: [n_layer, 2, H, T, D], contiguous."""
        return torch.stack(
            [
                torch.stack([block.keys[:, first:last], block.values[:, :, first:last].transpose(1, 2)])
                for block in self.blocks
            ]
        )

    def load(self, stored: torch.Tensor) -> None:
        """Append positions as `stored` gave them, [n_layer, 2, H, T, D]."""
        for block, (keys, values) in zip(self.blocks, stored, strict=True):
            block.write(keys, values, self.length)
        self.length += stored.shape[3]

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError if the cache has fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} positions cannot go back to {length}")
        self.clear(length, self.length)
        self.length = length

    def first_unsound_block(self) -> int | None:
        """The first block with a key or a value that is not finite."""
        for index, block in enumerate(self.blocks):
            if not (block.keys.isfinite().all() and block.values.isfinite().all()):
                return index
        return None

    def clear(self, first: int, last: int) -> None:
        """Set positions `first` to `last` of all blocks to zeros."""
        for block in self.blocks:
            block.keys[:, first:last] = 0
            block.values[:, :, first:last] = 0

    @staticmethod
    def nbytes(model: Hyperparameters, capacity: int, dtype: torch.dtype) -> int:
        """Bytes of a cache for `capacity` positions."""
        return 2 * model.n_layer * whole_lanes(capacity) * model.hidden_size * dtype.itemsize


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
    """The next multiple of the kernel's lanes, so that the sums of a row do not depend on how many rows follow it.

    At least the lanes of a 512-bit register: below that, torch's softmax sums in another order.
    """
    return max(LEAST_POSITIONS, -(-positions // LANES) * LANES)
