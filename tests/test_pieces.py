"""Matrices cut into pieces: every row once, in order, none larger than asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner import pieces
from runner.header import TensorEntry
from runner.pieces import FileState, Piece, cut

START = 4096 + 24


def cut_matrix(rows: int, columns: int, largest: int) -> tuple[Piece, ...]:
    matrix = torch.arange(rows * columns, dtype=torch.int32).to(torch.bfloat16).view(rows, columns)
    entry = TensorEntry("matrix", "BF16", (rows, columns), START, START + matrix.nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LARGEST_PIECE", largest)
        return cut(FileState(Path("part"), 0, 0), entry, matrix)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 5000))
def test_pieces_are_all_rows_in_order(rows: int, columns: int, largest: int) -> None:
    found = cut_matrix(rows, columns, largest)
    at = 0
    for piece in found:
        assert piece.first == at < piece.last
        assert piece.start == START + at * columns * 2
        assert piece.mapped.shape == (piece.last - piece.first, columns)
        assert piece.nbytes == (piece.last - piece.first) * columns * 2
        assert piece.mapped.data_ptr() == found[0].mapped.data_ptr() + at * columns * 2  # a view, no copy
        at = piece.last
    assert at == rows


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 5000))
def test_pieces_are_of_about_one_size_and_not_too_many(rows: int, columns: int, largest: int) -> None:
    found = cut_matrix(rows, columns, largest)
    heights = [piece.last - piece.first for piece in found]
    assert max(heights) - min(heights) <= 1
    # Rows are not cut, so a piece may be larger by less than one of them.
    assert max(piece.nbytes for piece in found) < largest + columns * 2
    assert len(found) == min(rows, -(-rows * columns * 2 // largest))


def test_a_file_is_known_by_its_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(bytes(100))
    state = FileState.of(path)
    assert (state.path, state.size, state.changed_ns) == (path, 100, path.stat().st_mtime_ns)
