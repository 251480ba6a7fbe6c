"""What every peer does: arguments in, each pass timed, one JSON object out.

A peer is a program that opens a checkpoint and gives an iterator of token ids; each step of it is one pass, the
first one that of the prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Take up to `count` tokens; seconds and bytes from disk of each pass, and what came before the first."""
    seconds, read, ids = [], [], []
    opened = time.perf_counter() - STARTED
    for _ in range(count):
        before, start = disk_bytes(), time.perf_counter()
        token_id = next(steps, None)
        if token_id is None:  # it came to </s>
            break
        seconds.append(time.perf_counter() - start)
        read.append(disk_bytes() - before)
        ids.append(token_id)
    return {
        "load_seconds": opened,
        "seconds": seconds,
        "read_bytes": read,
        "ids": ids,
        "peak_rss": peak_rss(),
    }


def main(peer: Callable[[Task], tuple[Iterator[int], Callable[[], dict[str, Any]]]]) -> None:
    """Run a peer: it opens the checkpoint, and returns its token ids and what else it reports at the end."""
    import torch

    given = task()
    torch.set_num_threads(given.threads)
    steps, facts = peer(given)
    measured = measure(steps, given.tokens)
    report(measured, **facts())


def report(measured: Mapping[str, Any], **more: Any) -> None:
    """Print the peer's one JSON object, on a line of its own whatever was printed before."""
    print("\n" + json.dumps({**measured, **more}), flush=True)


def disk_bytes() -> int:
    """What this process has had the disk read so far, by the kernel's counter; 0 where there is none."""
    return _number(Path("/proc/self/io"), "read_bytes")


def peak_rss() -> int:
    """The most memory this process had in place at once, pages of mapped files included."""
    return _number(Path("/proc/self/status"), "VmHWM") * 1024


def _number(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
