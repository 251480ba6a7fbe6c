"""What the tests of prepared directories share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from runner.format.coded import ROW_GROUPS_SUFFIX, read_row_groups
from runner.format.manifest import load_manifest
from runner.format.quantised import FORMS
from runner.format.safetensors import read_header
from runner.kernel.decode import decode_row_groups
from scripts.fakehub.checkpoint import Layout, synthetic
from tests.toolkit.source.test_shards import LAYOUTS, data
from toolkit.commands.convert import convert

SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 3, "vocab_size": 300}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def make(directory: Path, layout: Layout = LAYOUTS["bloom"], **changes: object) -> Path:
    synthetic(directory, **{**SHAPE, **changes}, layout=layout)
    return directory


def make_forms(base: Path, **changes: object) -> Path:
    """A checkpoint in `base / "source"`, and a prepared directory of each form, named after it."""
    make(base / "source", **changes)
    for form in FORMS:
        convert(base / "source", base / form, form=form)
    return base


def flip(path: Path, position: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def damage_everything(directory: Path, suffix: str) -> None:
    """In the tensor beside a matrix whose name ends in `suffix`, in a matrix, in a header, cut, gone."""
    matrix = "mlp.dense_h_to_4h.weight"
    for block, name, offset in ((1, matrix + suffix, 9), (0, matrix, 100)):
        path = directory / f"block_{block:02}.safetensors"
        flip(path, read_header(path).tensors[name].start + offset)
    flip(directory / "final_layernorm.safetensors", 50)
    embedding = directory / "embedding.safetensors"
    embedding.write_bytes(embedding.read_bytes()[:-3])
    (directory / "block_02.safetensors").unlink()


def change_as_it_is_written(monkeypatch: pytest.MonkeyPatch, path: Path, share: float) -> None:
    """The disk changes one bit of a file after its fsync, at this share of its bytes."""
    real = os.fsync

    def lossy(descriptor: int) -> None:
        real(descriptor)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            flip(path, int(share * path.stat().st_size), 16)

    monkeypatch.setattr(os, "fsync", lossy)


def interrupt_at(file: str) -> Callable[[str, int, int], None]:
    """A progress that raises `KeyboardInterrupt` at a file."""

    def progress(name: str, done: int, total: int) -> None:
        if name == file:
            raise KeyboardInterrupt

    return progress


def decoded(directory: Path) -> Iterator[tuple[str, str, bytes]]:
    """(part, name, bits) of every matrix, by safetensors and the decoder alone."""
    for file, record in load_manifest(directory).parts.items():
        with safe_open(directory / file, framework="pt") as part:
            assert set(part.keys()) == {tensor.name for tensor in record.tensors}
            for tensor in record.decoded:
                rows, columns = tensor.shape
                table, coded = part.get_tensor(tensor.name + ROW_GROUPS_SUFFIX), part.get_tensor(tensor.name)
                assert table.dtype == torch.int64 and coded.dtype == torch.uint8
                offsets = read_row_groups(data(table), rows, columns, len(coded))
                assert list(offsets) == table.tolist()
                out = bytearray(rows * columns * 2)
                decode_row_groups(bytes(data(coded)), offsets, rows, columns, out)
                yield file, tensor.name, bytes(out)
