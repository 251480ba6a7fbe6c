"""bloomdesk's own runner, on a prepared directory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import torch

import runner
from scripts.bench.peers.passes import measure, report, task


def counted(generation: Any, counts: list[int]) -> Iterator[int]:
    """The token ids of a generation; after each of them, how many bytes it has taken from the files so far."""
    for token_id in generation:
        counts.append(generation.bytes_read)
        yield token_id


def streamed_bytes(generation: Any, counts: list[int]) -> float | None:
    """What a pass takes from the files, by the runner's own word."""
    planned = getattr(generation, "streamed_bytes_per_pass", None)
    steps = [after - before for before, after in pairwise(counts)]
    return median(steps) if planned is None and steps else planned


def main() -> None:
    given = task()
    torch.set_num_threads(given.threads)
    budget = {}
    if "ram" in inspect.signature(runner.load).parameters:
        budget["ram"] = int(given.settings["ram"]) if "ram" in given.settings else given.ram
    model = runner.load(given.checkpoint, **budget)
    counts: list[int] = []
    options = {"max_new_tokens": given.tokens}
    if "speculate" in inspect.signature(model.generate).parameters:
        options["speculate"] = "off"  # one token a pass, as the peers have it
    generation = model.generate(given.prompt, **options)
    measured = measure(counted(generation, counts), given.tokens)
    report(measured, streamed_bytes=streamed_bytes(generation, counts), settings=budget)


if __name__ == "__main__":
    main()
