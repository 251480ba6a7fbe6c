"""Greedy decoding of one prompt, as an iterator of token ids."""

from __future__ import annotations

import collections.abc

from runner.generation.batch import Batch


class Generation(collections.abc.Iterator[int]):
    """A batch of one prompt, as an iterator of token ids that counts what they took.

    `ids` are the token ids that the iterator has returned. `batch` has the rest: the memory plan, and what proposes.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.ids: list[int] = []
        (self._sequence,) = batch.sequences

    @property
    def prompt_ids(self) -> collections.abc.Sequence[int]:
        return self._sequence.prompt_ids

    @property
    def passes(self) -> int:
        return self.batch.passes

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that the passes used from the files: streamed ones in each pass, resident ones once."""
        return self.batch.bytes_read

    @property
    def proposed(self) -> int:
        """Number of draft tokens that passes carried."""
        return self._sequence.proposed

    @property
    def accepted(self) -> int:
        """Number of draft tokens that were right."""
        return self._sequence.accepted

    @property
    def drafting_seconds(self) -> float:
        return self._sequence.drafting_seconds

    @property
    def streamed_bytes_per_pass(self) -> int:
        """Bytes of weights that do not stay in RAM between passes."""
        return self.batch.model.weights.stream.streamed_bytes

    @property
    def stop_reason(self) -> str | None:
        """ "eos" if the last id is `</s>`, "length" if `max_new_tokens` was reached, None while more may come."""
        return self._sequence.stop_reason if len(self.ids) == len(self._sequence.ids) else None

    def __next__(self) -> int:
        while len(self.ids) == len(self._sequence.ids):
            if self._sequence.stop_reason:
                raise StopIteration
            self.batch.step()
        self.ids.append(self._sequence.ids[len(self.ids)])
        return self.ids[-1]
