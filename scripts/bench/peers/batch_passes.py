"""bloomdesk's passes over several prompts at a time, each timed, with what was proposed: no peer, as one_row_passes.

`--set` takes batch=N, speculate=lookup|off, draft=DIR, temperature=T and seed=N. The N prompts are made of the given
one: as long, and different; prompts=FILE.json has others, of which N go at a time. weights=BYTES is the RAM beside what
the process and its passes take, and chunk=BYTES the largest chunk, for small models.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import runner
from runner.generation.batch import Batch
from runner.generation.model import Model
from runner.generation.options import GenerationOptions, Sampling
from runner.generation.sequence import Request
from runner.generation.speculation.policy import MOST_DRAFT_TOKENS
from runner.system.memory import bytes_read_from_disk
from runner.weights import chunks
from scripts.bench.peers.passes import Task, main

# From an id of one prompt to that of the next; prime, so that no two prompts of a batch are equal.
STEP = 7919


def peer(given: Task) -> tuple[Batch, Callable[[], dict[str, Any]]]:
    settings = given.settings
    if "chunk" in settings:
        chunks.LARGEST_CHUNK = int(settings["chunk"])
    model = runner.load(given.checkpoint, given.ram)
    vocabulary = model.weights.model.vocab_size
    count = int(settings.get("batch", 1))
    prompts = [[(i + STEP * number) % vocabulary for i in given.prompt] for number in range(count)]
    if "prompts" in settings:
        prompts = json.loads(Path(settings["prompts"]).read_text())
    temperature = float(settings.get("temperature", 0))
    sampling = Sampling(temperature, seed=int(settings.get("seed", 0))) if temperature else Sampling()
    requests = [
        request
        for number, prompt in enumerate(prompts)
        for request in model.requests(prompt, given.tokens, sampling, number)
    ]
    if "weights" in settings:
        model = with_ram_for(model, requests, count, int(settings["weights"]))
    options = GenerationOptions(given.tokens, settings.get("speculate", "off"), settings.get("draft"), count)
    running = model.batch(requests, options)
    plan = running.plan
    return running, lambda: {
        "ids": [list(each.ids) for each in running.sequences],
        **{name: getattr(running, name) for name in ("proposed", "accepted", "drafting_seconds")},
        "streamed_bytes": model.weights.stream.streamed_bytes,
        "draft_bytes": plan.request.draft,
        "batch": plan.request.batch,
    }


def with_ram_for(model: Model, requests: Sequence[Request], batch: int, nbytes: int) -> Model:
    """The model with `nbytes` of RAM beside what passes of `batch` requests with draft tokens take."""
    longest, rows = max(request.capacity for request in requests), batch * (1 + MOST_DRAFT_TOKENS)
    needed = replace(model.memory_request([longest] * batch, rows), logit_rows=rows)
    return replace(model, ram=needed.ram - needed.spare + nbytes)


def measured(running: Batch, count: int) -> dict[str, Any]:
    """Every pass: seconds, bytes from disk, new tokens, and whether it carried rows of a prompt."""
    passes = []
    while running.active or running.waiting:
        begun = sum(bool(each.ids) for each in running.sequences)
        before, tokens, start = bytes_read_from_disk() or 0, running.tokens, time.perf_counter()
        running.step()
        seconds = time.perf_counter() - start
        passes.append(
            {
                "seconds": seconds,
                "read_bytes": (bytes_read_from_disk() or 0) - before,
                "tokens": running.tokens - tokens,
                # The first part of a long prompt gives no token.
                "prompt": sum(bool(each.ids) for each in running.sequences) > begun
                or running.tokens == tokens,
            }
        )
    return {"passes": passes}


if __name__ == "__main__":
    main(peer, measured)
