"""Greedy decoding of one prompt, as an iterator of token ids."""

from __future__ import annotations

import collections.abc
from typing import Any

from runner.generation.batch import Batch


class Generation(Batch, collections.abc.Iterator[int]):
    """A batch of one prompt, as an iterator of token ids. `ids` are those that it has returned."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.ids: list[int] = []
        (self.sequence,) = self.sequences

    @property
    def prompt_ids(self) -> collections.abc.Sequence[int]:
        return self.sequence.prompt_ids

    @property
    def streamed_bytes_per_pass(self) -> int:
        """Bytes of weights that do not stay in RAM between passes."""
        return self.model.weights.stream.streamed_bytes

    @property
    def stop_reason(self) -> str | None:
        """Why the text has ended, as `Sequence` says it, or None while more may come."""
        return self.sequence.stop_reason if len(self.ids) == len(self.sequence.ids) else None

    def __next__(self) -> int:
        while len(self.ids) == len(self.sequence.ids):
            if self.sequence.failure:
                raise self.sequence.failure
            if self.sequence.is_done:
                raise StopIteration
            self.step()
        self.ids.append(self.sequence.ids[len(self.ids)])
        return self.ids[-1]
