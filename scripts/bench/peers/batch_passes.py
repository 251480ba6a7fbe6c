"""bloomdesk's passes over several prompts at a time, each timed, with what was proposed: no peer, as one_row_passes.

`--set` takes batch=N, speculate=lookup|off and draft=DIR. The N prompts are made of the given one: as long, and
different.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import runner
from runner.generation.batch import Batch
from runner.generation.options import GenerationOptions
from runner.system.memory import bytes_read_from_disk
from scripts.bench.peers.passes import Task, main

# From an id of one prompt to that of the next; prime, so that no two prompts of a batch are equal.
STEP = 7919


def peer(given: Task) -> tuple[Batch, Callable[[], dict[str, Any]]]:
    model = runner.load(given.checkpoint, given.ram)
    vocabulary = model.weights.model.vocab_size
    count = int(given.settings.get("batch", 1))
    prompts = [[(i + STEP * number) % vocabulary for i in given.prompt] for number in range(count)]
    requests = [model.requests(prompt, given.tokens)[0] for prompt in prompts]
    draft = given.settings.get("draft")
    options = GenerationOptions(given.tokens, given.settings.get("speculate", "off"), draft, count)
    running = model.batch(requests, options)
    in_a_pass = running.plan.request.batch
    return running, lambda: {
        "ids": [list(each.ids) for each in running.sequences],
        **{name: getattr(running, name) for name in ("proposed", "accepted", "drafting_seconds")},
        "streamed_bytes": model.weights.stream.streamed_bytes,
        "batch": in_a_pass,
    }


def measured(running: Batch, count: int) -> dict[str, Any]:
    """Every pass: seconds, bytes from disk, new tokens, and whether it carried rows of a prompt."""
    passes = []
    while running.active or running.waiting:
        prompt = not all(each.ids for each in running.sequences)
        before, tokens, start = bytes_read_from_disk() or 0, running.tokens, time.perf_counter()
        running.step()
        passes.append(
            {
                "seconds": time.perf_counter() - start,
                "read_bytes": (bytes_read_from_disk() or 0) - before,
                "tokens": running.tokens - tokens,
                "prompt": prompt,
            }
        )
    return {"passes": passes}


if __name__ == "__main__":
    main(peer, measured)
