"""The way of the tutorial of 2022: one block at a time from disk, run, dropped; no KV cache.

One transformers BloomBlock takes the weights of each block in turn, read whole with torch.load before it runs. Every
new token runs the whole sequence through all blocks again. The embedding, which is also the head, stays in memory.

Safetensors files in place of torch.save's, mapped or read, were no faster: 18.1 and 19.9 s a token, this
way 15.4, one run each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomBlock, build_alibi_tensor

from scripts.bench.peers.passes import Task, main


class Tutorial:
    """The model as the tutorial runs it, on a directory with a torch.save file for each part."""

    def __init__(self, directory: Path) -> None:
        self.config = BloomConfig.from_pretrained(directory)
        embedding = read(directory / "embedding.pt")
        self.embedding = embedding.pop("word_embeddings.weight")
        norm = {name.removeprefix("word_embeddings_layernorm."): tensor for name, tensor in embedding.items()}
        self.embedding_layernorm = self._layer_norm(norm)
        self.final_layernorm = self._layer_norm(read(directory / "final_layernorm.pt"))
        with torch.device("meta"):
            self.block = BloomBlock(self.config, layer_idx=0)
        self.block.eval()
        self.blocks = sorted(directory.glob("block_*.pt"))

    @torch.inference_mode()
    def next_token(self, ids: list[int]) -> int:
        """The greedy continuation of `ids`: one pass over all of them."""
        alibi = build_alibi_tensor(torch.ones(1, len(ids)), self.config.n_head, self.embedding.dtype)
        later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        mask = torch.zeros(1, 1, len(ids), len(ids), dtype=self.embedding.dtype)
        mask = mask.masked_fill(later, torch.finfo(mask.dtype).min)
        x = self.embedding_layernorm(nn.functional.embedding(torch.tensor([ids]), self.embedding))
        for path in self.blocks:
            self.block.load_state_dict(read(path), assign=True)
            x = self.block(x, alibi=alibi, attention_mask=mask)[0]
        logits = nn.functional.linear(self.final_layernorm(x[:, -1]), self.embedding)
        return int(logits[0].float().argmax())

    def generate(self, prompt: list[int]) -> Iterator[int]:
        ids = list(prompt)
        while True:
            ids.append(self.next_token(ids))
            yield ids[-1]

    def _layer_norm(self, state: dict[str, torch.Tensor]) -> nn.LayerNorm:
        with torch.device("meta"):
            norm = nn.LayerNorm(self.config.hidden_size, eps=self.config.layer_norm_epsilon)
        norm.load_state_dict(state, assign=True)
        return norm


def read(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def peer(given: Task) -> tuple[Iterator[int], Callable[[], dict[str, Any]]]:
    return Tutorial(given.checkpoint).generate(given.prompt), dict


if __name__ == "__main__":
    main(peer)
