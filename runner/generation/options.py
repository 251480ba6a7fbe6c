"""How prompts are continued: one object of options, from the command line to the batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError

LOOKUP, OFF = "lookup", "off"
DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class GenerationOptions:
    """Options of a run. Raises `BloomdeskError` for an unknown `speculate`, or a `batch` below 1.

    speculate   "lookup" has n-grams of the text propose tokens, "off" does not; neither changes the output
    draft       directory of a small prepared BLOOM that proposes tokens as well
    batch       the largest number of prompts that share a pass; None leaves it to the memory plan
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    speculate: str = LOOKUP
    draft: Path | str | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.speculate not in (LOOKUP, OFF):
            raise BloomdeskError(f"unknown --speculate {self.speculate!r}", f"choose {LOOKUP} or {OFF}")
        if self.batch is not None and self.batch < 1:
            raise BloomdeskError(f"a batch must be of at least 1 prompt, found {self.batch}")
