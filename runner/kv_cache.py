"""Keys and values of every position so far, in memory that is reserved once, and the products with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runner.kernel import Kernel
from runner.prepared import Hyperparameters
from runner.product import LANES


@dataclass(frozen=True)
class BlockCache:
    """One block's keys [H, capacity, D] and values [H, D, capacity]: both are then rows of a product.

    Positions that were never written hold zeros, so that products may run over them.
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
        self.kernel.accumulate_each(queries.float().contiguous(), self.keys[:, :length], out)
        return out

    def context(self, weights: torch.Tensor) -> torch.Tensor:
        """The values of the first S positions summed with weights [H, T, S] -> [H, T, D] float32."""
        H, T, S = weights.shape
        out = torch.zeros(H, T, self.head_dim)
        self.kernel.accumulate_each(weights.float(), self.values[:, :, :S], out)
        return out


class KVCache:
    """The caches of all blocks: 2 * n_layer * E elements for each position, 4.0 MB of them for BLOOM-176B.

    The memory is reserved at once and taken from the machine as it fills. `length` positions count: a pass adds
    its rows to it when it is through all blocks, so that a pass that was interrupted can simply be run again.
    """

    def __init__(self, model: Hyperparameters, capacity: int, dtype: torch.dtype, kernel: Kernel) -> None:
        H, D, room = model.n_head, model.head_dim, whole_lanes(capacity)
        self.blocks = tuple(
            BlockCache(torch.zeros(H, room, D, dtype=dtype), torch.zeros(H, D, room, dtype=dtype), kernel)
            for _ in range(model.n_layer)
        )
        self.capacity = capacity
        self.length = 0

    @staticmethod
    def nbytes(model: Hyperparameters, capacity: int, dtype: torch.dtype) -> int:
        """What a cache for `capacity` positions takes."""
        return 2 * model.n_layer * whole_lanes(capacity) * model.hidden_size * dtype.itemsize


def whole_lanes(positions: int) -> int:
    """The next multiple of the kernel's lanes: with it, a row's sums are the same however many rows come after it."""
    return -(-positions // LANES) * LANES
