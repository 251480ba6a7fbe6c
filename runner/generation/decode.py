"""Greedy decoding of one prompt: a pass over it, then one for each token, or for several where trials succeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runner.generation.batch import Batch


class Generation(Iterator[int]):
    """A batch of one prompt, as an iterator of generated token ids that knows what it has done so far.

    The last id is `</s>` where `stop_reason` is "eos"; it is "length" where `max_new_tokens` ended it, and None
    while more may come. `batch` knows the rest: passes, proposals, and how the RAM is shared out.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.ids: list[int] = []
        (self._continuation,) = batch.continuations

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self._continuation.prompt_ids

    @property
    def passes(self) -> int:
        return self.batch.passes

    @property
    def bytes_read(self) -> int:
        """Weights that the passes took from the files: what is streamed once for each pass, what is resident once."""
        return self.batch.bytes_read

    @property
    def proposed(self) -> int:
        """Tokens that passes carried on trial."""
        return self.batch.proposed

    @property
    def accepted(self) -> int:
        """Of those, the ones that were right."""
        return self.batch.accepted

    @property
    def drafting_seconds(self) -> float:
        return self.batch.drafting_seconds

    @property
    def streamed_bytes_per_pass(self) -> int:
        """What does not stay in RAM between passes, and is read in each of them."""
        return self.batch.model.weights.stream.streamed_bytes

    @property
    def stop_reason(self) -> str | None:
        return self._continuation.stop_reason if len(self.ids) == len(self._continuation.ids) else None

    def __next__(self) -> int:
        while len(self.ids) == len(self._continuation.ids):
            if self._continuation.stop_reason:
                raise StopIteration
            self.batch.step()
        self.ids.append(self._continuation.ids[len(self.ids)])
        return self.ids[-1]
