"""A prepared BLOOM as a model of transformers, for `generate()`, `pipeline()` and what builds on them.

    model = BloomdeskForCausalLM.from_prepared("bloom", ram="12GB")
    model.generate(**tokenizer("Hello", return_tensors="pt"), num_beams=4)

Logits are the runner's. Each row of a batch is a sequence of its own, so padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.bloom.configuration_bloom import BloomConfig

import runner
from runner.errors import BloomdeskError
from runner.format.layout import GENERATION_CONFIG
from runner.generation.memory_plan import MemoryRequest, memory_plan
from runner.generation.model import Model
from runner.model.kv_cache import KVCache, Segment
from runner.units import parse_size

# Positions that a new cache has beyond its first rows; a cache that is full becomes twice as large.
FIRST_ROOM = 256


class RunnerCache:
    """The KV caches of the rows of a batch, with the few methods by which transformers handles a cache.

    `masks` say of each row's positions whether they hold a token; padding has no place in a KV cache.
    """

    is_compileable = False
    layers: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.caches: list[KVCache | None] = []
        self.masks: list[list[bool]] = []

    def take(self, rows: int) -> None:
        """Become the cache of a batch of `rows` rows, which the first pass decides."""
        if not self.caches:
            self.caches = [None] * rows
            self.masks = [[] for _ in range(rows)]
        elif len(self.caches) != rows:
            raise BloomdeskError(f"the cache is of {len(self.caches)} rows, and the batch has {rows}")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions so far, padding included."""
        return len(self.masks[0]) if self.masks else 0

    def crop(self, change: int) -> None:
        """Forget the last `-change` positions. Raises ValueError if `change` is above 0."""
        if change > 0:
            raise ValueError(f"a cache is cropped by a number of positions below 0, found {change}")
        length = self.get_seq_length() + change
        for row, mask in enumerate(self.masks):
            self.masks[row] = mask[:length]
            if cache := self.caches[row]:
                cache.rewind(min(cache.length, sum(mask[:length])))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Continue from row `beam_idx[i]` in row i."""
        chosen, taken = beam_idx.tolist(), set[int]()
        caches = []
        for row in chosen:
            # A cache that several beams continue is copied for all but one.
            caches.append(deepcopy_of(self.caches[row]) if row in taken else self.caches[row])
            taken.add(row)
        self.caches, self.masks = caches, [list(self.masks[row]) for row in chosen]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.reorder_cache(torch.arange(len(self.caches)).repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, Any]) -> RunnerCache:
        found = RunnerCache()
        found.caches = [deepcopy_of(cache) for cache in self.caches]
        found.masks = [list(mask) for mask in self.masks]
        return found

    def activate_past_recording(self) -> None:
        """Nothing to do: any position can be gone back to."""

    def reset(self) -> None:
        """Forget all positions."""
        self.crop(-self.get_seq_length())


def deepcopy_of(cache: KVCache | None) -> KVCache | None:
    """A copy of a cache, with the kernel of the original."""
    return deepcopy(cache, {id(block.kernel): block.kernel for block in cache.blocks}) if cache else None


class BloomdeskConfig(BloomConfig):
    """BLOOM's own, under a name that transformers' pipelines know this model by."""

    model_type = "bloomdesk"


class BloomdeskForCausalLM(PreTrainedModel, GenerationMixin):
    """A prepared checkpoint with transformers' interface; it has no parameters of its own."""

    config_class = BloomdeskConfig
    main_input_name = "input_ids"

    def __init__(self, config: BloomdeskConfig, model: Model) -> None:
        super().__init__(config)
        self.runner = model
        self._request: MemoryRequest | None = None

    @classmethod
    def from_prepared(
        cls, directory: str | Path, ram: str | int | None = None, also: Sequence[str | Path] = ()
    ) -> BloomdeskForCausalLM:
        """The model in a prepared directory; `ram` limits the bytes of the process, or is a size like "12GB".

        `also` are directories of a model on several disks that have moved. Raises `BloomdeskError` if the directory is
        not a sound, complete prepared checkpoint.
        """
        model = runner.load(directory, parse_size(ram) if isinstance(ram, str) else ram, also=also)
        recorded, _ = BloomConfig.get_config_dict(directory)
        config = BloomdeskConfig.from_dict({**recorded, "model_type": BloomdeskConfig.model_type})
        config.dtype = model.weights.dtype
        found = cls(config, model)
        if (Path(directory) / GENERATION_CONFIG).exists():
            found.generation_config = GenerationConfig.from_pretrained(directory)
        else:
            found.generation_config = GenerationConfig.from_model_config(config)
        return found.eval()

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> BloomdeskForCausalLM:
        """Raises `BloomdeskError`: a prepared directory is no checkpoint of transformers."""
        raise BloomdeskError(
            "a prepared directory is opened by from_prepared", 'from_prepared(DST, ram="12GB")'
        )

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raises `BloomdeskError`: there are no parameters here that could be saved."""
        raise BloomdeskError(
            "the weights are in the prepared directory, and not in this object",
            "bloomdesk export DST HUB_DIR",
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.weights.dtype

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Put a cache of the runner's kind into `model_kwargs`, where `generate` would put its own."""
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RunnerCache()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RunnerCache | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], or of the positions `logits_to_keep`; those of padding are zeros.

        `attention_mask` [B, S] is 0 for padding, of which S also covers the positions in the cache.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise BloomdeskError("embeddings cannot be given", "give input_ids")
        if input_ids.dim() != 2:
            raise BloomdeskError(f"input_ids must be [batch, tokens], found {[*input_ids.shape]}")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise BloomdeskError(f"{name} cannot be had: a pass keeps nothing of them", "leave it out")
        if past_key_values is not None and not isinstance(past_key_values, RunnerCache):
            raise BloomdeskError(
                f"past_key_values must be what the model has returned, found {type(past_key_values).__name__}",
                "leave it out",
            )
        rows, new = input_ids.shape
        cache = RunnerCache() if past_key_values is None else past_key_values
        cache.take(rows)
        start = cache.get_seq_length()
        mask = torch.ones(rows, start + new) if attention_mask is None else attention_mask
        if mask.dim() != 2 or mask.shape != (rows, start + new):
            raise BloomdeskError(f"the attention mask must be {[rows, start + new]}, found {[*mask.shape]}")
        if attention_mask is not None and start and mask[:, :start].bool().tolist() != cache.masks:
            raise BloomdeskError(
                "the attention mask differs from that of the positions in the cache",
                "leave out past_key_values",
            )
        is_token = mask[:, start:].bool()
        positions = torch.arange(new)
        kept = positions[-logits_to_keep:] if isinstance(logits_to_keep, int) else positions[logits_to_keep]
        segments = self._segments(input_ids, is_token, kept, cache)
        found = self.runner.forward_all(list(segments.values())) if segments else []
        for row, tokens in enumerate(is_token.tolist()):
            cache.masks[row] += tokens
        logits = torch.zeros(rows, new, self.config.vocab_size, dtype=self.dtype)
        for (row, segment), own in zip(segments.items(), found, strict=True):
            places = is_token[row].nonzero().flatten()
            logits[row, places[len(places) - segment.logits :]] = own
        logits = logits[:, kept]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        uses_cache = self.config.use_cache if use_cache is None else use_cache
        return CausalLMOutputWithPast(loss, logits, cache if uses_cache else None)

    def _segments(
        self, input_ids: torch.Tensor, is_token: torch.Tensor, kept: torch.Tensor, cache: RunnerCache
    ) -> dict[int, Segment]:
        """The tokens of each row of the batch that has any, with as many rows of logits as are kept."""
        ids = [input_ids[row][is_token[row]].tolist() for row in range(len(input_ids))]
        if outside := [i for own in ids for i in own if not 0 <= i < self.config.vocab_size]:
            raise BloomdeskError(
                f"token id {outside[0]} is outside the vocabulary of {self.config.vocab_size:,}"
            )
        needed = [
            len(own) + (held.length if held else 0) for own, held in zip(ids, cache.caches, strict=True)
        ]
        first = int(kept.min()) if len(kept) else input_ids.shape[1]
        logits = [int(is_token[row, first:].sum()) for row in range(len(ids))]
        capacities = [
            held.capacity if held and held.capacity >= length else max(2 * length, length + FIRST_ROOM)
            for length, held in zip(needed, cache.caches, strict=True)
        ]
        self._arrange(capacities, sum(map(len, ids)), sum(logits))
        for row, (capacity, held) in enumerate(zip(capacities, cache.caches, strict=True)):
            if held is None or held.capacity < capacity:
                cache.caches[row] = self._grown(held, capacity)
        return {row: Segment(own, cache.caches[row], logits[row]) for row, own in enumerate(ids) if own}

    def _arrange(self, capacities: Sequence[int], rows: int, logit_rows: int) -> None:
        """Arrange the weights beside these caches and passes, unless the plan of an earlier pass has room for them."""
        before = self._request
        asked = self.runner.memory_request(sorted(capacities, reverse=True), max(1, rows))
        wanted = replace(asked, logit_rows=max(1, logit_rows))
        if before and before.cache >= wanted.cache and before.activations >= wanted.activations:
            return
        plan = memory_plan(wanted)
        self.runner.weights.stream.arrange(plan.resident, plan.buffers)
        self._request = wanted

    def _grown(self, held: KVCache | None, capacity: int) -> KVCache:
        """A cache for `capacity` positions with what `held` has."""
        grown = self.runner.new_cache(capacity)
        if held is not None:
            for old, new in zip(held.blocks, grown.blocks, strict=True):
                new.keys[:, : held.length] = old.keys[:, : held.length]
                new.values[:, :, : held.length] = old.values[:, :, : held.length]
            grown.length = held.length
        return grown


AutoConfig.register(BloomdeskConfig.model_type, BloomdeskConfig)
AutoModelForCausalLM.register(BloomdeskConfig, BloomdeskForCausalLM)
