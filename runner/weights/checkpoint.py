"""The parts of a prepared directory: vectors in memory, matrices in chunks that a stream hands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from runner.errors import BloomdeskError, in_shell, reading
from runner.format.coded import ROW_GROUPS_SUFFIX, read_row_groups
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import DATA_ALIGNMENT, PartSpec, part_specs, pass_nbytes
from runner.format.part_record import PartRecord
from runner.format.quantised import SCALES_SUFFIX
from runner.format.safetensors import TensorEntry, read_header
from runner.format.slice_set import SliceSet, find_all_slices
from runner.format.slices import Slice
from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from runner.weights.chunks import Chunk, cut, cut_coded, cut_quantised, interleaved
from runner.weights.linear import Matrix
from runner.weights.part_file import PartFile, read_range
from runner.weights.stream import READERS, Stream

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Part:
    """The tensors of one file by name, vectors [N] and matrices [N, K], and the kernel that computes with them."""

    vectors: Mapping[str, torch.Tensor]
    matrices: Mapping[str, Matrix]
    kernel: Kernel


@dataclass(frozen=True)
class Weights:
    """All weights of a model; nothing of the matrices is read before its use.

    fingerprint      what distinguishes these weights from all others, whatever their form
    model_identity   the same for all forms of one model, those in fewer bits too; empty if it is not known
    embedding        matrix word_embeddings.weight [V, E], vectors word_embeddings_layernorm.{weight,bias} [E]
    blocks           one part of 12 tensors for each block, see `layout.block_tensors`
    final_layernorm  vectors weight, bias [E]
    head             matrix [V, E]: that of the embedding, or one of its own
    stream           the chunks of all matrices in the order of a pass: those of the blocks, then those of the head
    slice            whose rows these are, if the others are on other machines
    """

    model: Hyperparameters
    fingerprint: str
    model_identity: str
    embedding: Part
    blocks: tuple[Part, ...]
    final_layernorm: Part
    head: Matrix
    stream: Stream
    kernel: Kernel
    slice: Slice | None = None

    @property
    def heads(self) -> range:
        """The heads whose rows of query_key_value are here."""
        heads = self.model.n_head
        return range(heads) if self.slice is None else self.slice.rows(heads)

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.model.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that a pass needs whole; of an embedding that is not the head it needs some rows."""
        return pass_nbytes(self.model)

    @classmethod
    def open(cls, directory: Path, also: Sequence[Path] = (), readers: int = READERS) -> Weights:
        """Open a complete prepared directory; only headers and vectors are read, so it takes no time.

        If it is a slice, the others are found as `find_slices` says. `readers` threads read ahead from each disk,
        torch's number of threads compute. Raises `BloomdeskError` if a slice is not found, a directory is incomplete,
        or a part's size or header is not what the manifest says.
        """
        return cls.of(find_all_slices(directory, also), readers)

    @classmethod
    def of(cls, slices: SliceSet, readers: int = READERS) -> Weights:
        """The weights of slices that were found: all of them, or one of which the others are on other machines."""
        own = slices.first.slice if slices.missing else None
        model, dtype = slices.first.model, TORCH_DTYPES[slices.first.model.dtype]
        kernel = Kernel(dtype, workers(torch.get_num_threads()))
        # A pass looks up rows of the embedding first, and multiplies with all of it at its end.
        embedding, *others = part_specs(model)
        specs = [*others, embedding]
        opened = [_open_slices(slices, spec) for spec in specs]
        streamed = opened if model.tie_word_embeddings else opened[:-1]
        stream = Stream(
            [chunk for _, chunks in streamed for each in chunks.values() for chunk in each], readers
        )
        parts, index = [], 0
        for spec, (vectors, chunks_by_name) in zip(specs, opened, strict=True):
            matrices = {}
            for name, chunks in chunks_by_name.items():
                shape, rows = spec.matrices[name], spec.rows(model, own)[name]
                matrices[name] = Matrix(shape, dtype, chunks, index, stream, kernel, rows)
                index += len(chunks)
            parts.append(Part(vectors, matrices, kernel))
        count, known = model.n_layer, (slices.fingerprint, slices.source_fingerprint)
        (head,) = parts[-1].matrices.values() if len(parts) == count + 2 else parts[-2].matrices.values()
        blocks, final_layernorm = tuple(parts[:count]), parts[count]
        return cls(model, *known, parts[-1], blocks, final_layernorm, head, stream, kernel, own)

    def is_form_of(self, other: Weights) -> bool:
        """Whether both are known to be made from the same weights, and are all here: a slice has some heads only."""
        known = self.slice is None and other.slice is None and self.model_identity != ""
        return known and self.model_identity == other.model_identity

    def with_vectors_of(self, other: Weights) -> Weights:
        """These weights with the vectors of another form of the same model, so that these are in RAM once."""

        def sharing(own: Part, others: Part) -> Part:
            return replace(own, vectors=others.vectors)

        return replace(
            self,
            embedding=sharing(self.embedding, other.embedding),
            blocks=tuple(map(sharing, self.blocks, other.blocks)),
            final_layernorm=sharing(self.final_layernorm, other.final_layernorm),
        )


def _open_slices(slices: SliceSet, whole: PartSpec) -> Opened:
    """The vectors of a part, and the chunks of its whole matrices, by name."""
    vectors, of_disks = {}, []
    for disk, (index, manifest) in enumerate(slices.manifests.items()):
        spec, rows = whole.sliced(manifest.model, manifest.slice), whole.rows(manifest.model, manifest.slice)
        vectors, chunks = _open_part(slices.directories[index], disk, spec, manifest.parts[spec.file])
        of_disks.append({name: _shifted(each, rows[name].start) for name, each in chunks.items()})
    names = whole.matrices
    return vectors, {name: interleaved([chunks[name] for chunks in of_disks]) for name in names}


def _shifted(chunks: Sequence[Chunk], rows: int) -> list[Chunk]:
    """The chunks of a slice as those of the whole matrix, in which its first row is number `rows`."""
    return [replace(chunk, first=chunk.first + rows, last=chunk.last + rows) for chunk in chunks]


Opened = tuple[Mapping[str, torch.Tensor], Mapping[str, tuple[Chunk, ...]]]


def _open_part(directory: Path, disk: int, spec: PartSpec, record: PartRecord) -> Opened:
    """The vectors of a part in one directory, on the disk of that number, and the chunks of its matrices, by name."""
    path = directory / spec.file
    repair = f"see what is damaged: bloomdesk verify {in_shell(directory)}"
    with reading(path, repair):
        file = PartFile.of(path, disk)
    if file.size != record.size:
        raise BloomdeskError(f"{path} has {file.size:,} bytes, expected {record.size:,}", repair)
    try:
        header = read_header(path)
    except BloomdeskError as error:
        raise BloomdeskError(error.message, error.hint or repair) from None
    found = [(entry.name, entry.dtype, entry.shape) for entry in header.tensors.values()]
    expected = [tensor.described for tensor in record.tensors]
    if found != expected or header.data_start % DATA_ALIGNMENT:
        raise BloomdeskError(f"{path} does not hold the tensors that the manifest lists", repair)
    try:
        return _read_part(file, header.tensors, spec, record)
    except ValueError as error:
        raise BloomdeskError(f"{path} is damaged: {error}", repair) from error


def _read_part(
    part: PartFile, entries: Mapping[str, TensorEntry], spec: PartSpec, record: PartRecord
) -> Opened:
    coded, codings = {tensor.name for tensor in record.decoded}, record.codings
    vectors, chunks = {}, {}
    with part.opened() as file:

        def read(name: str) -> bytearray:
            return read_range(file, entries[name].start, entries[name].nbytes)

        for name, shape in spec.tensors.items():
            dtype = TORCH_DTYPES.get(entries[name].dtype)
            if name in codings:
                scales = entries[name + SCALES_SUFFIX]
                chunks[name] = cut_quantised(part, entries[name], scales, codings[name], shape[0])
            elif name in coded:
                offsets = read_row_groups(read(name + ROW_GROUPS_SUFFIX), *shape, entries[name].nbytes)
                row_groups = torch.frombuffer(offsets, dtype=torch.int64)
                chunks[name] = cut_coded(part, entries[name], row_groups, shape[0])
            elif name in spec.matrices:
                chunks[name] = cut(part, entries[name], dtype)
            else:
                vectors[name] = torch.frombuffer(read(name), dtype=dtype)
    return vectors, chunks
