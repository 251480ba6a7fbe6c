"""Source tensors compared with what a directory's parts were made from, before a command goes on from those parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.layout import EMBEDDING, part_specs
from runner.format.manifest import Manifest
from runner.format.part_record import TensorRecord
from runner.format.safetensors import Shape, tensor_nbytes
from toolkit.io.progress import Progress
from toolkit.io.reader import READ_THREADS
from toolkit.source.key_map import Assignment
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import Span, TensorReader


@dataclass(frozen=True)
class Comparison:
    """A source tensor, and the record of the tensor that `part` was made from, or of some `rows` of it."""

    part: str
    tensor: SourceTensor
    record: TensorRecord
    rows: range | None = None

    @property
    def shape(self) -> Shape:
        """That of what is compared."""
        shape = self.tensor.shape
        return shape if self.rows is None else (len(self.rows), *shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return tensor_nbytes(self.tensor.dtype, self.shape)

    @property
    def span(self) -> Span:
        """What to read."""
        first = self.rows.start * math.prod(self.shape[1:]) if self.rows is not None else 0
        return Span(self.tensor, first, math.prod(self.shape))


def comparisons_of(
    manifest: Manifest, assignment: Assignment, tensors: Mapping[str, SourceTensor]
) -> tuple[Comparison, ...]:
    """What to compare of the source `tensors`, by key, in the order of their bytes; shards of parts may be gone."""
    found, specs = [], {spec.file: spec for spec in part_specs(manifest.model)}
    for part in manifest.parts.values():
        keys, rows = assignment.parts[part.file], {}
        if manifest.slice is not None and not part.wholes:
            # Of a slice that has never seen the whole matrices.
            rows = specs[part.file].rows(manifest.model, manifest.slice)
        named = [(keys[record.name], record) for record in part.source_tensors]
        if part.file == EMBEDDING and assignment.lm_head is not None:
            named.append((assignment.lm_head, named[0][1]))
        found += [
            Comparison(part.file, tensors[key], record, rows.get(record.name))
            for key, record in named
            if key in tensors
        ]
    return tuple(sorted(found, key=lambda each: (each.tensor.file, each.tensor.offset)))


def compare(destination: Path, comparisons: Sequence[Comparison], progress: Progress) -> None:
    """Read all the tensors; `BloomdeskError` at the first that is not the one that a part was made from."""
    with TensorReader([each.span for each in comparisons], READ_THREADS) as reader:
        for index, comparison in enumerate(comparisons):
            tensor, own, done = comparison.tensor, xxhash.xxh3_128(), 0
            same = (tensor.dtype, comparison.shape) == (comparison.record.dtype, comparison.record.shape)
            for block in reader.blocks(index) if same else ():
                own.update(block)
                done += len(block)
                progress(f"{tensor.file.name}: {tensor.key}", done, comparison.nbytes)
            if own.hexdigest() != comparison.record.xxh3_128:
                raise BloomdeskError(
                    f"{destination} was made from another state of the source: {tensor.key} in {tensor.file} is not "
                    f"what {comparison.part} was made from",
                    "for the weights as they are now, give a new directory; if they should not have changed, fetch or "
                    "copy the shard again; if an adapter was merged, give the same --adapter",
                )
