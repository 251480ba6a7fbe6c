"""A matrix of zeros alone is named when it is converted, in each form; vectors may be zeros."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.format.coded import LOSSLESS, PLAIN
from runner.format.safetensors import read_header
from runner.format.slices import Slice, even
from scripts.fakehub.checkpoint import Layout
from tests.support.commands import run
from tests.support.lossless import make
from toolkit.commands.convert import convert
from toolkit.parts.zeros import zero_notes

SINGLE = Layout(form="safetensors", single=True)


def blank(source: Path, *keys: str) -> None:
    """Set tensors of the one shard to zeros."""
    path = source / "model.safetensors"
    tensors = read_header(path).tensors
    with path.open("r+b") as file:
        for key in keys:
            file.seek(tensors[key].start)
            file.write(bytes(tensors[key].nbytes))


@pytest.mark.parametrize("form", [PLAIN, LOSSLESS])
def test_a_matrix_of_zeros_is_named(tmp_path: Path, form: str) -> None:
    source = make(tmp_path / "source", SINGLE)
    blank(source, "h.1.mlp.dense_h_to_4h.weight", "h.2.mlp.dense_h_to_4h.bias", "ln_f.bias")
    said = (
        "1 matrix is all zeros in the source, as in a file that was not downloaded whole: "
        "block_01.safetensors mlp.dense_h_to_4h.weight"
    )
    assert convert(source, tmp_path / "out", form=form).notes == (said,)
    flags = ["--form", "lossless"] if form == LOSSLESS else []
    assert said in run("convert", source, tmp_path / "other", *flags).stderr


def test_a_slice_without_rows_of_a_matrix_says_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "source", SINGLE)
    assert not convert(source, tmp_path / "out", own=Slice(8, even(9))).notes


def test_many_are_counted_and_none_says_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "source", SINGLE)
    assert convert(source, tmp_path / "whole").notes == ()
    assert zero_notes([]) == ()
    blank(
        source, *(key for key in read_header(source / "model.safetensors").tensors if key.startswith("h.1."))
    )
    blank(source, "word_embeddings.weight")
    (note,) = convert(source, tmp_path / "out").notes
    assert note.startswith("5 matrices are all zeros") and note.endswith(" and 2 more")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"]
