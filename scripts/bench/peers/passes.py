"""What every peer does: arguments in, each pass timed, one JSON object out.

A peer is a program that opens a checkpoint and gives an iterator of token ids; each step of it is one pass, the
first one that of the prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.system.memory import bytes_read_from_disk, peak_memory

STARTED = time.perf_counter()


@dataclass(frozen=True)
class Task:
    """What a peer is asked to do. `ram` is in bytes, None where there is no limit; `settings` are the peer's own."""

    checkpoint: Path
    prompt: list[int]
    tokens: int
    ram: int | None
    threads: int
    settings: dict[str, str]


def task() -> Task:
    """The task in the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", required=True, help="token ids, with commas between them")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--ram", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    given = vars(parser.parse_args())
    settings = dict(setting.split("=", 1) for setting in given.pop("settings"))
    prompt = [int(word) for word in given.pop("prompt").split(",")]
    return Task(**given, prompt=prompt, settings=settings)


def measure(steps: Iterator[int], count: int) -> dict[str, Any]:
    """Take up to `count` tokens; seconds and bytes from disk of each pass, by the kernel's counter."""
    seconds, read, ids = [], [], []
    for _ in range(count):
        before, start = bytes_read_from_disk() or 0, time.perf_counter()
        token_id = next(steps, None)
        if token_id is None:  # it came to </s>
            break
        seconds.append(time.perf_counter() - start)
        read.append((bytes_read_from_disk() or 0) - before)
        ids.append(token_id)
    return {"seconds": seconds, "read_bytes": read, "ids": ids}


def main(
    peer: Callable[[Task], tuple[Any, Callable[[], dict[str, Any]]]],
    measure: Callable[[Any, int], dict[str, Any]] = measure,
) -> None:
    """Run a peer: it opens the checkpoint, and returns its token ids and what else it reports at the end.

    The one JSON object is on a line of its own, whatever was printed before.
    """
    import torch

    given = task()
    torch.set_num_threads(given.threads)
    steps, facts = peer(given)
    opened = time.perf_counter() - STARTED
    measured = measure(steps, given.tokens)
    report = {"load_seconds": opened, **measured, "peak_rss": peak_memory() or 0, **facts()}
    print("\n" + json.dumps(report), flush=True)
