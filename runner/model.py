"""A prepared BLOOM, opened: its weights and tokenizer, its share of the RAM, and one pass through all parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from runner import bloom, budget, system
from runner.budget import Budget
from runner.decode import Generation
from runner.errors import BloomdeskError
from runner.kv_cache import KVCache, whole_lanes
from runner.prepared import Hyperparameters
from runner.stream import slot_bytes
from runner.tokenizer import Tokenizer
from runner.weights import TORCH_DTYPES, Weights

# Called after each part of a pass with the parts done and the parts in all.
OnPart = Callable[[int, int], None]


def shares(
    model: Hyperparameters, pieces: Sequence[int], ram: int, process_nbytes: int, capacity: int, rows: int
) -> Budget:
    """How `ram` bytes are shared out for a model whose matrices are in pieces of these sizes; see `Model.budget`."""
    dtype = TORCH_DTYPES[model.dtype]
    return budget.share_out(
        ram,
        process_nbytes,
        KVCache.nbytes(model, capacity, dtype),
        budget.activation_bytes(model, rows, capacity, dtype.itemsize),
        pieces,
        max(map(slot_bytes, pieces)),
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
        weights = Weights.open(directory)
        tokenizer = Tokenizer(directory / "tokenizer.json")
        return cls(weights, tokenizer, ram or budget.default_total(), system.memory_in_use())

    def budget(self, capacity: int, rows: int) -> Budget:
        """How the RAM is shared out for passes of up to `rows` rows and `capacity` positions in the cache.

        Raises `BloomdeskError` where it is too little for that.
        """
        pieces = [piece.nbytes for piece in self.weights.stream.pieces]
        return shares(self.weights.model, pieces, self.ram, self.process_nbytes, capacity, rows)

    def cache(self, capacity: int, rows: int | None = None) -> KVCache:
        """An empty KV cache for `capacity` positions, with the RAM shared out for it.

        A pass may have up to `rows` rows; without it, as many as the cache has positions.
        """
        shared = self.budget(capacity, capacity if rows is None else rows)
        self.weights.stream.arrange(shared.resident, shared.slots)
        return KVCache(self.weights.model, capacity, self.weights.dtype, self.weights.kernel)

    @torch.inference_mode()
    def forward(
        self, ids: Sequence[int], cache: KVCache, *, all_rows: bool = False, on_part: OnPart | None = None
    ) -> torch.Tensor:
        """One pass: append `ids` (T tokens) to the cache and return logits.

        [1, V], those of the last row, or [T, V] with `all_rows`; in the model's dtype. A pass that an exception
        ended has added nothing to the cache. Raises ValueError where the cache has no room for `ids`, and
        `BloomdeskError` where a part cannot be read or was changed since it was opened.
        """
        length = cache.length + len(ids)
        if length > cache.capacity:
            raise ValueError(f"{length} positions do not fit a cache of {cache.capacity}")
        with _one_thread():
            return self._forward(ids, cache, all_rows, on_part)

    def _forward(
        self, ids: Sequence[int], cache: KVCache, all_rows: bool, on_part: OnPart | None
    ) -> torch.Tensor:
        model, weights = self.weights.model, self.weights
        rows, length = len(ids), cache.length + len(ids)
        seen = whole_lanes(length)
        alibi = bloom.alibi_bias(model.n_head, seen, weights.dtype)
        mask = bloom.causal_mask(rows, length, seen, weights.dtype)
        x = bloom.embed(ids, weights.embedding, model)
        for index, (block, block_cache) in enumerate(zip(weights.blocks, cache.blocks, strict=True)):
            x = bloom.block_forward(x, block, block_cache, cache.length, alibi, mask, model)
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
        vocabulary, a `max_new_tokens` below 1, or where the RAM is too little.
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
