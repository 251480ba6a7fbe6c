"""Watch `bloomdesk prepare` while it runs: its disk beyond the finished parts, and its anonymous memory.

    python -m scripts.torture.watch_prepare WORK [--like bloom-7b1] [--blocks 8] [--plot docs/prepare.svg]

A checkpoint of true shapes, one block in each shard, is served by a local hub and prepared by the real command.
Everything below the destination is sampled: bytes of whole parts, and bytes of all else, which must stay under two
shards and the part that is being written. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from scripts.fakehub.checkpoint import TRUE_SHAPES, TRUE_VOCABULARY, synthetic
from scripts.fakehub.server import LocalHub
from scripts.torture.attempt import BLOOMDESK, REPO, environment
from toolkit.parts.destination import STAGING

SECONDS_BETWEEN_SAMPLES = 0.02
# Samples in the plot; the figures are of all samples.
POINTS = 300
# What the disk holds: the plot's label and colour.
HELD = {
    "parts": ("whole parts", "#4c78a8"),
    "unfinished": ("part being written", "#9ecae9"),
    "shards": ("shards being fetched", "#f58518"),
}


def sample(directory: Path, pid: int) -> Counter[str]:
    """Bytes of whole parts, of an unfinished part and of shards on the disk, and of anonymous memory."""
    found = Counter[str]()
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            part = "unfinished" if path.name.endswith(".incomplete") else "parts"
            with suppress(FileNotFoundError):
                found["shards" if path.parent.name == STAGING else part] += path.stat().st_size
    with suppress(OSError, TypeError):
        status = Path(f"/proc/{pid}/status").read_text()
        found["anonymous"] = int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
    return found


def watch(source: Path, destination: Path) -> dict[float, Counter[str]]:
    """Samples by seconds since the start, while `source` is prepared through a local hub."""
    samples = {}
    with LocalHub({REPO: source}) as hub:
        command = [*BLOOMDESK, "prepare", REPO, str(destination)]
        start = time.monotonic()
        with subprocess.Popen(command, env=environment(hub.endpoint)) as process:
            while process.poll() is None:
                samples[time.monotonic() - start] = sample(destination, process.pid)
                time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise SystemExit(process.returncode)
    return samples


def plot(samples: dict[float, Counter[str]], bound: int, path: Path) -> None:
    """Write a plot of what the disk holds, over time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = dict(list(samples.items())[:: max(1, len(samples) // POINTS)])
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    stacks = [[found[name] / 1e9 for found in shown.values()] for name in HELD]
    labels, colors = zip(*HELD.values(), strict=True)
    axes.stackplot(list(shown), stacks, labels=labels, colors=colors)
    limit = [(found["parts"] + found["unfinished"] + bound) / 1e9 for found in shown.values()]
    axes.plot(list(shown), limit, "k--", lw=1, label="parts + two shards")
    axes.set(xlabel="seconds", ylabel="GB on the disk", title="bloomdesk prepare: the disk while it runs")
    axes.legend(loc="upper left")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample disk and memory of bloomdesk prepare.")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--like", choices=TRUE_SHAPES, default="bloom-7b1")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=TRUE_VOCABULARY)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    hidden, heads, _ = TRUE_SHAPES[options.like]
    source, destination = options.work / "source", options.work / "bloom"
    synthetic(source, hidden_size=hidden, heads=heads, blocks=options.blocks, vocab_size=options.vocab_size)
    sizes = sorted(path.stat().st_size for path in source.glob("*.bin"))
    samples, bound = watch(source, destination), sum(sizes[-2:])
    peak, memory = (max(found[name] for found in samples.values()) for name in ("shards", "anonymous"))
    print(f"{len(sizes)} shards of {sizes[0] / 1e9:.3f} to {sizes[-1] / 1e9:.2f} GB, {len(samples)} samples")
    print(f"shards on the disk at once: at most {peak / 1e9:.3f} GB; the two largest: {bound / 1e9:.3f} GB")
    print(f"anonymous memory: at most {memory / 1e6:.0f} MB")
    if options.plot:
        plot(samples, bound, options.plot)
    shutil.rmtree(source)
    shutil.rmtree(destination)


if __name__ == "__main__":
    main()
