"""Matrices cut into chunks: every row once, in order, none larger than asked for."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.format.coded import ROW_GROUP_ROWS, row_group_count
from runner.format.safetensors import TensorEntry
from runner.weights import chunks
from runner.weights.chunks import Chunk, cut, cut_coded
from runner.weights.part_file import PartFile

START = 4096 + 24


def cut_matrix(rows: int, columns: int, largest: int) -> tuple[Chunk, ...]:
    entry = TensorEntry("matrix", "BF16", (rows, columns), START, START + rows * columns * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LARGEST_CHUNK", largest)
        return cut(PartFile(Path("part"), 0, 0), entry, torch.bfloat16)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 5000))
def test_chunks_are_all_rows_in_order(rows: int, columns: int, largest: int) -> None:
    found = cut_matrix(rows, columns, largest)
    at = 0
    for chunk in found:
        assert chunk.first == at < chunk.last
        assert chunk.start == START + at * columns * 2
        assert chunk.shape == (chunk.last - chunk.first, columns)
        assert chunk.nbytes == (chunk.last - chunk.first) * columns * 2
        at = chunk.last
    assert at == rows


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 5000))
def test_chunks_are_of_about_one_size_and_not_too_many(rows: int, columns: int, largest: int) -> None:
    found = cut_matrix(rows, columns, largest)
    heights = [chunk.last - chunk.first for chunk in found]
    assert max(heights) - min(heights) <= 1
    # Rows are not cut, so a chunk may be larger by less than one of them.
    assert max(chunk.nbytes for chunk in found) < largest + columns * 2
    assert len(found) == min(rows, -(-rows * columns * 2 // largest))


@given(st.integers(1, 300), st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 3000))
def test_coded_chunks_are_whole_row_groups_in_order(rest: int, lengths: list[int], largest: int) -> None:
    rows = ROW_GROUP_ROWS * (len(lengths) - 1) + 1 + rest % ROW_GROUP_ROWS
    row_groups = torch.tensor([0, *accumulate(16 * length for length in lengths)])
    nbytes = int(row_groups[-1])
    entry = TensorEntry("matrix", "U8", (nbytes,), START, START + nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LARGEST_CHUNK", largest)
        found = cut_coded(PartFile(Path("part"), 0, 0), entry, row_groups, rows)
    row, at = 0, START
    for chunk in found:
        assert (chunk.first, chunk.start, chunk.nbytes) == (row, at, int(chunk.row_groups[-1]))
        assert len(chunk.row_groups) == row_group_count(chunk.last - chunk.first) + 1
        first = row // ROW_GROUP_ROWS
        expected = row_groups[first : first + len(chunk.row_groups)] - row_groups[first]
        assert torch.equal(chunk.row_groups, expected)
        row, at = chunk.last, at + chunk.nbytes
    assert (row, at) == (rows, START + nbytes)


def test_a_file_is_known_by_its_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(bytes(100))
    state = PartFile.of(path)
    assert (state.path, state.size, state.changed_ns) == (path, 100, path.stat().st_mtime_ns)
