"""AirLLM: a block at a time from files of its own, the next loaded while one runs; the embedding stays in RAM."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from airllm.airllm_base import AirLLMBaseModel

from scripts.bench.peers.passes import measure, report, task


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


@torch.inference_mode()
def generate(model: AirLLMBloom, prompt: list[int]) -> Iterator[int]:
    ids, cache = prompt, None
    while True:
        output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = [int(output.logits[0, -1].float().argmax())]
        yield ids[0]


def main() -> None:
    given = task()
    torch.set_num_threads(given.threads)
    prefetching = given.settings.get("prefetching", "1") == "1"
    with contextlib.redirect_stdout(sys.stderr):
        model = AirLLMBloom(
            str(given.checkpoint), device="cpu", dtype=torch.bfloat16, prefetching=prefetching
        )
        measured = measure(generate(model, given.prompt), given.tokens)
    report(measured, settings={"prefetching": prefetching})


if __name__ == "__main__":
    main()
