"""llama.cpp through llama-cpp-python, on a mapped GGUF file in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp
import numpy as np

from scripts.bench.peers.passes import Task, main


def generate(model: llama_cpp.Llama, prompt: list[int]) -> Iterator[int]:
    ids = prompt
    while True:
        model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        ids = [int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())]
        yield ids[0]


def peer(given: Task) -> tuple[Iterator[int], Callable[[], dict[str, Any]]]:
    settings = {"use_mmap": 1, "use_mlock": 0, "flash_attn": 0, "n_batch": 512, "numa": 0}
    settings |= {name: int(value) for name, value in given.settings.items()}
    model = llama_cpp.Llama(
        str(given.checkpoint),
        n_ctx=len(given.prompt) + given.tokens,
        n_threads=given.threads,
        n_threads_batch=given.threads,
        verbose=False,
        **{name: value if name == "n_batch" else bool(value) for name, value in settings.items()},
    )
    return generate(model, given.prompt), lambda: {"settings": settings}


if __name__ == "__main__":
    main(peer)
