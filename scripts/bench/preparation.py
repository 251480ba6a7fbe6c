"""`bloomdesk convert` beside `cp` of the same bytes, and full `verify` beside `cat`, on a shard of BLOOM-176B's size.

    python -m scripts.bench.preparation WORK [--rounds 5]

One run measures all four in turns, in another order every round, each with the files out of the page cache and with
what was written synced to the disk (`cp` is followed by an fsync of each file). The commands are the real ones, in
processes of their own, so their time includes Python and its imports; memory is their peak RssAnon, sampled. A warm-up
round is left out. WORK needs 15 GB and keeps the source for the next run unless --delete is given.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from scripts.bench.harness import Column, interleaved, save, table
from scripts.bench.peers import forms
from scripts.bench.turns import ROOT, machine
from scripts.fakehub.checkpoint import TRUE_SHAPES, synthetic

BLOOMDESK = (sys.executable, "-m", "toolkit.cli.app")
SECONDS_BETWEEN_SAMPLES = 0.02
SECONDS_TO_SETTLE = 2.0


@dataclass(frozen=True)
class Run:
    """One command: wall seconds, processor seconds of it and its children, peak anonymous memory in bytes."""

    seconds: float
    processor: float
    anonymous: int


def measure(command: Sequence[str | Path]) -> Run:
    """Run a command to its end, which must be a good one."""
    before, start = os.times(), time.monotonic()
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0

    def sample() -> None:
        nonlocal peak
        while process.returncode is None:
            peak = max(peak, anonymous_bytes(process))
            time.sleep(SECONDS_BETWEEN_SAMPLES)

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, errors = process.communicate()
    seconds, after = time.monotonic() - start, os.times()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{errors.decode()}")
    processor = sum(after[2:4]) - sum(before[2:4])
    return Run(seconds, processor, peak)


def anonymous_bytes(process: psutil.Process) -> int:
    """A process's anonymous memory now; 0 where it has ended."""
    try:
        found = process.memory_info()
    except psutil.Error:
        return 0
    return found.rss - found.shared


def import_seconds(command: str, *paths: Path) -> float:
    """Seconds that Python takes for the imports of a bloomdesk command, as `-X importtime` counts them."""
    arguments = [BLOOMDESK[0], "-X", "importtime", *BLOOMDESK[1:], command, *map(str, paths)]
    errors = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    own = re.findall(r"^import time: +(\d+)", errors, re.MULTILINE)
    return sum(map(int, own)) / 1e6


def cool(directory: Path) -> None:
    """Bring everything onto the disk, and this directory's files out of the page cache."""
    os.sync()
    time.sleep(SECONDS_TO_SETTLE)  # what was deleted before is given back to the disk in the background
    forms.cool(directory)


class Bench:
    """The four commands on one source, each ready to be measured again and again."""

    def __init__(self, work: Path, source: Path) -> None:
        self.source, self.copy = source, work / "copy"
        self.prepared, self.fresh = work / "prepared", work / "fresh"
        forms.convert(source, self.prepared)
        self.commands = {"cp": self.cp, "convert": self.convert, "cat": self.cat, "verify": self.verify}

    def cp(self) -> Run:
        return self.written(self.copy, ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', self.source, self.copy])

    def convert(self) -> Run:
        return self.written(self.fresh, [*BLOOMDESK, "convert", self.source, self.fresh])

    def written(self, out: Path, command: Sequence[str | Path]) -> Run:
        """A command that reads the source and writes `out`, which is deleted before and after."""
        shutil.rmtree(out, ignore_errors=True)
        cool(self.source)
        run = measure(command)
        shutil.rmtree(out)
        return run

    def cat(self) -> Run:
        cool(self.prepared)
        return measure(["sh", "-c", 'cat "$0"/* > /dev/null', self.prepared])

    def verify(self) -> Run:
        cool(self.prepared)
        return measure([*BLOOMDESK, "verify", self.prepared])


COLUMNS = (
    Column("command", "command"),
    Column("seconds", "seconds"),
    Column("range of rounds", "rounds"),
    Column("MB/s", "rate", ",.0f", 1e6),
    Column("processor s", "processor"),
    Column("imports s", "imports"),
    Column("peak anonymous MB", "anonymous", ".0f", 1e6),
)


def row(name: str, runs: list[Run], nbytes: int, imports: float | None) -> dict[str, Any]:
    """Medians of a command's rounds."""
    seconds = [run.seconds for run in runs]
    return {
        "command": name,
        "seconds": median(seconds),
        "rounds": seconds,
        "rate": nbytes / median(seconds),
        "processor": median(run.processor for run in runs),
        "imports": imports,
        "anonymous": max(run.anonymous for run in runs) if imports else None,
    }


def compared(runs: dict[str, list[Run]], imports: dict[str, float]) -> str:
    """Our speeds as shares of those of cp and cat: medians of the rounds, with and without imports."""
    lines = []
    for ours, theirs in (("convert", "cp"), ("verify", "cat")):
        pairs = list(zip(runs[ours], runs[theirs], strict=True))
        whole = median(other.seconds / own.seconds for own, other in pairs)
        bare = median(other.seconds / (own.seconds - imports[ours]) for own, other in pairs)
        lines.append(
            f"{ours} has {whole:.2f} of the speed of {theirs} (median of the rounds), {bare:.2f} without its imports"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure convert against cp and verify against cat.")
    parser.add_argument("work", type=Path, metavar="WORK", help="a directory on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--delete", action="store_true", help="delete the 10 GB in WORK at the end")
    given = parser.parse_args()
    work = given.work.resolve()
    source = work / "source"
    work.mkdir(parents=True, exist_ok=True)
    if not (source / "config.json").exists():  # it is written last but for the tokenizer
        hidden, heads, _ = TRUE_SHAPES["bloom"]
        synthetic(source, hidden_size=hidden, heads=heads, blocks=1, vocab_size=1024)
    with tempfile.TemporaryDirectory() as small:
        synthetic(Path(small, "source"), hidden_size=64, heads=8, blocks=1, vocab_size=300)
        imports = {"convert": import_seconds("convert", Path(small, "source"), Path(small, "out"))}
        imports["verify"] = import_seconds("verify", Path(small, "out"))
    bench = Bench(work, source)
    runs = interleaved(bench.commands, given.rounds, warm_up=1)
    read, written = (
        sum(path.stat().st_size for path in forms.files(each)) for each in (bench.prepared, source)
    )
    sizes = {"cp": written, "convert": written, "cat": read, "verify": read}
    rows = [row(name, found, sizes[name], imports.get(name)) for name, found in runs.items()]
    save(given.json, "preparation", {"bytes": written, "measured": rows}, work)
    print(f"{machine(work)}\n{written / 1e9:.2f} GB, {given.rounds} rounds, page cache cold\n")
    print(f"{table(COLUMNS, rows)}\n\n{compared(runs, imports)}")
    if given.delete:
        for directory in (source, bench.prepared):
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
