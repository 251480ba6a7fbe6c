"""Keys and values of every position so far, in memory that is reserved once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runner.prepared import Hyperparameters


@dataclass(frozen=True)
class BlockCache:
    """One block's keys and values, `[H, capacity, D]` each."""

    keys: torch.Tensor
    values: torch.Tensor

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [H, T, D] from position `start` on; views of all positions up to there, [H, S, D] each."""
        end = start + keys.shape[1]
        self.keys[:, start:end] = keys
        self.values[:, start:end] = values
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """The caches of all blocks: 2 * n_layer * E elements for each position, 4.0 MB of them for BLOOM-176B.

    The memory is reserved at once and taken from the machine as it fills. `length` positions count: a pass adds
    its rows to it when it is through all blocks, so that a pass that was interrupted can simply be run again.
    """

    def __init__(self, model: Hyperparameters, capacity: int, dtype: torch.dtype) -> None:
        storage = torch.empty(model.n_layer, 2, model.n_head, capacity, model.head_dim, dtype=dtype)
        self.blocks = tuple(BlockCache(keys, values) for keys, values in storage)
        self.capacity = capacity
        self.length = 0
