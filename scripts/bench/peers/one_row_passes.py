"""bloomdesk's passes one by one, with what its stream counts: no peer, but what shows how passes grow.

The prompt goes through in slices, so that a long one needs no more RAM than a short one. No </s> ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import Any

import runner
from runner.model.kv_cache import KVCache
from scripts.bench.peers.passes import Task, main

SLICE = 256


def peer(given: Task) -> tuple[Iterator[int], Callable[[], dict[str, Any]]]:
    model = runner.load(given.checkpoint, given.ram)
    rows = min(len(given.prompt), int(given.settings.get("slice", SLICE)))
    capacity = len(given.prompt) + given.tokens
    cache, stream = model.cache(capacity, rows=rows), model.weights.stream
    counts: list[dict[str, Any]] = []  # the stream's counters after each pass

    def passes() -> Iterator[int]:
        """The greedy token of the whole prompt, then of each pass of one row."""
        ids = given.prompt
        while True:
            for first in range(0, len(ids), rows):
                logits = model.forward(ids[first : first + rows], cache)
            ids = [int(logits[-1].float().argmax())]
            counts.append(asdict(stream.traffic))
            yield ids[0]

    def grown(name: str) -> list[float]:
        """By how much a counter grew in each pass of one row."""
        return [after[name] - before[name] for before, after in pairwise(counts)]

    def facts() -> dict[str, Any]:
        return {
            "streamed_bytes": median(grown("bytes_streamed")),
            "waiting_seconds": grown("waiting_seconds"),
            "reading_seconds": grown("reading_seconds"),
            "weights_bytes": model.weights.nbytes,
            "resident_bytes": sum(chunk.nbytes for chunk in stream.chunks) - stream.streamed_bytes,
            "process_bytes": model.process_nbytes,
            "cache_bytes": KVCache.nbytes(model.weights.model, capacity, model.weights.dtype),
            "settings": {"ram": given.ram, "slice": rows},
        }

    return passes(), facts


if __name__ == "__main__":
    main(peer)
