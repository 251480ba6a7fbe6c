"""Source tensors compared with what a directory's parts were made from, before a command goes on from those parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.layout import EMBEDDING
from runner.format.manifest import Manifest
from runner.format.part_record import TensorRecord
from toolkit.io.progress import Progress
from toolkit.io.reader import READ_THREADS
from toolkit.source.key_map import Assignment
from toolkit.source.tensor import SourceTensor
from toolkit.source.tensor_reader import TensorReader, spans_of


@dataclass(frozen=True)
class Comparison:
    """A source tensor, and the record of the tensor that `part` was made from."""

    part: str
    tensor: SourceTensor
    record: TensorRecord


def comparisons_of(
    manifest: Manifest, assignment: Assignment, tensors: Mapping[str, SourceTensor]
) -> tuple[Comparison, ...]:
    """What to compare of the source `tensors`, by key, in the order of their bytes; shards of parts may be gone."""
    found = []
    for part in manifest.parts.values():
        keys = assignment.parts[part.file]
        named = [(keys[record.name], record) for record in part.source_tensors]
        if part.file == EMBEDDING and assignment.lm_head is not None:
            named.append((assignment.lm_head, named[0][1]))
        found += [Comparison(part.file, tensors[key], record) for key, record in named if key in tensors]
    return tuple(sorted(found, key=lambda each: (each.tensor.file, each.tensor.offset)))


def compare(destination: Path, comparisons: Sequence[Comparison], progress: Progress) -> None:
    """Read all the tensors; `BloomdeskError` at the first that is not the one that a part was made from."""
    spans = [each for comparison in comparisons for each in spans_of(comparison.tensor)]
    with TensorReader(spans, READ_THREADS) as reader:
        for index, comparison in enumerate(comparisons):
            tensor, own, done = comparison.tensor, xxhash.xxh3_128(), 0
            same = (tensor.dtype, tensor.shape) == (comparison.record.dtype, comparison.record.shape)
            for block in reader.blocks(index) if same else ():
                own.update(block)
                done += len(block)
                progress(f"{tensor.file.name}: {tensor.key}", done, tensor.nbytes)
            if own.hexdigest() != comparison.record.xxh3_128:
                raise BloomdeskError(
                    f"{destination} was made from another state of the source: {tensor.key} in {tensor.file} is not "
                    f"what {comparison.part} was made from",
                    "for the weights as they are now, give a new directory; if they should not have changed, fetch or "
                    "copy the shard again; if an adapter was merged, give the same --adapter",
                )
