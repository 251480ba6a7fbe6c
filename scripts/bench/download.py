"""How fast a download fills the line: one connection against several, on a local hub, side by side in one run.

    python -m scripts.bench.download [--size MB] [--rate MB] [--rounds N] [--directory DIR]

The hub limits each connection to the rate, as a store does, so the limit of a run is connections x rate; a
second table is without a limit. Every run fetches the same file, hashed and synced; the rounds go through all
numbers of connections in turn, and the table shows medians. What is written is deleted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from scripts.bench.harness import Column, interleaved, table

COLUMNS = (
    Column("connections", "connections"),
    Column("MB/s", "speed", ",.0f"),
    Column("of the limit", "share"),
    Column("x the first", "times", ".1f"),
    Column("processor, s per GB", "work", ".1f"),
)
NAME, FILE = "bench/download", "model.safetensors"
HUB = "scripts.fakehub.server"


def main() -> None:
    parser = argparse.ArgumentParser(description="One connection against several, on a local hub.")
    parser.add_argument("--size", type=int, default=512, metavar="MB", help="of the file (default: 512)")
    parser.add_argument("--rate", type=float, default=20.0, metavar="MB", help="MB/s each (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument("--directory", type=Path, help="where to put files (default: the system's place)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bloomdesk-bench-", dir=options.directory) as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        write_noise(source / FILE, options.size * 10**6)
        for rate in (options.rate, None):
            seconds = measure(source, Path(scratch) / "target", options.connections, options.rounds, rate)
            show(options.size * 10**6, seconds, rate)


def write_noise(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size, 2**20):
            file.write(os.urandom(min(2**20, size - start)))


def measure(
    source: Path, target: Path, connections: list[int], rounds: int, rate: float | None
) -> dict[str, list[tuple[float, float]]]:
    """Seconds, and seconds of the processor, of each run by its number of connections."""
    command = [sys.executable, "-m", HUB, f"{NAME}={source}", "--minutes", "120"]
    if rate is not None:
        command += ["--rate", str(rate)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdin is not None and hub.stdout is not None
        os.environ["HF_ENDPOINT"] = hub.stdout.readline().strip()
        taken = interleaved({str(count): partial(fetch, target, count) for count in connections}, rounds)
        hub.stdin.close()
    return taken


def fetch(target: Path, connections: int) -> tuple[float, float]:
    from toolkit.hub import revision as hub
    from toolkit.hub import transfer
    from toolkit.io.progress import silent

    revision = hub.resolve(NAME)
    file = revision.find(FILE)
    assert file is not None
    target.mkdir()
    began, worked = time.perf_counter(), time.process_time()
    transfer.fetch(revision, file, target, silent, connections)
    taken = time.perf_counter() - began, time.process_time() - worked
    (target / FILE).unlink()
    target.rmdir()
    return taken


def show(size: int, taken: dict[str, list[tuple[float, float]]], rate: float | None) -> None:
    title = "no limit" if rate is None else f"{rate:g} MB/s for each connection"
    print(f"\n{size / 1e6:,.0f} MB, {title}, medians of {len(next(iter(taken.values())))}\n")
    medians = {count: tuple(map(median, zip(*runs, strict=True))) for count, runs in taken.items()}
    speeds = {count: size / 1e6 / seconds for count, (seconds, _) in medians.items()}
    first = next(iter(speeds.values()))
    rows = [
        {
            "connections": count,
            "speed": speed,
            "share": speed / (int(count) * rate) if rate else None,
            "times": speed / first,
            "work": medians[count][1] / size * 1e9,
        }
        for count, speed in speeds.items()
    ]
    print(table(COLUMNS, rows))


if __name__ == "__main__":
    main()
