"""The order in which shards are needed and parts are made, and the disk that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from runner.format.coded import PLAIN
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import EMBEDDING, part_specs
from runner.format.manifest import Manifest
from toolkit.parts.destination import missing_parts
from toolkit.parts.part import part_size
from toolkit.source.index import ShardList
from toolkit.source.key_map import Assignment

# One that parts are made from, and one on its way.
SHARDS_AT_A_TIME = 2
# bigscience/bloom and bloomz have a shard for each block; most of their smaller relatives are a single file.
BLOCKS_WITH_SHARDS = 70
SMALL_FILES = 15_000_000


@dataclass(frozen=True)
class Schedule:
    """The shards that each missing part is made from, in the order of a pass; sizes are bytes, by file name."""

    needs: Mapping[str, tuple[str, ...]]
    part_sizes: Mapping[str, int]
    shard_sizes: Mapping[str, int]

    @property
    def shards(self) -> tuple[str, ...]:
        """Every shard that is needed, in the order in which they arrive."""
        return tuple(dict.fromkeys(name for shards in self.needs.values() for name in shards))

    @property
    def shard_bytes(self) -> int:
        """Bytes of all needed shards."""
        return self._shard_bytes(self.shards)

    def _shard_bytes(self, names: Iterable[str]) -> int:
        return sum(self.shard_sizes[name] for name in names)

    def needed_after(self, part: str) -> frozenset[str]:
        """Shards that parts after `part` need."""
        parts = list(self.needs)
        return frozenset(name for later in parts[parts.index(part) + 1 :] for name in self.needs[later])

    @property
    def shards_at_a_time(self) -> int:
        """The most shards that are on the disk at any time, if each is deleted after its last part."""
        return max((len(held) for _, held in self._held()), default=0)

    @property
    def peak_bytes(self) -> int:
        """The most bytes of parts and shards at any time, if shards arrive one by one and go after their last part."""
        written = peak = 0
        for part, held in self._held():
            written += self.part_sizes[part]
            peak = max(peak, written + self._shard_bytes(held))
        return peak

    def _held(self) -> Iterator[tuple[str, set[str]]]:
        """Each part with the shards on the disk while it is made: its own and, if that is one, the next to arrive."""
        order, arrived = self.shards, set[str]()
        for part, shards in self.needs.items():
            arrived |= set(shards)
            held = set(arrived)
            if len(held) < SHARDS_AT_A_TIME:
                last = max(map(order.index, held))
                held |= set(order[last + 1 : last + 2])
            yield part, held
            arrived &= self.needed_after(part)

    def of(self, manifest: Manifest) -> Schedule:
        """The same for one of several directories: its own missing parts in its own sizes."""
        needs = {part: shards for part, shards in self.needs.items() if part not in manifest.parts}
        return replace(self, needs=needs, part_sizes=part_sizes(manifest))

    @property
    def needed_sizes(self) -> dict[str, int]:
        """Bytes of the parts to make."""
        return {part: self.part_sizes[part] for part in self.needs}

    def growth(self, deletable: frozenset[str]) -> int:
        """The most bytes beyond those taken now, if all shards exist and `deletable` ones go after their last part."""
        written = freed = peak = 0
        for part in self.needs:
            written += self.part_sizes[part]
            peak = max(peak, written - freed)
            freed = self._shard_bytes(deletable - self.needed_after(part))
        return peak


def schedule_of(
    manifest: Manifest,
    shards: ShardList,
    assignment: Assignment | None,
    shard_sizes: Mapping[str, int],
    only: frozenset[str] | None = None,
) -> Schedule:
    """The schedule of the parts that `manifest` lacks, or of those among them that are in `only`.

    Without an index every part needs the one shard there is.
    """
    needs = {}
    for spec in missing_parts(manifest):
        if only is not None and spec.file not in only:
            continue
        names = [file.name for file in shards.files]
        if shards.weight_map is not None and assignment is not None:
            names = [shards.weight_map[key] for key in assignment.parts[spec.file].values()]
            if spec.file == EMBEDDING and assignment.lm_head is not None:
                # The head must equal the embedding.
                names.append(shards.weight_map[assignment.lm_head])
        needs[spec.file] = tuple(dict.fromkeys(names))
    return Schedule(needs, part_sizes(manifest), shard_sizes)


def part_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of all parts of a directory, or the expected most if tensors are coded."""
    return {spec.file: part_size(spec, manifest.model.dtype, manifest.form) for spec in manifest.specs}


def space_to_prepare(model: Hyperparameters, form: str = PLAIN) -> int:
    """The most bytes of disk that `prepare` takes at any time for a model of the family, before the Hub is asked."""
    specs = part_specs(model)
    sizes = {spec.file: part_size(spec, model.dtype, form) for spec in specs}
    shards = {spec.file: part_size(spec, model.dtype) for spec in specs}
    if model.n_layer >= BLOCKS_WITH_SHARDS:
        return Schedule({file: (file,) for file in sizes}, sizes, shards).peak_bytes + SMALL_FILES
    weights = {"weights": sum(shards.values())}
    return Schedule(dict.fromkeys(sizes, ("weights",)), sizes, weights).peak_bytes + SMALL_FILES
