"""A weight matrix that is used a chunk at a time, whether its chunks are resident or streamed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from runner.errors import BloomdeskError, in_shell
from runner.format.coded import ROW_GROUP_ROWS
from runner.kernel.decode import decode_row_groups
from runner.kernel.matmul import Finish, Kernel
from runner.kernel.quantised import dequantise_rows
from runner.weights.chunks import Chunk, Quantised
from runner.weights.part_file import read_range
from runner.weights.stream import Stream

SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Matrix:
    """[N, K] of `dtype`: chunks `index` and following of `stream`, plain, losslessly coded or in fewer bits.

    Of a slice they are the rows `own` of the matrix.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    chunks: Sequence[Chunk]
    index: int
    stream: Stream
    kernel: Kernel
    own: range

    def product(
        self,
        x: torch.Tensor,
        finish: Finish,
        out: torch.Tensor | None = None,
        on_rows: Callable[[int], None] = lambda row: None,
    ) -> torch.Tensor:
        """x [T, K] float32 -> `x @ weight.T` for the own rows, [T, own], finished; see `Finish`.

        It goes to `out`, if that is given. If one slice is here, `on_rows` is called with each row of the matrix up to
        which it is there.
        Raises `BloomdeskError` if a chunk cannot be read, or is damaged.
        """
        first = self.own.start
        out = torch.empty(x.shape[0], len(self.own)) if out is None else out
        for offset, chunk in enumerate(self.chunks):
            self._multiply(x, finish, out[:, chunk.first - first : chunk.last - first], offset)
            on_rows(chunk.last)
        return out

    def _multiply(self, x: torch.Tensor, finish: Finish, part: torch.Tensor, offset: int) -> None:
        """Put the outputs of one chunk into `part`."""
        chunk = self.chunks[offset]
        own = finish.part(chunk.first, chunk.last)
        with self.stream.chunk(self.index + offset) as weight:
            if isinstance(weight, Quantised):
                self.kernel.accumulate_quantised(x, *weight, chunk.coding, part, own)
            elif chunk.row_groups is None:
                self.kernel.accumulate(x, weight, part, own)
            else:
                try:
                    self.kernel.accumulate_coded(x, weight, chunk.row_groups, part, own)
                except ValueError as error:
                    raise _damaged(chunk, error) from error

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, K]: own rows of the matrix by number, read from the files each time."""
        found = torch.empty(len(ids), self.shape[1], dtype=self.dtype)
        chunks = [next(chunk for chunk in self.chunks if chunk.first <= row < chunk.last) for row in ids]
        for part in dict.fromkeys(chunk.file for chunk in chunks):
            with part.opened() as file:
                for place, (row, chunk) in enumerate(zip(ids, chunks, strict=True)):
                    if chunk.file is part:
                        found[place] = self._row(file, chunk, row)
        return found

    def _row(self, file: io.FileIO, chunk: Chunk, row: int) -> torch.Tensor:
        """Row number `row`, which is in `chunk`; of a coded matrix its row group is decoded."""
        columns = self.shape[1]
        if chunk.coding is not None:
            return self._quantised_row(file, chunk, row - chunk.first)
        if chunk.row_groups is None:
            nbytes = columns * self.dtype.itemsize
            data = read_range(file, chunk.start + (row - chunk.first) * nbytes, nbytes)
            return torch.frombuffer(data, dtype=self.dtype)
        row_group, place = divmod(row - chunk.first, ROW_GROUP_ROWS)
        start, stop = chunk.row_groups[row_group : row_group + 2].tolist()
        count = min(ROW_GROUP_ROWS, chunk.last - chunk.first - row_group * ROW_GROUP_ROWS)
        data, out = read_range(file, chunk.start + start, stop - start), bytearray(count * columns * 2)
        try:
            decode_row_groups(data, [0, len(data)], count, columns, out)
        except ValueError as error:
            raise _damaged(chunk, error) from error
        return torch.frombuffer(out, dtype=self.dtype).view(count, columns)[place]

    def _quantised_row(self, file: io.FileIO, chunk: Chunk, place: int) -> torch.Tensor:
        shape, count = (1, self.shape[1]), chunk.last - chunk.first
        assert chunk.coding is not None and chunk.scales is not None
        data, scales = (
            read_range(file, each.start + place * nbytes // count, nbytes // count)
            for each, nbytes in ((chunk, chunk.own_nbytes), (chunk.scales, chunk.scales.nbytes))
        )
        out = torch.empty(shape, dtype=self.dtype)
        target = out.view(torch.uint8).numpy()
        dequantise_rows(data, scales, shape, chunk.coding, SAFETENSORS_DTYPES[self.dtype], target)
        return out[0]


def _damaged(chunk: Chunk, error: ValueError) -> BloomdeskError:
    return BloomdeskError(
        f"{chunk.file.path} is damaged in bytes {chunk.start:,} to {chunk.start + chunk.nbytes:,}: {error}",
        f"make it again from its source: bloomdesk repair {in_shell(chunk.file.path.parent)}",
    )
