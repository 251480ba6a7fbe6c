"""bloomdesk's passes over several prompts at a time, each timed, with what was proposed: no peer, as one_row_passes.

`--set` takes batch=N, speculate=lookup|off and draft=DIR. The N prompts are made of the given one: as long, and
different.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import runner
from runner.generation.batch import Batch
from runner.generation.options import GenerationOptions
from scripts.bench.peers.passes import disk_bytes, peak_rss, report, task

STEP = (
    7919  # from an id of one prompt to that of the next; prime, so that no two prompts of a batch are equal
)


def measured(running: Batch) -> list[dict[str, Any]]:
    """Every pass: seconds, bytes from disk, new tokens, and whether it carried rows of a prompt."""
    passes = []
    while running.active or running.waiting:
        begun = sum(bool(each.ids) for each in running.sequences)
        before, tokens, start = disk_bytes(), running.tokens, time.perf_counter()
        running.step()
        passes.append(
            {
                "seconds": time.perf_counter() - start,
                "read_bytes": disk_bytes() - before,
                "tokens": running.tokens - tokens,
                "prompt": begun < len(running.sequences),
            }
        )
    return passes


def main() -> None:
    given = task()
    torch.set_num_threads(given.threads)
    model = runner.load(given.checkpoint, given.ram)
    vocabulary = model.weights.model.vocab_size
    count = int(given.settings.get("batch", 1))
    prompts = [[(i + STEP * number) % vocabulary for i in given.prompt] for number in range(count)]
    requests = [model.requests(prompt, given.tokens)[0] for prompt in prompts]
    draft = given.settings.get("draft")
    options = GenerationOptions(given.tokens, given.settings.get("speculate", "off"), draft, count)
    running = model.batch(requests, options)
    in_a_pass = running.plan.request.batch
    passes = measured(running)
    report(
        {"passes": passes},
        ids=[list(each.ids) for each in running.sequences],
        proposed=running.proposed,
        accepted=running.accepted,
        drafting_seconds=running.drafting_seconds,
        streamed_bytes=model.weights.stream.streamed_bytes,
        batch=in_a_pass,
        peak_rss=peak_rss(),
    )


if __name__ == "__main__":
    main()
