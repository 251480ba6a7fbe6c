"""Greedy decoding: one pass over the prompt, then one pass for each token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.model import Model, OnPart


class Generation(Iterator[int]):
    """An iterator of generated token ids that knows what it has done so far.

    The last id is `</s>` where `stop_reason` is "eos"; it is "length" where `max_new_tokens` ended it, and None
    while more may come. `bytes_read` counts the weights that the passes took from the files: everything that is
    streamed once for each pass, what is resident once.
    """

    def __init__(
        self, model: Model, prompt_ids: list[int], max_new_tokens: int, on_part: OnPart | None
    ) -> None:
        self._model = model
        self._on_part = on_part
        self._max_new_tokens = max_new_tokens
        # The last token is never fed back, so it needs no place in the cache.
        self._cache = model.cache(len(prompt_ids) + max_new_tokens - 1, rows=len(prompt_ids))
        self.prompt_ids = prompt_ids
        self.ids: list[int] = []
        self.passes = 0
        self._read_before = model.weights.stream.traffic.bytes_read
        self.stop_reason: str | None = None

    @property
    def bytes_read(self) -> int:
        return self._model.weights.stream.traffic.bytes_read - self._read_before

    @property
    def disk_rate(self) -> float | None:
        """Bytes a second that the files gave while they were read; None before anything was."""
        traffic = self._model.weights.stream.traffic
        return traffic.bytes_fetched / traffic.reading_seconds if traffic.reading_seconds else None

    @property
    def streamed_bytes_per_pass(self) -> int:
        """What does not stay in RAM between passes, and is read in each of them."""
        return self._model.weights.stream.streamed_bytes

    def __next__(self) -> int:
        if self.stop_reason:
            raise StopIteration
        rows = self.ids[-1:] or self.prompt_ids
        logits = self._model.forward(rows, self._cache, on_part=self._on_part)
        # In float32, as the reference does it: the lowest id wins a tie.
        token_id = int(logits[-1].float().argmax())
        self.ids.append(token_id)
        self.passes += 1
        if token_id == self._model.weights.model.eos_token_id:
            self.stop_reason = "eos"
        elif len(self.ids) == self._max_new_tokens:
            self.stop_reason = "length"
        return token_id
