"""Parts as memory-mapped tensors: nothing copied, nothing wrong opened."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from runner import BloomdeskError
from runner.header import read_header
from runner.prepared import load_manifest, part_specs
from runner.weights import Weights


@pytest.fixture
def directory(prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared()[1], tmp_path / "bloom"))


def test_tensors_are_those_of_the_files(directory: Path) -> None:
    weights = Weights.open(directory)
    opened = (weights.embedding, *weights.blocks, weights.final_layernorm)
    for part, spec in zip(opened, part_specs(weights.model), strict=True):
        with safe_open(directory / spec.file, framework="pt") as file:
            assert list(part) == list(spec.tensors)
            for name, tensor in part.items():
                assert torch.equal(tensor, file.get_tensor(name))


def test_tensors_are_views_of_the_files(directory: Path) -> None:
    weights = Weights.open(directory)
    row = weights.embedding["word_embeddings.weight"][3]
    start = read_header(directory / "embedding.safetensors").data_start
    with (directory / "embedding.safetensors").open("r+b") as file:
        file.seek(start + 3 * row.nbytes)
        file.write(torch.ones_like(row).view(torch.uint8).numpy().tobytes())
    assert torch.equal(row, torch.ones_like(row))


def test_every_part_starts_its_data_on_a_page(directory: Path) -> None:
    weights = Weights.open(directory)
    for part in (weights.embedding, *weights.blocks, weights.final_layernorm):
        first = next(iter(part.values()))
        assert first.data_ptr() % 4096 == 0


def test_nbytes_is_the_sum_of_all_tensors(directory: Path) -> None:
    weights = Weights.open(directory)
    parts = (weights.embedding, *weights.blocks, weights.final_layernorm)
    assert weights.nbytes == sum(tensor.nbytes for part in parts for tensor in part.values())


def test_a_missing_part_is_named(directory: Path) -> None:
    (directory / "block_01.safetensors").unlink()
    with pytest.raises(BloomdeskError, match=r"block_01\.safetensors is missing") as caught:
        Weights.open(directory)
    assert "bloomdesk verify" in caught.value.hint


def test_a_truncated_part_is_named_with_both_sizes(directory: Path) -> None:
    part = directory / "block_01.safetensors"
    size = part.stat().st_size
    with part.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(BloomdeskError, match=rf"has {size - 1:,} bytes, expected {size:,}"):
        Weights.open(directory)


def test_a_part_in_another_ones_place_is_refused(directory: Path) -> None:
    part = directory / "block_01.safetensors"
    data = part.read_bytes().replace(b"input_layernorm.weight", b"inputxlayernorm.weight")
    part.write_bytes(data)
    with pytest.raises(BloomdeskError, match="does not hold the tensors that the manifest lists"):
        Weights.open(directory)


def test_an_incomplete_directory_is_not_opened(directory: Path) -> None:
    manifest = load_manifest(directory)
    parts = {file: record for file, record in manifest.parts.items() if file != "block_02.safetensors"}
    (directory / "manifest.json").write_text(replace(manifest, parts=parts).to_json())
    with pytest.raises(BloomdeskError, match=r"not complete: 1 files .* block_02\.safetensors"):
        Weights.open(directory)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_directory_without_a_manifest_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BloomdeskError, match="is not a prepared checkpoint"):
        Weights.open(tmp_path / name)
