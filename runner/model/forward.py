"""One pass through all parts, over segments of any number of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from runner.model import bloom
from runner.model.kv_cache import KVCache, Segment, whole_lanes
from runner.weights.checkpoint import Weights

# Called after each part of a pass with the number of parts done and of all parts.
OnPart = Callable[[int, int], None]


@dataclass(frozen=True)
class ModelRunner:
    """Opened weights, and the pass through them."""

    weights: Weights

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` positions; its memory must be in the plan already."""
        return KVCache(self.weights.model, capacity, self.weights.dtype, self.weights.kernel)

    def forward(
        self, ids: Sequence[int], cache: KVCache, *, all_rows: bool = False, on_part: OnPart | None = None
    ) -> torch.Tensor:
        """Logits of a pass over one sequence: [1, V] of the last row, or [T, V] with `all_rows`; see `forward_all`."""
        return self.forward_all([Segment(ids, cache, len(ids) if all_rows else 1)], on_part)[0]

    @torch.inference_mode()
    def forward_all(self, segments: Sequence[Segment], on_part: OnPart | None = None) -> list[torch.Tensor]:
        """Logits [n, V] of each segment, in the model's dtype; its ids are appended to its cache.

        They have the bits that the sequence's own pass would give. A pass that ends with an exception has changed no
        cache. Raises ValueError if a cache is too small, and `BloomdeskError` if a part cannot be read or was changed
        since it was opened.
        """
        for segment in segments:
            if segment.length > segment.cache.capacity:
                raise ValueError(f"{segment.length} positions do not fit a cache of {segment.cache.capacity}")
        try:
            with one_thread():
                logits = self._through_parts(segments, on_part)
        except BaseException:
            for segment in segments:
                segment.cache.clear(segment.cache.length, segment.length)
            raise
        for segment in segments:
            segment.cache.length = segment.length
        return logits

    def _through_parts(self, segments: Sequence[Segment], on_part: OnPart | None) -> list[torch.Tensor]:
        model, weights = self.weights.model, self.weights
        longest = max(segment.length for segment in segments)
        alibi = bloom.alibi_bias(model.n_head, whole_lanes(longest), weights.dtype)
        attended, last = [], 0
        for segment in segments:
            attended.append(bloom.AttentionMetadata.of(segment, last, model.n_head, weights.dtype))
            last += len(segment.ids)
        x = bloom.embed([i for segment in segments for i in segment.ids], weights.embedding, model)
        blocks = zip(weights.blocks, *(segment.cache.blocks for segment in segments), strict=True)
        # The embedding, the blocks, and the final LayerNorm with the head.
        parts = model.n_layer + 2
        for index, (block, *caches) in enumerate(blocks):
            x = bloom.block_forward(x, block, caches, attended, alibi, model)
            if on_part:
                on_part(index + 2, parts)
        counts = [segment.logits for segment in segments]
        kept = torch.cat(
            [x[each.last - count : each.last] for each, count in zip(attended, counts, strict=True)]
        )
        if not len(kept):  # only the first rows of prompts: the head is not even read
            return list(kept.new_empty(0, model.vocab_size).split(counts))
        logits = bloom.head(kept, weights.final_layernorm, weights.head, model.layer_norm_epsilon)
        if on_part:
            on_part(parts, parts)
        return list(logits.split(counts))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's small operations between the products on the caller's thread alone.

    Torch's other threads would spin between these operations, on cores that the kernel's threads need.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
