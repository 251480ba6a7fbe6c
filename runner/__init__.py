"""Runs prepared BLOOM checkpoints. `import runner` is light: `load` imports torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import BloomdeskError

if TYPE_CHECKING:
    from runner.generation.model import Model

__all__ = ["BloomdeskError", "load"]

# torch says so at its import; nothing here uses NumPy.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def load(directory: str | Path, ram: int | None = None, *, also: Sequence[str | Path] = ()) -> Model:
    """The model in a prepared directory; it opens instantly at any size, since no matrix is read yet.

    `ram` limits the bytes of RAM of the whole process; by default that is most of what the machine, or its control
    group, can spare. If the model is spread over several disks, `also` are directories of it that have moved.

    The model's `generate(prompt_or_ids, max_new_tokens=...)` yields token ids; `generate_all(prompts)` continues many
    at a time, and yields each as soon as it is done.
    Raises `BloomdeskError` if the directory is not a sound prepared checkpoint.
    """
    from runner.generation.model import Model

    return Model.open(Path(directory), ram, [*map(Path, also)])
