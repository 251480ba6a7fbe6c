"""Parts as tensors: the bits of the files, matrices where they lie, nothing wrong opened."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from runner import BloomdeskError
from runner.format.layout import PartSpec, part_specs
from runner.format.manifest import load_manifest
from runner.format.safetensors import read_header
from runner.weights import chunks
from runner.weights.checkpoint import Part, Weights
from runner.weights.linear import Matrix


@pytest.fixture
def directory(prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared()[1], tmp_path / "bloom"))


def parts_of(weights: Weights) -> list[tuple[PartSpec, Part]]:
    """Every part with what the manifest's shapes say of it."""
    opened = (weights.embedding, *weights.blocks, weights.final_layernorm)
    return list(zip(part_specs(weights.model), opened, strict=True))


def read(matrix: Matrix) -> torch.Tensor:
    """A plain matrix, from its chunks."""
    with contextlib.ExitStack() as held:
        places = range(matrix.index, matrix.index + len(matrix.chunks))
        return torch.cat([held.enter_context(matrix.stream.chunk(place)).clone() for place in places])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_are_those_of_the_files(prepared, dtype: str) -> None:
    directory = prepared(dtype=dtype)[1]
    for spec, part in parts_of(Weights.open(directory)):
        tensors = dict(part.vectors) | {name: read(matrix) for name, matrix in part.matrices.items()}
        assert set(tensors) == set(spec.tensors)
        assert all(tensor.ndim == 1 for tensor in part.vectors.values())
        with safe_open(directory / spec.file, framework="pt") as file:
            for name, tensor in tensors.items():
                expected = file.get_tensor(name)
                assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_chunks_are_the_rows_of_their_matrices(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", 5000)
    weights = Weights.open(directory)
    seen = 0
    for spec, part in parts_of(weights):
        data = (directory / spec.file).read_bytes()
        for matrix in part.matrices.values():
            assert weights.stream.chunks[matrix.index : matrix.index + len(matrix.chunks)] == matrix.chunks
            assert [chunk.first for chunk in matrix.chunks] == [0, *(p.last for p in matrix.chunks[:-1])]
            assert read(matrix).shape == matrix.shape
            for chunk in matrix.chunks:
                found = torch.frombuffer(bytearray(data[chunk.start :][: chunk.nbytes]), dtype=weights.dtype)
                assert torch.equal(found.view(chunk.shape), read(matrix)[chunk.first : chunk.last])
                seen += 1
    assert seen == len(weights.stream.chunks) > 100


def test_a_pass_goes_through_the_chunks_in_their_order(directory: Path) -> None:
    weights = Weights.open(directory)
    names = [(spec.file, name) for spec, part in parts_of(weights)[1:] for name in part.matrices]
    names.append(("embedding.safetensors", "word_embeddings.weight"))
    matrices = {
        (spec.file, name): part.matrices[name] for spec, part in parts_of(weights) for name in part.matrices
    }
    assert [matrices[name].index for name in names] == list(range(len(names)))
    assert [chunk.file.path.name for chunk in weights.stream.chunks] == [file for file, _ in names]


def test_vectors_stay_in_memory(directory: Path) -> None:
    weights = Weights.open(directory)
    before = {name: tensor.clone() for name, tensor in weights.blocks[1].vectors.items()}
    os.truncate(directory / "block_01.safetensors", 0)
    for name, tensor in weights.blocks[1].vectors.items():
        assert torch.equal(tensor, before[name])


def test_every_part_starts_its_data_on_a_page(directory: Path) -> None:
    for spec, part in parts_of(Weights.open(directory)):
        header = read_header(directory / spec.file)
        assert header.data_start % 4096 == 0
        for name, matrix in part.matrices.items():
            in_data = header.tensors[name].start - header.data_start
            assert (matrix.chunks[0].start - in_data) % 4096 == 0


def test_nbytes_is_the_sum_of_all_tensors(directory: Path) -> None:
    weights = Weights.open(directory)
    tensors = [tensor for _, part in parts_of(weights) for tensor in part.vectors.values()]
    tensors += [read(matrix) for _, part in parts_of(weights) for matrix in part.matrices.values()]
    assert weights.nbytes == sum(tensor.nbytes for tensor in tensors)


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


def test_a_damaged_header_comes_with_the_next_command(directory: Path) -> None:
    path = directory / "block_01.safetensors"
    with path.open("r+b") as file:
        file.write(b"X" * 16)
    with pytest.raises(BloomdeskError, match="its header claims") as raised:
        Weights.open(directory)
    assert raised.value.hint == f"see what is damaged: bloomdesk verify {directory}"
