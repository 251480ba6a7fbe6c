"""A prepared BLOOM, opened: its weights and tokenizer, and one pass through all parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runner import bloom
from runner.decode import Generation
from runner.errors import BloomdeskError
from runner.kv_cache import KVCache
from runner.tokenizer import Tokenizer
from runner.weights import Weights

# Called after each part of a pass with the parts done and the parts in all.
OnPart = Callable[[int, int], None]


@dataclass(frozen=True)
class Model:
    """What `runner.load` gives."""

    weights: Weights
    tokenizer: Tokenizer

    @classmethod
    def open(cls, directory: Path) -> Model:
        """Raises `BloomdeskError` where the directory is no sound, complete prepared checkpoint."""
        return cls(Weights.open(directory), Tokenizer(directory / "tokenizer.json"))

    def cache(self, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` positions."""
        return KVCache(self.weights.model, capacity, self.weights.dtype)

    @torch.inference_mode()
    def forward(
        self, ids: Sequence[int], cache: KVCache, *, all_rows: bool = False, on_part: OnPart | None = None
    ) -> torch.Tensor:
        """One pass: append `ids` (T tokens) to the cache and return logits.

        [1, V], those of the last row, or [T, V] with `all_rows`; in the model's dtype. A pass that an exception
        ended has added nothing to the cache. Raises ValueError where the cache has no room for `ids`.
        """
        model, weights = self.weights.model, self.weights
        rows, length = len(ids), cache.length + len(ids)
        if length > cache.capacity:
            raise ValueError(f"{length} positions do not fit a cache of {cache.capacity}")
        alibi = bloom.alibi_bias(model.n_head, length, weights.dtype)
        mask = bloom.causal_mask(rows, length, weights.dtype)
        x = bloom.embed(torch.tensor(ids), weights.embedding, model)
        for index, (block, block_cache) in enumerate(zip(weights.blocks, cache.blocks, strict=True)):
            x = bloom.block_forward(x, block, block_cache, alibi, mask, model)
            if on_part:
                on_part(index + 1, model.n_layer + 1)
        kept = x if all_rows else x[-1:]
        logits = bloom.head(kept, weights.final_layernorm, weights.embedding, model.layer_norm_epsilon)
        if on_part:
            on_part(model.n_layer + 1, model.n_layer + 1)
        cache.length = length
        return logits

    def generate(
        self, prompt_or_ids: str | Sequence[int], *, max_new_tokens: int = 64, on_part: OnPart | None = None
    ) -> Generation:
        """Greedy continuation: an iterator of token ids that ends with `</s>` or after `max_new_tokens`.

        Each step of the iterator is one pass. Raises `BloomdeskError` for an empty prompt, an id outside the
        vocabulary, or a `max_new_tokens` below 1.
        """
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
        return Generation(self, ids, max_new_tokens, on_part)
