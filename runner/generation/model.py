"""A prepared BLOOM, opened: its weights and tokenizer, its share of the RAM, and one pass through all parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.generation import memory_plan as budget
from runner.generation.batch import LOOKUP, Batch
from runner.generation.decode import Generation
from runner.generation.memory_plan import Budget
from runner.generation.sequence import Continuation, Request
from runner.model import bloom
from runner.model.kv_cache import KVCache, Segment, whole_lanes
from runner.model.tokenizer import Tokenizer
from runner.system import memory
from runner.weights.checkpoint import TORCH_DTYPES, Weights
from runner.weights.ring import buffer_bytes

# Called after each part of a pass with the parts done and the parts in all.
OnPart = Callable[[int, int], None]


def shares(
    model: Hyperparameters, chunks: Sequence[int], ram: int, process_nbytes: int, capacity: int, rows: int
) -> Budget:
    """How `ram` bytes are shared out for a model whose matrices are in chunks of these sizes; see `Model.budget`."""
    dtype = TORCH_DTYPES[model.dtype]
    return budget.share_out(
        ram,
        process_nbytes,
        KVCache.nbytes(model, capacity, dtype),
        budget.activation_bytes(model, rows, capacity, dtype.itemsize),
        chunks,
        max(map(buffer_bytes, chunks)),
    )


@dataclass(frozen=True)
class Model:
    """What `runner.load` gives. `ram` bounds the bytes of RAM that it takes, all that the process holds included."""

    weights: Weights
    tokenizer: Tokenizer
    ram: int
    process_nbytes: int  # of the process, before any matrix

    @classmethod
    def open(cls, directory: Path, ram: int | None = None) -> Model:
        """Without `ram`: most of what the machine, or its control group, can spare.

        Raises `BloomdeskError` where the directory is no sound, complete prepared checkpoint.
        """
        memory.give_freed_memory_back()
        weights = Weights.open(directory)
        tokenizer = Tokenizer(directory / "tokenizer.json")
        return cls(weights, tokenizer, ram or budget.default_total(), memory.memory_in_use())

    def budget(self, capacity: int, rows: int) -> Budget:
        """How the RAM is shared out for passes of up to `rows` rows and `capacity` positions in the cache.

        Raises `BloomdeskError` where it is too little for that.
        """
        chunks = [chunk.nbytes for chunk in self.weights.stream.chunks]
        return shares(self.weights.model, chunks, self.ram, self.process_nbytes, capacity, rows)

    def cache(self, capacity: int, rows: int | None = None) -> KVCache:
        """An empty KV cache for `capacity` positions, with the RAM shared out for it.

        A pass may have up to `rows` rows; without it, as many as the cache has positions.
        """
        shared = self.budget(capacity, capacity if rows is None else rows)
        self.weights.stream.arrange(shared.resident, shared.buffers)
        return self.new_cache(capacity)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` positions, for which there is room already."""
        return KVCache(self.weights.model, capacity, self.weights.dtype, self.weights.kernel)

    def forward(
        self, ids: Sequence[int], cache: KVCache, *, all_rows: bool = False, on_part: OnPart | None = None
    ) -> torch.Tensor:
        """One pass over one sequence, see `forward_all`: logits [1, V] of the last row, or [T, V] with `all_rows`."""
        return self.forward_all([Segment(ids, cache, len(ids) if all_rows else 1)], on_part)[0]

    @torch.inference_mode()
    def forward_all(self, segments: Sequence[Segment], on_part: OnPart | None = None) -> list[torch.Tensor]:
        """One pass: append each segment's ids to its cache and return its logits [n, V], in the model's dtype.

        They have the bits that the sequence's own pass would give. A pass that an exception ended has changed no
        cache. Raises ValueError where a cache has no room, and `BloomdeskError` where a part cannot be read or was
        changed since it was opened.
        """
        for segment in segments:
            if segment.length > segment.cache.capacity:
                raise ValueError(f"{segment.length} positions do not fit a cache of {segment.cache.capacity}")
        try:
            with _one_thread():
                logits = self._forward(segments, on_part)
        except BaseException:
            for segment in segments:
                segment.cache.clear(segment.cache.length, segment.length)
            raise
        for segment in segments:
            segment.cache.length = segment.length
        return logits

    def _forward(self, segments: Sequence[Segment], on_part: OnPart | None) -> list[torch.Tensor]:
        model, weights = self.weights.model, self.weights
        longest = max(segment.length for segment in segments)
        alibi = bloom.alibi_bias(model.n_head, whole_lanes(longest), weights.dtype)
        views, first = [], 0
        for segment in segments:
            count, start = len(segment.ids), segment.cache.length
            views.append(bloom.View.of(first, count, start, model.n_head, weights.dtype))
            first += count
        x = bloom.embed([i for segment in segments for i in segment.ids], weights.embedding, model)
        parts = model.n_layer + 2  # the embedding, the blocks, and the final LayerNorm with the head
        blocks = zip(weights.blocks, *(segment.cache.blocks for segment in segments), strict=True)
        for index, (block, *caches) in enumerate(blocks):
            x = bloom.block_forward(x, block, caches, views, alibi, model)
            if on_part:
                on_part(index + 2, parts)
        counts = [segment.logits for segment in segments]
        kept = torch.cat(
            [x[view.last - count : view.last] for view, count in zip(views, counts, strict=True)]
        )
        if not len(kept):  # nothing but chunks of prompts; the head is not even read
            return list(kept.new_empty(0, model.vocab_size).split(counts))
        logits = bloom.head(kept, weights.final_layernorm, weights.embedding, model.layer_norm_epsilon)
        if on_part:
            on_part(parts, parts)
        return list(logits.split(counts))

    def generate(
        self,
        prompt_or_ids: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        speculate: str = LOOKUP,
        draft: Path | str | None = None,
        on_part: OnPart | None = None,
    ) -> Generation:
        """Greedy continuation: an iterator of token ids that ends with `</s>` or after `max_new_tokens`.

        A step of the iterator is a pass, or nothing where the pass before gave several tokens. What is proposed,
        `speculate="lookup"` from the text itself and `draft` by the small model in that directory, changes no
        token; `speculate="off"` without a draft is one token a pass. Raises `BloomdeskError` for an empty prompt,
        an id outside the vocabulary, a `max_new_tokens` below 1, an unsuitable draft, or where the RAM is too
        little.
        """
        request = self.request(prompt_or_ids, max_new_tokens)
        return Generation(Batch(self, [request], None, speculate, draft, on_part))

    def generate_all(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        max_new_tokens: int = 64,
        batch: int | None = None,
        speculate: str = LOOKUP,
        draft: Path | str | None = None,
        on_part: OnPart | None = None,
    ) -> Iterator[Continuation]:
        """The same for any number of prompts that share their passes, up to `batch` of them at a time.

        Yields each as soon as it is done, with its `index` among the prompts; its tokens are those of its own run.
        Without `batch`, as many at a time as the RAM suggests. Raises what `generate` raises, before the first pass.
        """
        requests = [self.request(prompt, max_new_tokens) for prompt in prompts]
        return Batch(self, requests, batch, speculate, draft, on_part).run() if requests else iter(())

    def request(self, prompt_or_ids: str | Sequence[int], max_new_tokens: int) -> Request:
        """A prompt's ids, checked. Raises `BloomdeskError` as `generate` does."""
        is_text = isinstance(prompt_or_ids, str)
        ids = self.tokenizer.encode(prompt_or_ids) if is_text else [int(i) for i in prompt_or_ids]
        if not ids:
            raise BloomdeskError("the prompt has no tokens", "give a prompt of at least one character")
        outside = [i for i in ids if not 0 <= i < self.weights.model.vocab_size]
        if outside:
            raise BloomdeskError(
                f"token id {outside[0]} is outside the vocabulary of {self.weights.model.vocab_size:,}"
            )
        if max_new_tokens < 1:
            raise BloomdeskError(f"the number of new tokens must be at least 1, found {max_new_tokens}")
        return Request(ids, max_new_tokens)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on the caller's thread alone, for the small operations between the products.

    Its other threads would keep a core busy with waiting for the next of these, which the kernel's threads need.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
