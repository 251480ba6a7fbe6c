"""Runs prepared BLOOM checkpoints. `import runner` is light: torch comes in with `load`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import BloomdeskError

if TYPE_CHECKING:
    from runner.model import Model

__all__ = ["BloomdeskError", "load"]


def load(directory: str | Path) -> Model:
    """Open a prepared checkpoint; instant at any size, since nothing of the weights is read yet.

    The model's `generate(prompt_or_ids, max_new_tokens=...)` yields token ids.
    Raises `BloomdeskError` where the directory is no sound prepared checkpoint.
    """
    from runner.model import Model

    return Model.open(Path(directory))
