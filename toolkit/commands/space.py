"""The room that a model of the family takes on a disk, known before anything is asked of the Hub."""

from __future__ import annotations

from runner.format.coded import PLAIN
from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import part_specs
from toolkit.commands.staging import Schedule
from toolkit.parts.part import part_size

# bigscience/bloom and bloomz have a shard for each block; of their smaller relatives most are one file as a whole.
BLOCKS_WITH_SHARDS = 70
SMALL_FILES = 15_000_000


def space_to_prepare(model: Hyperparameters, form: str = PLAIN) -> int:
    """Bytes of disk that `prepare` takes at the fullest moment, at most; for a lossless directory hardly more."""
    specs = part_specs(model)
    plain = {spec.file: part_size(spec, model.dtype) for spec in specs}
    sizes = {spec.file: part_size(spec, model.dtype, form) for spec in specs}
    if model.n_layer >= BLOCKS_WITH_SHARDS:
        schedule, shards = Schedule({file: (file,) for file in sizes}), plain
    else:
        schedule, shards = Schedule({file: ("weights",) for file in sizes}), {"weights": sum(plain.values())}
    peak, _ = schedule.peak(sizes.__getitem__, shards.__getitem__)
    return peak + SMALL_FILES
