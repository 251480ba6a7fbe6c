"""transformers with accelerate's disk offload: as many blocks in RAM as fit, the others from disk in every pass.

Weights in RAM are copied out of the mapped file that from_pretrained leaves them in: the page cache would not keep
them beside a stream of the others, and every pass would read everything.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import BloomForCausalLM

from scripts.bench.peers.passes import Task, main

# Python, torch, transformers, activations, the KV cache, and one block on its way.
BYTES_FOR_ALL_ELSE = 900_000_000


def blocks_that_fit(directory: Path, ram: int | None) -> tuple[int, int]:
    """How many blocks of a safetensors checkpoint may stay in RAM beside the embedding; all of them."""
    config = json.loads((directory / "config.json").read_text())
    hidden, count = config.get("n_embed") or config["hidden_size"], config["n_layer"]
    embedding, block = 2 * config["vocab_size"] * hidden, 2 * 12 * hidden * hidden
    if ram is None:
        return count, count
    return min(count, max(0, (ram - BYTES_FOR_ALL_ELSE - embedding) // block)), count


def device_map(kept: int, count: int) -> dict[str, str]:
    """Embedding, final LayerNorm and the first `kept` blocks in RAM."""
    ends = (
        "transformer.word_embeddings",
        "transformer.word_embeddings_layernorm",
        "transformer.ln_f",
        "lm_head",
    )
    blocks = {f"transformer.h.{i}": "cpu" if i < kept else "disk" for i in range(count)}
    return {**dict.fromkeys(ends, "cpu"), **blocks}


@torch.inference_mode()
def generate(model: Callable[..., Any], prompt: list[int]) -> Iterator[int]:
    """The greedy token of the prompt, then of each pass of one row."""
    ids, cache = prompt, None
    while True:
        output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = [int(output.logits[0, -1].float().argmax())]
        yield ids[0]


def peer(given: Task) -> tuple[Iterator[int], Callable[[], dict[str, Any]]]:
    kept, count = blocks_that_fit(given.checkpoint, given.ram)
    kept = min(count, int(given.settings.get("kept", kept)))
    where = {}
    if kept < count:
        offload = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, offload)
        where = {"device_map": device_map(kept, count), "offload_folder": offload}
    model = BloomForCausalLM.from_pretrained(given.checkpoint, dtype=torch.bfloat16, **where).eval()
    for parameter in model.parameters() if given.settings.get("copied", "1") == "1" else ():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return generate(model, given.prompt), lambda: {"settings": {"blocks in RAM": f"{kept} of {count}"}}


if __name__ == "__main__":
    main(peer)
