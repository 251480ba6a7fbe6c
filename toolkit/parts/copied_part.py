"""A part whose tensors are copied as they are stored: a plain one, or slices cut out of one in fewer bits.

    tensors ──> read ahead ──> hashed ──> written behind, each file its own rows ──> fsync

Memory is a few blocks at any size of tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import xxhash

from runner.format.layout import part_header
from runner.format.part_record import PartRecord, TensorRecord
from runner.format.quantised import SCALES_SUFFIX
from toolkit.io.progress import Progress
from toolkit.parts.part import PlannedPart
from toolkit.parts.part_output import OutputFile
from toolkit.parts.part_reader import DamagedTensor, PartReader, stored_tensors
from toolkit.parts.prepared_tensors import damaged_part
from toolkit.parts.row_groups import Coders
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import Block, TensorReader, spans_of


def write_plain(part: PlannedPart, files: Sequence[OutputFile], progress: Progress) -> list[PartRecord]:
    """Copy the tensors of a plain part into `files`; what there is to record but the sources."""
    copies = [_Copy(file, part_header(file.output.spec.stored(part.dtype, {}))) for file in files]
    wholes = _copy(part, part.named, copies, progress)
    matrices = tuple(record for record in wholes if record.name in part.spec.matrices)
    records = [copy.finish(part.spec.file) for copy in copies]
    return [
        replace(record, wholes=matrices if copy.file.output.is_slice else ())
        for copy, record in zip(copies, records, strict=True)
    ]


def write_cut(part: PlannedPart, files: Sequence[OutputFile], progress: Progress) -> list[PartRecord]:
    """Cut a part in fewer bits into the slices of `files`; what there is to record but the sources.

    Raises `BloomdeskError` if the part is not what its manifest records.
    """
    cut = part.cut
    assert cut is not None
    copies = [_Copy(file, _header(part, file)) for file in files]
    named = [(record.name, tensor) for record, tensor in zip(cut.tensors, part.tensors, strict=True)]
    for found, expected in zip(_copy(part, named, copies, progress), cut.tensors, strict=True):
        if found != expected:
            path = part.tensors[0].file
            raise damaged_part(path, f"{found.name} is not what the manifest records")
    with Coders() as coders:
        return [
            replace(_decoded(copy, part, coders), wholes=cut.decoded, whole_originals=cut.originals)
            for copy in copies
        ]


def _header(part: PlannedPart, file: OutputFile) -> bytes:
    spec = file.output.spec
    return part_header(spec.stored(part.dtype, {}, part.form), spec.decoded(part.form, part.dtype))


def _decoded(copy: _Copy, part: PlannedPart, coders: Coders) -> PartRecord:
    """The record of a copied file, with the hashes of what it decodes to, read back from the disk."""
    record = copy.finish(part.spec.file)
    spec = copy.file.output.spec
    unknown = [TensorRecord(*described, "") for described in spec.decoded(part.form, part.dtype)]
    stored = [each for each in stored_tensors(replace(record, decoded=tuple(unknown))) if each.coding]
    found = []
    with PartReader(copy.file.place, stored, coders) as reader:
        for index, each in enumerate(stored):
            own = xxhash.xxh3_128()
            try:
                for block in reader.bits(index):
                    own.update(block)
            except DamagedTensor as error:
                raise damaged_part(copy.file.output.path, str(error)) from error
            found.append(replace(each.tensor, xxh3_128=own.hexdigest()))
    return replace(record, decoded=tuple(found))


def _copy(
    part: PlannedPart,
    named: Iterable[tuple[str, SourceTensor]],
    copies: Sequence[_Copy],
    progress: Progress,
) -> list[TensorRecord]:
    """Copy tensors to all files, each of which takes its rows; the records of the whole ones, if they are cut."""
    named, found = list(named), []
    total, done = sum(tensor.nbytes for _, tensor in named), 0
    is_sliced = any(copy.file.output.is_slice for copy in copies)
    with TensorReader([each for _, tensor in named for each in spans_of(tensor)]) as reader:
        for index, (name, tensor) in enumerate(named):
            whole, position = xxhash.xxh3_128(), 0
            for block in reader.blocks(index):
                for copy in copies:
                    copy.write(name, tensor, block, position)
                if is_sliced:
                    whole.update(block)
                position += len(block)
                done += len(block)
                progress(part.spec.file, part.work - (total - done) * part.work // total, part.work)
            for copy in copies:
                copy.finish_tensor(name, tensor)
            found.append(TensorRecord(name, tensor.dtype, tensor.shape, whole.hexdigest()))
    return found


class _Copy:
    """A file while tensors are copied into it, and what is recorded of them."""

    def __init__(self, file: OutputFile, header: bytes) -> None:
        self.file = file
        self._whole, self._own = xxhash.xxh3_128(header), xxhash.xxh3_128()
        self._tensors: list[TensorRecord] = []
        file.write(header)

    def _rows(self, name: str) -> range | None:
        """The rows of a stored matrix that belong here; None of a vector."""
        return self.file.output.rows.get(name.removesuffix(SCALES_SUFFIX))

    def write(self, name: str, tensor: SourceTensor, block: Block, position: int) -> None:
        """Append what belongs here of the bytes that begin at `position` of the tensor `name`."""
        rows, end, is_last = self._rows(name), position + len(block), False
        if rows is not None:
            row = tensor.nbytes // tensor.shape[0]
            first, last = (min(max(row * at, position), end) for at in (rows.start, rows.stop))
            block, is_last = memoryview(block)[first - position : last - position], row * rows.stop <= end
        if len(block):
            self.file.write(block)
            self._own.update(block)
            self._whole.update(block)
            if is_last:
                # The next block goes elsewhere, and this one's buffer is used again.
                self.file.wait()

    def finish_tensor(self, name: str, tensor: SourceTensor) -> None:
        """Record what has come of the tensor."""
        # Its last block is given back.
        self.file.wait()
        rows = self._rows(name)
        shape = tensor.shape if rows is None else (len(rows), *tensor.shape[1:])
        self._tensors.append(TensorRecord(name, tensor.dtype, shape, self._own.hexdigest()))
        self._own = xxhash.xxh3_128()

    def finish(self, file: str) -> PartRecord:
        """The record, once all is on the disk."""
        self.file.finish()
        return PartRecord(file, self.file.position, self._whole.hexdigest(), tuple(self._tensors), ())
