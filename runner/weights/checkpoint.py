"""The parts of a prepared directory: vectors in memory, matrices in chunks that a stream hands out."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, ROW_GROUPS_SUFFIX, read_row_groups
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import PartSpec, part_specs
from runner.format.manifest import Manifest, PartRecord, load_manifest
from runner.format.safetensors import DATA_ALIGNMENT, Header, TensorEntry, open_regular, read_header
from runner.kernel.decode import compile_decoder
from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from runner.weights.chunks import Chunk, FileState, cut, cut_coded
from runner.weights.linear import Matrix
from runner.weights.stream import READERS, Stream

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Part:
    """The tensors of one file by name: vectors [N] and matrices [N, K]."""

    vectors: Mapping[str, torch.Tensor]
    matrices: Mapping[str, Matrix]


@dataclass(frozen=True)
class Weights:
    """All weights of a model; nothing of the matrices is read before its use.

    embedding        matrix word_embeddings.weight [V, E], vectors word_embeddings_layernorm.{weight,bias} [E]
    blocks           one part of 12 tensors for each block, see `prepared.block_tensors`
    final_layernorm  vectors weight, bias [E]
    stream           the chunks of all matrices in the order of a pass: those of the blocks, then the head's, which
                     are the embedding's
    """

    model: Hyperparameters
    embedding: Part
    blocks: tuple[Part, ...]
    final_layernorm: Part
    stream: Stream
    kernel: Kernel

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.model.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what one pass needs, since the embedding is also the head."""
        return sum(spec.nbytes(self.model.dtype) for spec in part_specs(self.model))

    @classmethod
    def open(cls, directory: Path, readers: int = READERS) -> Weights:
        """Open a complete prepared directory; only headers and vectors are read, so it takes no time.

        `readers` threads read ahead, torch's number of threads compute. Raises `BloomdeskError` where the directory
        is incomplete, or a part's size or header is not what the manifest says.
        """
        manifest = load_manifest(directory)
        _check_complete(directory, manifest)
        dtype = TORCH_DTYPES[manifest.model.dtype]
        is_coded = manifest.form == LOSSLESS
        kernel = Kernel(dtype, workers(torch.get_num_threads()), coded=is_coded)
        if is_coded:
            compile_decoder()  # now, so that its memory counts as the process's own
        specs = part_specs(manifest.model)
        opened = [_open_part(directory, spec, manifest.parts[spec.file]) for spec in specs]
        # A pass looks rows of the embedding up when it begins, and multiplies with all of it at its end.
        order = [*opened[1:], opened[0]]
        stream = Stream(
            [chunk for part in order for chunks in part.chunks.values() for chunk in chunks], readers
        )
        parts, index = [], 0
        for part in order:
            matrices = {}
            for name, chunks in part.chunks.items():
                matrices[name] = Matrix(part.shapes[name], dtype, chunks, index, stream, kernel)
                index += len(chunks)
            parts.append(Part(part.vectors, matrices))
        *blocks, final_layernorm, embedding = parts
        return cls(manifest.model, embedding, tuple(blocks), final_layernorm, stream, kernel)


@dataclass(frozen=True)
class _Opened:
    """A part's vectors, and its matrices in chunks with their shapes."""

    vectors: Mapping[str, torch.Tensor]
    chunks: Mapping[str, tuple[Chunk, ...]]
    shapes: Mapping[str, tuple[int, int]]


def _check_complete(directory: Path, manifest: Manifest) -> None:
    if manifest.missing:
        raise BloomdeskError(
            f"{directory} is not complete: {len(manifest.missing)} files are still to be made, "
            f"the next is {manifest.missing[0]}",
            "run the same bloomdesk convert again: it goes on where it stopped",
        )


def _open_part(directory: Path, spec: PartSpec, record: PartRecord) -> _Opened:
    path = directory / spec.file
    repair = f"see what is damaged: bloomdesk verify {directory}"
    try:
        state = FileState.of(path)
        if state.size != record.size:
            raise BloomdeskError(f"{path} has {state.size:,} bytes, expected {record.size:,}", repair)
        header = read_header(path)
        if not _holds(header, record):
            raise BloomdeskError(f"{path} does not hold the tensors that the manifest lists", repair)
        with open_regular(path) as file:
            return _opened(file, state, header.tensors, spec, record)
    except FileNotFoundError:
        raise BloomdeskError(f"{path} is missing", repair) from None
    except OSError as error:
        raise BloomdeskError(f"{path} cannot be read: {error.strerror}", repair) from error
    except ValueError as error:
        raise BloomdeskError(f"{path} is damaged: {error}", repair) from error


def _opened(
    file: BinaryIO, state: FileState, entries: Mapping[str, TensorEntry], spec: PartSpec, record: PartRecord
) -> _Opened:
    coded = {tensor.name for tensor in record.decoded}
    chunks = {}
    for name, shape in spec.matrices.items():
        entry = entries[name]
        if name in coded:
            offsets = read_row_groups(_read(file, entries[name + ROW_GROUPS_SUFFIX]), *shape, entry.nbytes)
            row_groups = torch.frombuffer(offsets, dtype=torch.int64)
            chunks[name] = cut_coded(state, entry, row_groups, shape[0])
        else:
            chunks[name] = cut(state, entry, TORCH_DTYPES[entry.dtype])
    vectors = {
        name: torch.frombuffer(_read(file, entries[name]), dtype=TORCH_DTYPES[entries[name].dtype])
        for name in spec.tensors
        if name not in spec.matrices
    }
    return _Opened(vectors, chunks, spec.matrices)


def _holds(header: Header, record: PartRecord) -> bool:
    found = [(entry.name, entry.dtype, entry.shape) for entry in header.tensors.values()]
    expected = [(tensor.name, tensor.dtype, tensor.shape) for tensor in record.tensors]
    return found == expected and header.data_start % DATA_ALIGNMENT == 0


def _read(file: BinaryIO, entry: TensorEntry) -> bytearray:
    data = bytearray(entry.nbytes)
    file.seek(entry.start)
    if file.readinto(data) != entry.nbytes:
        raise OSError(errno.EIO, "the file ends too early")
    return data
