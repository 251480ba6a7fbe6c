"""bloomdesk's passes one by one, with what its stream counts: no peer, but what shows how passes grow.

The prompt goes through in slices, so that a long one needs no more RAM than a short one. No </s> ends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import Any

import torch

import runner
from runner.generation.model import Model
from runner.model.kv_cache import KVCache
from scripts.bench.peers.passes import measure, report, task

SLICE = 256


def passes(
    model: Model, cache: KVCache, prompt: Sequence[int], rows: int, counts: list[dict[str, Any]]
) -> Iterator[int]:
    """The greedy token of the whole prompt, then of each pass of one row; the stream's counters after each."""
    ids = list(prompt)
    while True:
        for first in range(0, len(ids), rows):
            logits = model.forward(ids[first : first + rows], cache)
        ids = [int(logits[-1].float().argmax())]
        counts.append(asdict(model.weights.stream.traffic))
        yield ids[0]


def grown(counts: Sequence[dict[str, Any]], name: str) -> list[float]:
    """By how much a counter grew in each pass of one row."""
    values = [count[name] for count in counts]
    return [after - before for before, after in pairwise(values)]


def main() -> None:
    given = task()
    torch.set_num_threads(given.threads)
    model = runner.load(given.checkpoint, given.ram)
    rows = min(len(given.prompt), int(given.settings.get("slice", SLICE)))
    capacity = len(given.prompt) + given.tokens
    cache = model.cache(capacity, rows=rows)
    counts: list[dict[str, Any]] = []
    measured = measure(passes(model, cache, given.prompt, rows, counts), given.tokens)
    stream = model.weights.stream
    report(
        measured,
        streamed_bytes=median(grown(counts, "bytes_streamed")),
        waiting_seconds=grown(counts, "waiting_seconds"),
        reading_seconds=grown(counts, "reading_seconds"),
        weights_bytes=model.weights.nbytes,
        resident_bytes=sum(chunk.nbytes for chunk in stream.chunks) - stream.streamed_bytes,
        process_bytes=model.process_nbytes,
        cache_bytes=KVCache.nbytes(model.weights.model, capacity, model.weights.dtype),
        settings={"ram": given.ram, "slice": rows},
    )


if __name__ == "__main__":
    main()
