"""AirLLM: a block at a time from files of its own, the next loaded while one runs; the embedding stays in RAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from airllm.airllm_base import AirLLMBaseModel

from scripts.bench.peers.passes import Task, main
from scripts.bench.peers.with_transformers import generate


class AirLLMBloom(AirLLMBaseModel):
    """AirLLM with BLOOM's names of modules, which it does not know by itself."""

    def set_layer_names_dict(self) -> None:
        self.layer_names_dict = {
            "embed": "transformer.word_embeddings",
            "layer_prefix": "transformer.h",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "resident": ["transformer.word_embeddings_layernorm"],
        }


def peer(given: Task) -> tuple[Iterator[int], Callable[[], dict[str, Any]]]:
    prefetching = given.settings.get("prefetching", "1") == "1"
    model = AirLLMBloom(str(given.checkpoint), device="cpu", dtype=torch.bfloat16, prefetching=prefetching)
    return generate(model, given.prompt), lambda: {"settings": {"prefetching": prefetching}}


if __name__ == "__main__":
    main(peer)
