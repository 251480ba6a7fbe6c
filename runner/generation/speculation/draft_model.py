"""A small model that proposes what the large one is likely to say.

Speculative decoding with a draft model, https://arxiv.org/abs/2211.17192, where only what is equal is accepted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import BloomdeskError
from runner.format.safetensors import read_small
from runner.generation import memory_plan as budget
from runner.generation.memory_plan import FEWEST_BUFFERS
from runner.generation.sequence import Continuation
from runner.generation.speculation.cost import Pace
from runner.model.kv_cache import KVCache, Segment
from runner.model.tokenizer import LARGEST_TOKENIZER, Tokenizer
from runner.system import memory

if TYPE_CHECKING:
    from runner.generation.model import Model

MOST_ROWS = 128  # of one pass of the draft; all its weights are in RAM, so a prompt in several costs no more


@dataclass(eq=False)
class _Reading:
    """How far the draft has read a sequence: `fed` is what its cache holds, the first `sure` of it the text's."""

    cache: KVCache
    fed: list[int] = field(default_factory=list)
    sure: int = 0


class Draft:
    """A prepared checkpoint that is read once and stays in RAM, with a cache of its own for each sequence."""

    def __init__(self, model: Model, vocab_size: int, process_nbytes: int) -> None:
        """`vocab_size` is that of the large model, `process_nbytes` what opening the draft took beside its weights."""
        self.pace = Pace()
        self.seconds = 0.0  # of computing, but for the first pass, which brings the weights
        self._model = model
        self._vocab_size = vocab_size
        self._process_nbytes = process_nbytes
        self._readings: dict[Continuation, _Reading] = {}

    @classmethod
    def open(cls, directory: Path, large: Model) -> Draft:
        """Raises `BloomdeskError` where the directory is no sound prepared checkpoint, or speaks other tokens."""
        from runner.generation.model import Model
        from runner.weights.checkpoint import Weights

        before = memory.memory_in_use()
        weights = Weights.open(directory)
        _check_tokens(directory, weights.model.vocab_size, large)
        taken = max(0, memory.memory_in_use() - before)
        model = Model(weights, large.tokenizer, large.ram, large.process_nbytes)
        return cls(model, large.weights.model.vocab_size, taken)

    @property
    def weight_bytes(self) -> int:
        """Of the matrices as they are in RAM, coded ones coded; opening it took the vectors."""
        return sum(chunk.nbytes for chunk in self._model.weights.stream.chunks)

    def nbytes(self, sequences: int, capacity: int) -> int:
        """All that it takes of the RAM for so many sequences of up to `capacity` positions."""
        shape, dtype = self._model.weights.model, self._model.weights.dtype
        rows = min(MOST_ROWS, sequences * capacity)
        activations = budget.activation_bytes(shape, rows, capacity, dtype.itemsize, sequences)
        caches = sequences * KVCache.nbytes(shape, capacity, dtype)
        return self._process_nbytes + self.weight_bytes + caches + activations

    def propose(self, wanted: Sequence[tuple[Continuation, int]]) -> list[list[int]]:
        """For each sequence up to so many tokens, greedy; fewer where `</s>` or a token unknown to the large model
        comes. The sequences share the draft's passes."""
        texts = [[*continuation.prompt_ids, *continuation.ids] for continuation, _ in wanted]
        lengths = [len(text) for text in texts]
        readings = [
            self._synchronised(continuation, text)
            for (continuation, _), text in zip(wanted, texts, strict=True)
        ]
        unfinished = [place for place, (_, count) in enumerate(wanted) if count]
        while unfinished:
            for place, token in self._pass(unfinished, texts, readings):
                is_last = len(texts[place]) + 1 - lengths[place] == wanted[place][1]
                if token < self._vocab_size:
                    texts[place].append(token)
                if is_last or token >= self._vocab_size or token == self._model.weights.model.eos_token_id:
                    unfinished.remove(place)
        return [text[length:] for text, length in zip(texts, lengths, strict=True)]

    def release(self, continuation: Continuation) -> None:
        """Forget a sequence that is done."""
        self._readings.pop(continuation, None)

    def close(self) -> None:
        """Give all of its RAM back; it cannot propose any more."""
        self._readings.clear()
        self._model.weights.stream.arrange(
            frozenset(), FEWEST_BUFFERS
        )  # whose memory is taken only when it is used

    def _synchronised(self, continuation: Continuation, text: Sequence[int]) -> _Reading:
        """The reading of a sequence, without what the large model said otherwise; the text's last token is unread."""
        reading = self._readings.get(continuation)
        if reading is None:
            reading = _Reading(self._model.new_cache(continuation.request.capacity))
            self._readings[continuation] = reading
        fed, common = reading.fed, reading.sure
        most = min(len(fed), reading.cache.length, len(text) - 1)
        while common < most and fed[common] == text[common]:
            common += 1
        common = min(common, most)
        reading.cache.rewind(common)
        del fed[common:]
        reading.sure = common
        return reading

    def _pass(
        self, places: Sequence[int], texts: Sequence[Sequence[int]], readings: Sequence[_Reading]
    ) -> list[tuple[int, int]]:
        """One pass over what is unread of these texts, as far as it fits: the likeliest token after each that ends."""
        room, carried, segments = MOST_ROWS, [], []
        for place in places:
            reading = readings[place]
            unread = texts[place][len(reading.fed) :]
            ids = unread[:room]
            room -= len(ids)
            if ids:
                carried.append(place)
                segments.append(Segment(ids, reading.cache, 1 if len(ids) == len(unread) else 0))
        began = time.perf_counter()
        traffic = self._model.weights.stream.traffic
        waited, loaded = traffic.waiting_seconds, traffic.bytes_loaded
        logits = self._model.forward_all(segments)
        seconds = time.perf_counter() - began - (traffic.waiting_seconds - waited)
        is_first = traffic.bytes_loaded > loaded
        self.pace.learn(MOST_ROWS - room, max(0.0, seconds), 0.0, is_rough=is_first)
        self.seconds += 0.0 if is_first else seconds
        found = []
        for place, segment, rows in zip(carried, segments, logits, strict=True):
            readings[place].fed.extend(segment.ids)
            if len(rows):
                found.append((place, int(rows[-1].float().argmax())))
        return found


def _check_tokens(directory: Path, vocab_size: int, large: Model) -> None:
    """Raises `BloomdeskError` unless a token id means the same to both models."""
    advice = "name a smaller BLOOM with the same tokenizer, as bloom-560m beside bloom"
    own, other = (
        directory / "tokenizer.json",
        large.weights.stream.chunks[0].file.path.parent / "tokenizer.json",
    )
    try:
        is_same = read_small(own, LARGEST_TOKENIZER) == read_small(other, LARGEST_TOKENIZER)
    except OSError as error:
        raise BloomdeskError(f"{own} cannot be compared with {other}: {error.strerror}") from error
    if not is_same and Tokenizer(own).vocabulary != large.tokenizer.vocabulary:
        raise BloomdeskError(
            f"{directory} cannot draft: its tokenizer.json has other tokens than {other}", advice
        )
    if vocab_size < large.weights.model.vocab_size:
        raise BloomdeskError(
            f"{directory} cannot draft: it knows {vocab_size:,} token ids, "
            f"the large model {large.weights.model.vocab_size:,}",
            advice,
        )
