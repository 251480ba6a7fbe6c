"""A draft model proposes what the large one is likely to say: a small model, or the large one in fewer bits.

Speculative decoding, https://arxiv.org/abs/2211.17192, with greedy verification: only equal tokens are accepted.
Another form of the large model (https://arxiv.org/abs/2509.18344) needs no cache of its own. It reads the keys and
values that the large model has computed, and writes those of its guesses behind them:

    computed by the large model ........ | guesses ....      the draft's passes
    computed by the large model ........................     the next pass, which replaces them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.format.safetensors import read_small
from runner.generation.grammar import GrammarError
from runner.generation.memory_plan import FEWEST_BUFFERS
from runner.generation.sampling import Sampler
from runner.generation.sequence import Ids, Sequence
from runner.generation.speculation.cost import CostModel
from runner.generation.speculation.policy import MOST_DRAFT_TOKENS
from runner.model.activations import activation_bytes
from runner.model.forward import ModelRunner
from runner.model.kv_cache import KVCache, Segment
from runner.model.tokenizer import LARGEST_TOKENIZER, Tokenizer
from runner.system import memory
from runner.weights.checkpoint import TORCH_DTYPES, Weights

# Rows of one pass. All weights are in RAM, so a prompt in several passes costs no more.
MOST_ROWS = 128


@dataclass(eq=False)
class Reading:
    """The draft's cache of a sequence, and the tokens that are in it."""

    cache: KVCache
    sampler: Sampler
    fed: list[int] = field(default_factory=list)


class DraftModel:
    """A prepared checkpoint that is read once and stays in RAM, with its own cache for each sequence.

    One that `is_form` of the large model uses the caches of that. `readings` are what it holds of sequences until they
    are released.
    """

    def __init__(
        self, model: ModelRunner, vocab_size: int, process_nbytes: int, *, is_form: bool = False
    ) -> None:
        """`vocab_size` is that of the large model, `process_nbytes` the bytes that opening the draft took."""
        self.cost = CostModel()
        self.is_form = is_form
        self.model = model
        self._vocab_size = vocab_size
        self.process_nbytes = process_nbytes
        self.readings: dict[Sequence, Reading] = {}

    @classmethod
    def open(cls, directory: Path, large: Weights, tokenizer: Tokenizer) -> DraftModel:
        """Raises `BloomdeskError` if the directory is not a sound prepared checkpoint, or has other tokens."""
        before = memory.memory_in_use()
        weights = Weights.open(directory)
        is_form = weights.is_form_of(large)
        if is_form:
            weights = weights.with_vectors_of(large)
        else:
            _check_tokens(directory, weights.model.vocab_size, large, tokenizer)
        taken = max(0, memory.memory_in_use() - before)
        return cls(ModelRunner(weights), large.model.vocab_size, taken, is_form=is_form)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices in RAM, in their form; the vectors count with what opening it took."""
        return sum(chunk.nbytes for chunk in self.model.weights.stream.chunks)

    def nbytes(self, sequences: int, capacity: int) -> int:
        """All bytes of RAM that it takes for `sequences` sequences of up to `capacity` positions."""
        beside = bytes_beside_weights(self.model.weights.model, sequences, capacity, is_form=self.is_form)
        return self.process_nbytes + self.weight_bytes + beside

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        """Up to `count` tokens for each (sequence, count), which share the draft's passes.

        They are chosen as the sequence's own are, with the same noise, so a draft that agrees is right. They end early
        at the end of the text, and before a token that the large model does not have.
        """
        texts = [sequence.text for sequence, _ in wanted]
        lengths = [len(text) for text in texts]
        readings = [
            self._beside(sequence, text, count) if self.is_form else self._synchronised(sequence, text)
            for (sequence, count), text in zip(wanted, texts, strict=True)
        ]
        unfinished = [place for place, (_, count) in enumerate(wanted) if count]
        while unfinished:
            for place, token in self._pass(unfinished, [each for each, _ in wanted], texts, readings):
                sequence, count = wanted[place]
                if token < self._vocab_size:
                    texts[place].append(token)
                is_end = token >= self._vocab_size or token in self.model.weights.model.eos_token_ids
                if not is_end:
                    new_ids = texts[place][len(sequence.prompt_ids) :]
                    forced, is_end = _forced(readings[place].sampler, new_ids)
                    texts[place] += forced
                del texts[place][lengths[place] + count :]
                if is_end or len(texts[place]) == lengths[place] + count:
                    unfinished.remove(place)
        return [text[length:] for text, length in zip(texts, lengths, strict=True)]

    def release(self, sequence: Sequence) -> None:
        """Free the cache of a sequence that is done."""
        self.readings.pop(sequence, None)

    def close(self) -> None:
        """Free all of its RAM; it cannot propose any more."""
        self.readings.clear()
        # Buffers take memory only when they are used.
        self.model.weights.stream.arrange(frozenset(), FEWEST_BUFFERS)

    def _synchronised(self, sequence: Sequence, text: Ids) -> Reading:
        """The reading of a sequence, without what the text has otherwise; the text's last token is never in it."""
        if sequence not in self.readings:
            cache = self.model.new_cache(sequence.request.capacity)
            self.readings[sequence] = Reading(cache, sequence.sampler.fork())
        reading = self.readings[sequence]
        most = min(len(reading.fed), reading.cache.length, len(text) - 1)
        # Only the tokens that it proposed last can differ from the text.
        common = max(0, min(most, len(reading.fed) - MOST_DRAFT_TOKENS))
        while common < most and reading.fed[common] == text[common]:
            common += 1
        reading.cache.rewind(common)
        del reading.fed[common:]
        return reading

    def _beside(self, sequence: Sequence, text: Ids, count: int) -> Reading:
        """The reading of what the large model has computed of a sequence, for `count` draft tokens after the text."""
        known, computed = self.readings.get(sequence), sequence.cache.length
        sampler = known.sampler if known else sequence.sampler.fork()
        cache = sequence.cache.for_guesses(len(text) - computed + count)
        self.readings[sequence] = Reading(cache, sampler, list(text[:computed]))
        return self.readings[sequence]

    def _pass(
        self,
        places: list[int],
        sequences: list[Sequence],
        texts: list[list[int]],
        readings: list[Reading],
    ) -> list[tuple[int, int]]:
        """(place, next token) of each text that one pass over unread tokens finishes."""
        room, carried, segments = MOST_ROWS, [], []
        for place in places:
            reading = readings[place]
            unread = texts[place][len(reading.fed) :]
            if ids := unread[:room]:
                room -= len(ids)
                carried.append(place)
                segments.append(Segment(ids, reading.cache, 1 if len(ids) == len(unread) else 0))
        with self.cost.measure(self.model.weights.stream, MOST_ROWS - room):
            logits = self.model.forward_all(segments)
        found = []
        for place, segment, rows in zip(carried, segments, logits, strict=True):
            readings[place].fed.extend(segment.ids)
            if len(rows):
                sequence = sequences[place]
                new_ids = texts[place][len(sequence.prompt_ids) :]
                try:
                    token = readings[place].sampler.choose(rows[-1], new_ids)
                except GrammarError:
                    # Only the text itself may fail by it, and need not come here.
                    token = self._vocab_size
                found.append((place, token))
        return found


def bytes_beside_weights(model: Hyperparameters, sequences: int, capacity: int, *, is_form: bool) -> int:
    """Bytes of a draft's activations and caches for `sequences` sequences of up to `capacity` positions."""
    dtype, rows = TORCH_DTYPES[model.dtype], min(MOST_ROWS, sequences * capacity)
    caches = 0 if is_form else sequences * KVCache.nbytes(model, capacity, dtype)
    return caches + activation_bytes(model, rows, capacity, dtype.itemsize, sequences)


def _forced(sampler: Sampler, new_ids: Ids) -> tuple[list[int], bool]:
    """The tokens that must follow, and whether the text ends then."""
    try:
        forced = sampler.forced(new_ids)
        return forced, sampler.is_over([*new_ids, *forced])
    except GrammarError:
        return [], True


def _check_tokens(directory: Path, vocab_size: int, large: Weights, tokenizer: Tokenizer) -> None:
    """Raises `BloomdeskError` unless a token id means the same to both models."""
    advice = "name a smaller BLOOM with the same tokenizer, as bloom-560m beside bloom"
    own, other = (
        folder / "tokenizer.json" for folder in (directory, large.stream.chunks[0].file.path.parent)
    )
    try:
        is_same = read_small(own, LARGEST_TOKENIZER) == read_small(other, LARGEST_TOKENIZER)
    except OSError as error:
        raise BloomdeskError(f"{own} cannot be compared with {other}: {error.strerror}") from error
    if not is_same and Tokenizer(own).vocabulary != tokenizer.vocabulary:
        raise BloomdeskError(
            f"{directory} cannot draft: its tokenizer.json has other tokens than {other}", advice
        )
    if vocab_size < large.model.vocab_size:
        raise BloomdeskError(
            f"{directory} cannot draft: it has {vocab_size:,} token ids, "
            f"the large model {large.model.vocab_size:,}",
            advice,
        )
