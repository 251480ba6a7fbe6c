"""Matrices cut into pieces: every row once, in order, none larger than asked for."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.format.coded import STRIP_ROWS, strip_count
from runner.format.safetensors import TensorEntry
from runner.weights import chunks as pieces
from runner.weights.chunks import FileState, Piece, cut, cut_coded

START = 4096 + 24


def cut_matrix(rows: int, columns: int, largest: int) -> tuple[Piece, ...]:
    entry = TensorEntry("matrix", "BF16", (rows, columns), START, START + rows * columns * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LARGEST_PIECE", largest)
        return cut(FileState(Path("part"), 0, 0), entry, torch.bfloat16)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 5000))
def test_pieces_are_all_rows_in_order(rows: int, columns: int, largest: int) -> None:
    found = cut_matrix(rows, columns, largest)
    at = 0
    for piece in found:
        assert piece.first == at < piece.last
        assert piece.start == START + at * columns * 2
        assert piece.shape == (piece.last - piece.first, columns)
        assert piece.nbytes == (piece.last - piece.first) * columns * 2
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


@given(st.integers(1, 300), st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 3000))
def test_coded_pieces_are_whole_strips_in_order(rest: int, lengths: list[int], largest: int) -> None:
    rows = STRIP_ROWS * (len(lengths) - 1) + 1 + rest % STRIP_ROWS
    strips = torch.tensor([0, *accumulate(16 * length for length in lengths)])
    nbytes = int(strips[-1])
    entry = TensorEntry("matrix", "U8", (nbytes,), START, START + nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LARGEST_PIECE", largest)
        found = cut_coded(FileState(Path("part"), 0, 0), entry, strips, rows)
    row, at = 0, START
    for piece in found:
        assert (piece.first, piece.start, piece.nbytes) == (row, at, int(piece.strips[-1]))
        assert len(piece.strips) == strip_count(piece.last - piece.first) + 1
        first = row // STRIP_ROWS
        expected = strips[first : first + len(piece.strips)] - strips[first]
        assert torch.equal(piece.strips, expected)
        row, at = piece.last, at + piece.nbytes
    assert (row, at) == (rows, START + nbytes)


def test_a_file_is_known_by_its_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(bytes(100))
    state = FileState.of(path)
    assert (state.path, state.size, state.changed_ns) == (path, 100, path.stat().st_mtime_ns)
