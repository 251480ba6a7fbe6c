"""The parts of a prepared directory as memory-mapped tensors: nothing is copied, and nothing read before its use."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.errors import BloomdeskError
from runner.header import DATA_ALIGNMENT, TensorEntry, open_regular, read_header
from runner.prepared import Hyperparameters, PartRecord, PartSpec, load_manifest, part_specs

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """All weights of a model; the tensors are read-only views of the files.

    embedding        word_embeddings.weight [V, E], word_embeddings_layernorm.{weight,bias} [E]
    blocks           one mapping of 12 tensors for each block, see `prepared.block_tensors`
    final_layernorm  weight, bias [E]
    """

    model: Hyperparameters
    embedding: Tensors
    blocks: tuple[Tensors, ...]
    final_layernorm: Tensors

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.model.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what one pass reads, since the embedding is also the head."""
        return sum(spec.nbytes(self.model.dtype) for spec in part_specs(self.model))

    @classmethod
    def open(cls, directory: Path) -> Weights:
        """Map every part of a complete prepared directory; only headers are read, so it takes no time.

        Raises `BloomdeskError` where the directory is incomplete, or a part's size or header is not what the
        manifest says.
        """
        manifest = load_manifest(directory)
        if manifest.missing:
            raise BloomdeskError(
                f"{directory} is not complete: {len(manifest.missing)} files are still to be made, "
                f"the next is {manifest.missing[0]}",
                "run the same bloomdesk convert again: it goes on where it stopped",
            )
        specs = part_specs(manifest.model)
        parts = [_map_part(directory, spec, manifest.parts[spec.file]) for spec in specs]
        return cls(manifest.model, parts[0], tuple(parts[1:-1]), parts[-1])


def _map_part(directory: Path, spec: PartSpec, record: PartRecord) -> Tensors:
    path = directory / spec.file
    repair = f"see what is damaged: bloomdesk verify {directory}"
    try:
        size = path.stat().st_size
        if size != record.size:
            raise BloomdeskError(f"{path} has {size:,} bytes, expected {record.size:,}", repair)
        header = read_header(path)
        found = [(entry.name, entry.dtype, entry.shape) for entry in header.tensors.values()]
        expected = [(tensor.name, tensor.dtype, tensor.shape) for tensor in record.tensors]
        if found != expected or header.data_start % DATA_ALIGNMENT:
            raise BloomdeskError(f"{path} does not hold the tensors that the manifest lists", repair)
        with open_regular(path) as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise BloomdeskError(f"{path} is missing", repair) from None
    except OSError as error:
        raise BloomdeskError(f"{path} cannot be mapped: {error.strerror}", repair) from error
    return {entry.name: _view(mapping, entry) for entry in header.tensors.values()}


def _view(mapping: mmap.mmap, entry: TensorEntry) -> torch.Tensor:
    dtype = TORCH_DTYPES[entry.dtype]
    with warnings.catch_warnings():
        # A writable private mapping would silence torch, but counts as memory that might be needed:
        # a machine with less RAM than the embedding would refuse it.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(
            mapping, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.start
        )
    return flat.view(entry.shape)
