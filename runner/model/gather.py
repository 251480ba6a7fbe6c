"""What makes a pass whole if each of several processes has only some rows of every matrix: all products, and context.

Each output is summed whole in one process and copied to the others, so a pass has the bits that it has in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from runner.kernel.matmul import Finish
from runner.weights.linear import Matrix


class Gather(Protocol):
    """T rows of the pass, K inputs, N outputs of all processes together, E hidden, H own heads, D head dim."""

    def product(self, matrix: Matrix, name: str, x: torch.Tensor, finish: Finish) -> torch.Tensor:
        """x [T, K] times a block's matrix `name` -> [T, N], finished."""

    def context(self, own: torch.Tensor) -> torch.Tensor:
        """The context of own heads [T, H * D] -> that of all heads [T, E]."""

    def embed(self, matrix: Matrix, ids: Sequence[int]) -> torch.Tensor:
        """Rows of the embedding -> [T, E]."""

    def logits(self, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        """x [T, E] times the head -> [T, V]; [T, 0] in a process that needs none."""


class Alone:
    """All rows are here, so there is nothing to do."""

    def product(self, matrix: Matrix, name: str, x: torch.Tensor, finish: Finish) -> torch.Tensor:
        return matrix.product(x, finish)

    def context(self, own: torch.Tensor) -> torch.Tensor:
        return own

    def embed(self, matrix: Matrix, ids: Sequence[int]) -> torch.Tensor:
        return matrix.rows(ids)

    def logits(self, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        return matrix.product(x, Finish())


ALONE = Alone()
