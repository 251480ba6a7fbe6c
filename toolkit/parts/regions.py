"""The regions of a file, each with its own hash: header and tensors of a part or a shard, a small file as a whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from runner.format.manifest import CompanionRecord
from runner.format.part_record import PartRecord
from toolkit.parts.export_record import ShardRecord

FileRecord = PartRecord | ShardRecord | CompanionRecord


@dataclass(frozen=True)
class Region:
    """The bytes `[start, start + nbytes)` of `file`; `tensor` is None for a header and for a small file."""

    file: str
    tensor: str | None
    start: int
    nbytes: int
    xxh3_128: str
    is_header: bool = False


def regions_of(record: FileRecord) -> tuple[Region, ...]:
    """What lies in a file, from its first byte to its last."""
    if isinstance(record, CompanionRecord):
        return (Region(record.file, None, 0, record.size, record.xxh3_128),)
    header = record.header
    found = [Region(record.file, None, 0, len(header), xxhash.xxh3_128_hexdigest(header), is_header=True)]
    start = len(header)
    for tensor in record.tensors:
        found.append(Region(record.file, tensor.name, start, tensor.nbytes, tensor.xxh3_128))
        start += tensor.nbytes
    return tuple(found)


def choose(regions: Sequence[Region], share: float, seed: int | None = None) -> tuple[Region, ...]:
    """A random choice of about `share` of the bytes, in the order given; all headers, and at least one region more.

    Every call chooses anew unless `seed` is given. Each region has its chance, however large it is.
    """
    generator = random.Random(seed)
    candidates = [region for region in regions if not region.is_header]
    left = share * sum(region.nbytes for region in candidates)
    chosen: set[Region] = set()
    for region in generator.sample(candidates, len(candidates)):
        fits = region.nbytes <= left
        # The one that crosses the line is taken as often as the part of it that still fits: so the bytes are right
        # on average, and a share smaller than the largest tensor still comes to it one day.
        if fits or not chosen or generator.random() * region.nbytes < left:
            chosen.add(region)
        if not fits:
            break
        left -= region.nbytes
    return tuple(region for region in regions if region.is_header or region in chosen)
