"""One pass through all parts, over segments of any number of sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from runner.kernel.threads import one_thread
from runner.model import bloom
from runner.model.gather import ALONE, Gather
from runner.model.kv_cache import CacheShape, JoinedValues, KVCache, OwnHeads, Segment, whole_lanes
from runner.weights.checkpoint import Weights

# Called after each part of a pass with the number of parts done and of all parts.
OnPart = Callable[[int, int], None]


class Arrangement(Protocol):
    """The indices of the chunks that stay in RAM, and the number of buffers for the others."""

    @property
    def resident(self) -> frozenset[int]: ...

    @property
    def buffers(self) -> int: ...


@dataclass(frozen=True)
class ModelRunner:
    """Opened weights, and the pass through them, with what other processes compute of it."""

    weights: Weights

    @property
    def cache_shape(self) -> CacheShape:
        """The shape of KV caches here."""
        model = self.weights.model
        return OwnHeads(model.n_layer, len(self.weights.heads), model.head_dim)

    @property
    def gather(self) -> Gather:
        """What other processes compute of a pass comes from it."""
        return ALONE

    def arrange(self, plan: Arrangement) -> None:
        """Keep chunks in RAM as `plan` says, from the next pass on."""
        self.weights.stream.arrange(plan.resident, plan.buffers)

    def new_cache(self, capacity: int, prefix: KVCache | None = None, *, is_prefix: bool = False) -> KVCache:
        """An empty KV cache for `capacity` positions, the first of them `prefix`'s; its memory must be in the plan."""
        weights = self.weights
        return KVCache(self.cache_shape, capacity, weights.dtype, weights.kernel, prefix, is_prefix=is_prefix)

    def forward(
        self, ids: Sequence[int], cache: KVCache, *, all_rows: bool = False, on_part: OnPart | None = None
    ) -> torch.Tensor:
        """Logits of a pass over one sequence: [1, V] of the last row, or [T, V] with `all_rows`; see `forward_all`."""
        return self.forward_all([Segment(ids, cache, len(ids) if all_rows else 1)], on_part)[0]

    @torch.inference_mode()
    def forward_all(self, segments: Sequence[Segment], on_part: OnPart | None = None) -> list[torch.Tensor]:
        """Logits [n, V] of each segment, in the model's dtype; its ids are appended to its cache.

        They have the bits that the sequence's own pass would give. A segment that fills a prefix stands before those
        of the sequences that share it. A pass that ends with an exception has changed no cache. Raises ValueError if a
        cache is too small or its prefix is not full, and `BloomdeskError` if a part cannot be read or was changed since
        it was opened.
        """
        lengths: dict[KVCache, int] = {}
        for segment in segments:
            cache, prefix = segment.cache, segment.cache.prefix
            if segment.length > cache.capacity:
                raise ValueError(f"{segment.length} positions do not fit a cache of {cache.capacity}")
            if prefix and lengths.get(prefix, prefix.length) != prefix.capacity:
                raise ValueError("a prefix must be full before its sequences are read")
            lengths[cache] = segment.length
        for cache in lengths:
            cache.drop_guesses()
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
        model, weights, gather = self.weights.model, self.weights, self.gather
        longest, heads = max(segment.length for segment in segments), weights.heads
        alibi = bloom.alibi_bias(model.n_head, whole_lanes(longest), weights.dtype)[heads.start : heads.stop]
        sharing = [segment.length for segment in segments if segment.cache.is_joined]
        joined = JoinedValues(self.cache_shape, max(sharing), weights.dtype) if sharing else None
        attended, last = [], 0
        for segment in segments:
            values = joined if segment.cache.is_joined else None
            metadata = bloom.AttentionMetadata.of(segment, last, len(heads), values)
            attended.append(metadata)
            last += len(segment.ids)
        x = bloom.embed([i for segment in segments for i in segment.ids], weights.embedding, model, gather)
        blocks = zip(weights.blocks, *(segment.cache.blocks for segment in segments), strict=True)
        # The embedding, the blocks, and the final LayerNorm with the head.
        parts = model.n_layer + 2
        for index, (block, *caches) in enumerate(blocks):
            x = bloom.block_forward(x, block, caches, attended, alibi, model, gather)
            if on_part:
                on_part(index + 2, parts)
        counts = [segment.logits for segment in segments]
        kept = torch.cat(
            [x[each.last - count : each.last] for each, count in zip(attended, counts, strict=True)]
        )
        if not len(kept):  # only the first rows of prompts: the head is not even read
            return list(torch.empty(0, model.vocab_size, dtype=weights.dtype).split(counts))
        logits = bloom.head(kept, weights.final_layernorm, weights.head, model, gather).to(weights.dtype)
        if on_part:
            on_part(parts, parts)
        return list(logits.split(counts))
