"""The disk space that preparing a model of the family takes, known before the Hub is asked."""

from __future__ import annotations

from runner.format.coded import PLAIN
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import part_specs
from toolkit.commands.schedule import Schedule
from toolkit.parts.part import part_size

# bigscience/bloom and bloomz have a shard for each block; most of their smaller relatives are a single file.
BLOCKS_WITH_SHARDS = 70
SMALL_FILES = 15_000_000


def space_to_prepare(model: Hyperparameters, form: str = PLAIN) -> int:
    """The most bytes of disk that `prepare` takes at any time; an estimate from above if coded."""
    specs = part_specs(model)
    sizes = {spec.file: part_size(spec, model.dtype, form) for spec in specs}
    shards = {spec.file: part_size(spec, model.dtype) for spec in specs}
    if model.n_layer >= BLOCKS_WITH_SHARDS:
        return Schedule({file: (file,) for file in sizes}, sizes, shards).peak_bytes + SMALL_FILES
    weights = {"weights": sum(shards.values())}
    return Schedule(dict.fromkeys(sizes, ("weights",)), sizes, weights).peak_bytes + SMALL_FILES
