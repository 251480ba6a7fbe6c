"""The BLOOM family as the Hub has it: the shape of each model by its name."""

from __future__ import annotations

import re

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters

# Hidden size, heads and blocks; the vocabulary is the same.
SHAPES = {
    "bloom": (14336, 112, 70),
    "bloom-560m": (1024, 16, 24),
    "bloom-1b1": (1536, 16, 24),
    "bloom-1b7": (2048, 16, 24),
    "bloom-3b": (2560, 32, 30),
    "bloom-7b1": (4096, 32, 30),
}
VOCABULARY = 250_880


def hyperparameters(name: str) -> Hyperparameters:
    """The shape of `bigscience/bloom-3b`, `bloom-3b`, or a bloomz that was made from it.

    The dtype is BF16, as in bigscience/bloom; some models of the family have F16, with the same sizes. Raises
    `BloomdeskError` for any other name.
    """
    found = re.fullmatch(r"(?:bigscience/)?bloomz?((?:-\d+[bm]\d*)?)(?:-mt|-p3)?", name.lower())
    shape = SHAPES.get(f"bloom{found[1]}") if found else None
    if shape is None:
        raise BloomdeskError(
            f"unknown model {name[:80]!r}",
            f"name one of {', '.join(SHAPES)}, or a bloomz of the same size",
        )
    hidden_size, heads, blocks = shape
    return Hyperparameters(hidden_size, heads, blocks, VOCABULARY, "BF16")
