"""A weight matrix that is used a piece at a time, wherever its pieces are."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runner import system
from runner.errors import BloomdeskError
from runner.kernel import Kernel
from runner.pieces import Piece
from runner.stream import Stream, check_unchanged


@dataclass(frozen=True)
class Matrix:
    """[N, K]: pieces `index` and following of `stream`."""

    mapped: torch.Tensor  # a view of the mapped file
    pieces: Sequence[Piece]
    index: int
    stream: Stream
    kernel: Kernel

    @property
    def shape(self) -> torch.Size:
        return self.mapped.shape

    @property
    def nbytes(self) -> int:
        return self.mapped.nbytes

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, K] -> `x @ weight.T + bias` [T, N], summed in float32 and rounded once to the dtype of x."""
        T, N = x.shape[0], self.shape[0]
        out = torch.zeros(T, N) if bias is None else bias.float().repeat(T, 1)
        rows = x.float().contiguous()
        for offset, piece in enumerate(self.pieces):
            with self.stream.piece(self.index + offset) as weight:
                self.kernel.accumulate(rows, weight, out[:, piece.first : piece.last])
        return out.to(x.dtype)

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, K]: rows of the matrix by number, read from the file alone."""
        first = self.pieces[0]
        row_bytes = self.mapped[0].nbytes
        found = bytearray(len(ids) * row_bytes)
        target = memoryview(found)
        try:
            with system.open_for_rows(first.file.path) as file:
                check_unchanged(first, file.fileno())
                for place, row in enumerate(ids):
                    file.seek(first.start + row * row_bytes)
                    if file.readinto(target[place * row_bytes :][:row_bytes]) != row_bytes:
                        raise OSError(errno.EIO, "the file ends too early")
        except OSError as error:
            raise BloomdeskError(
                f"{first.file.path} cannot be read: {error.strerror or error}",
                f"see what is damaged: bloomdesk verify {first.file.path.parent}",
            ) from error
        return torch.frombuffer(found, dtype=self.mapped.dtype).view(len(ids), self.shape[1])
