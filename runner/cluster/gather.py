"""Gathers: each rank sends its outputs to the others in pieces, while it computes the next ones.

    receives are begun ──> chunk ──> chunk ──> ... ──> all pieces of the others are awaited and put in their columns
                             └ piece   └ piece

On the wire numbers have the model's dtype, which loses nothing: activations are float32 with numbers of that dtype.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from runner.cluster.group import Group
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import PartSpec, part_specs
from runner.format.slices import Slice
from runner.kernel.matmul import Finish
from runner.weights.checkpoint import TORCH_DTYPES
from runner.weights.linear import Matrix

EMBEDDING_MATRIX, FUSED_MATRIX = "word_embeddings.weight", "self_attention.query_key_value.weight"
LEAD = 0
# Bytes of a piece, so that a few are on their way while the rest is computed; and the most pieces.
PIECE_BYTES, MOST_PIECES = 2**19, 16


class SliceGather:
    """The `Gather` of a rank with the slice `own`, whose number is the rank."""

    def __init__(self, group: Group, model: Hyperparameters, own: Slice) -> None:
        self._group, self._dtype = group, TORCH_DTYPES[model.dtype]
        embedding, block = part_specs(model)[:2]
        self._rows = _rows(block, model, own)
        self._vocabulary = _rows(embedding, model, own)[EMBEDDING_MATRIX]
        # Rows are [H, 3, D] there, and columns of the context [H, D].
        fused = self._rows[FUSED_MATRIX]
        self._heads = [range(each.start // 3, each.stop // 3) for each in fused]
        self._everybody = range(len(group.names))

    def product(self, matrix: Matrix, name: str, x: torch.Tensor, finish: Finish) -> torch.Tensor:
        gathered = self._begin(len(x), self._rows[name], self._everybody)
        matrix.product(x, finish, gathered.own, gathered.send_until)
        return gathered.whole()

    def context(self, own: torch.Tensor) -> torch.Tensor:
        gathered = self._begin(len(own), self._heads, self._everybody)
        gathered.own.copy_(own)
        return gathered.whole()

    def logits(self, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        """Only the lead needs them."""
        gathered = self._begin(len(x), self._vocabulary, [LEAD])
        matrix.product(x, Finish(), gathered.own, gathered.send_until)
        return gathered.whole()

    def embed(self, matrix: Matrix, ids: Sequence[int]) -> torch.Tensor:
        """Each rank reads the rows that it has."""
        group, whole = self._group, torch.empty(len(ids), matrix.shape[1], dtype=matrix.dtype)
        places = [[place for place, token in enumerate(ids) if token in own] for own in self._vocabulary]
        coming = [
            (each, rows, group.receive(rows, each))
            for each in group.others
            if (rows := torch.empty(len(places[each]), matrix.shape[1], dtype=matrix.dtype)).numel()
        ]
        own = matrix.rows([ids[place] for place in places[group.rank]])
        sent = [group.send(own, each) for each in group.others if own.numel()]
        whole[places[group.rank]] = own
        for each, rows, waiting in coming:
            waiting.wait()
            whole[places[each]] = rows
        for waiting in sent:
            waiting.wait()
        return whole

    def _begin(self, rows: int, columns: Sequence[range], readers: Sequence[int]) -> _Columns:
        return _Columns(self._group, rows, columns, readers, self._dtype)


class _Columns:
    """[T, N] under way: each rank has its `columns`, and the ranks `readers` get all of them."""

    def __init__(
        self, group: Group, rows: int, columns: Sequence[range], readers: Sequence[int], dtype: torch.dtype
    ) -> None:
        self._group, self._dtype, self._columns = group, dtype, columns
        self._reads = group.rank in readers
        self._targets = [each for each in readers if each != group.rank]
        self._first = columns[group.rank].start
        self.own = torch.empty(rows, len(columns[group.rank]))
        row_bytes = rows * dtype.itemsize
        self._left = deque(_pieces(columns[group.rank], row_bytes))
        self._sent = []
        self._coming = []
        for source in group.others if self._reads else ():
            for piece in _pieces(columns[source], row_bytes):
                buffer = torch.empty(rows, len(piece), dtype=dtype)
                self._coming.append((piece, buffer, group.receive(buffer, source)))

    def send_until(self, column: int) -> None:
        """Send the pieces of `own` that are there: its columns are, up to `column` of all."""
        while self._targets and self._left and self._left[0].stop <= column:
            piece = self._left.popleft()
            data = self.own[:, piece.start - self._first : piece.stop - self._first]
            data = data.to(self._dtype).contiguous()
            self._sent += [self._group.send(data, target) for target in self._targets]

    def whole(self) -> torch.Tensor:
        """[T, N] once all columns are there; [T, 0] if this rank reads none."""
        self.send_until(self._columns[-1].stop)
        out = torch.empty(len(self.own), self._columns[-1].stop if self._reads else 0)
        if self._reads:
            out[:, self._first : self._first + self.own.shape[1]] = self.own
        for piece, buffer, waiting in self._coming:
            waiting.wait()
            out[:, piece.start : piece.stop] = buffer
        for waiting in self._sent:
            waiting.wait()
        return out


def _pieces(columns: range, column_bytes: int) -> Iterator[range]:
    """Columns in pieces of about `PIECE_BYTES`; the same for who sends and who receives."""
    count = min(MOST_PIECES, len(columns), -(-len(columns) * column_bytes // PIECE_BYTES))
    cuts = [columns.start + len(columns) * index // max(1, count) for index in range(count + 1)]
    return (range(*each) for each in pairwise(cuts))


def _rows(spec: PartSpec, model: Hyperparameters, own: Slice) -> dict[str, list[range]]:
    """The rows that each slice has of each matrix, by name."""
    of_slices = [spec.rows(model, Slice(index, own.shares)) for index in range(own.count)]
    return {name: [rows[name] for rows in of_slices] for name in spec.matrices}
