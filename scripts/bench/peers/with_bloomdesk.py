"""bloomdesk's own runner, on a prepared directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import runner
from scripts.bench.peers.passes import Task, main


def peer(given: Task) -> tuple[Iterator[int], Callable[[], dict[str, Any]]]:
    budget = {"ram": int(given.settings["ram"]) if "ram" in given.settings else given.ram}
    model = runner.load(given.checkpoint, **budget)
    # One token a pass, as the peers have it.
    generation = model.generate(given.prompt, max_new_tokens=given.tokens, speculate="off")
    return generation, lambda: {"streamed_bytes": generation.streamed_bytes_per_pass, "settings": budget}


if __name__ == "__main__":
    main(peer)
