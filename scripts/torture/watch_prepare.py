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
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scripts.fakehub.checkpoint import TRUE_SHAPES, TRUE_VOCABULARY, synthetic
from scripts.fakehub.server import LocalHub
from toolkit.parts.destination import STAGING

REPO = "bloomdesk/watched"
SECONDS_BETWEEN_SAMPLES = 0.02
POINTS = 300  # of the plot; the figures are of all samples


@dataclass(frozen=True)
class Sample:
    """Seconds since the start; bytes of shards on their way, of whole parts, and of a part being written; memory."""

    seconds: float
    shards: int
    parts: int
    begun: int
    anonymous: int


def look(directory: Path, pid: int, start: float) -> Sample:
    """What the directory holds now, and what the process takes."""
    shards = parts = begun = anonymous = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                size = Path(folder, name).stat().st_size
                if Path(folder).name == STAGING:
                    shards += size
                elif name.endswith(".incomplete"):
                    begun += size
                else:
                    parts += size
    with suppress(OSError, TypeError):
        status = Path(f"/proc/{pid}/status").read_text()
        anonymous = int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
    return Sample(time.monotonic() - start, shards, parts, begun, anonymous)


def watch(source: Path, destination: Path) -> list[Sample]:
    """Prepare `source` into `destination` through a local hub; what was seen."""
    samples = []
    with LocalHub({REPO: source}) as hub:
        command = [sys.executable, "-m", "toolkit.cli.app", "prepare", REPO, str(destination)]
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint}
        start = time.monotonic()
        with subprocess.Popen(command, env=environment) as process:
            while process.poll() is None:
                samples.append(look(destination, process.pid, start))
                time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise SystemExit(process.returncode)
    return samples


def plot(samples: list[Sample], bound: int, path: Path) -> None:
    """Disk by what it holds, over time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    samples = samples[:: max(1, len(samples) // POINTS)]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    seconds = [sample.seconds for sample in samples]
    stacks = [[getattr(sample, name) / 1e9 for sample in samples] for name in ("parts", "begun", "shards")]
    labels = ("whole parts", "part being written", "shards on their way")
    axes.stackplot(seconds, stacks, labels=labels, colors=("#4c78a8", "#9ecae9", "#f58518"))
    axes.plot(
        seconds, [(s.parts + s.begun + bound) / 1e9 for s in samples], "k--", lw=1, label="parts + two shards"
    )
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
    samples = watch(source, destination)
    peak, bound = max(sample.shards for sample in samples), sum(sizes[-2:])
    print(f"{len(sizes)} shards of {sizes[0] / 1e9:.3f} to {sizes[-1] / 1e9:.2f} GB, {len(samples)} samples")
    print(f"shards on the disk at once: at most {peak / 1e9:.3f} GB; the two largest: {bound / 1e9:.3f} GB")
    print(f"anonymous memory: at most {max(sample.anonymous for sample in samples) / 1e6:.0f} MB")
    if options.plot:
        plot(samples, bound, options.plot)
    shutil.rmtree(source)
    shutil.rmtree(destination)


if __name__ == "__main__":
    main()
