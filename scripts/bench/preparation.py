"""`bloomdesk convert` beside `cp` of the same bytes, and full `verify` beside `cat`, on a shard of BLOOM-176B's size.

    python -m scripts.bench.preparation WORK [--rounds 5]

One run measures all four in turns, in another order every round, each with the files out of the page cache and with
what was written on the disk for good (`cp` is followed by an fsync of each file). The commands are the real ones, in
processes of their own, so their time includes Python and its imports; memory is their peak RssAnon, sampled. A warm-up
round is left out. WORK needs 15 GB and keeps the source for the next run unless --delete is given.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from scripts.fakehub.checkpoint import TRUE_SHAPES, synthetic

ROOT = Path(__file__).resolve().parents[2]

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
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0

    def sample() -> None:
        nonlocal peak
        while process.returncode is None:
            peak = max(peak, anonymous_bytes(process.pid))
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


def anonymous_bytes(pid: int) -> int:
    """A process's anonymous memory now; 0 where it has ended or the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def import_seconds(command: str, *paths: Path) -> float:
    """Seconds that Python takes for the imports of a bloomdesk command, as `-X importtime` counts them."""
    arguments = [BLOOMDESK[0], "-X", "importtime", *BLOOMDESK[1:], command, *map(str, paths)]
    errors = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    lines = [
        line.removeprefix("import time:") for line in errors.splitlines() if line.startswith("import time:")
    ]
    return sum(int(own) for own in (line.split("|")[0] for line in lines) if own.strip().isdigit()) / 1e6


def cool(*directories: Path) -> None:
    """Bring everything onto the disk, and these directories' files out of the page cache."""
    os.sync()
    time.sleep(SECONDS_TO_SETTLE)  # what was deleted before is given back to the disk in the background
    for path in (path for directory in directories for path in directory.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Bench:
    """The four commands on one source, each ready to be measured again and again."""

    def __init__(self, work: Path, source: Path) -> None:
        self.source, self.copy = source, work / "copy"
        self.prepared, self.fresh = work / "prepared", work / "fresh"
        if not (self.prepared / "final_layernorm.safetensors").exists():
            shutil.rmtree(self.prepared, ignore_errors=True)
            subprocess.run([*BLOOMDESK, "convert", source, self.prepared], cwd=ROOT, check=True)
        self.commands: dict[str, Callable[[], Run]] = {
            "cp": self.cp,
            "convert": self.convert,
            "cat": self.cat,
            "verify": self.verify,
        }

    def cp(self) -> Run:
        shutil.rmtree(self.copy, ignore_errors=True)
        cool(self.source)
        copy = 'cp -r "$0" "$1" && sync "$1"/*'
        run = measure(["sh", "-c", copy, self.source, self.copy])
        shutil.rmtree(self.copy)
        return run

    def convert(self) -> Run:
        shutil.rmtree(self.fresh, ignore_errors=True)
        cool(self.source)
        run = measure([*BLOOMDESK, "convert", self.source, self.fresh])
        shutil.rmtree(self.fresh)
        return run

    def cat(self) -> Run:
        cool(self.prepared)
        return measure(["sh", "-c", 'cat "$0"/* > /dev/null', self.prepared])

    def verify(self) -> Run:
        cool(self.prepared)
        return measure([*BLOOMDESK, "verify", self.prepared])


def report(runs: dict[str, list[Run]], sizes: dict[str, int], imports: dict[str, float]) -> str:
    """Medians, their spread, and the ratios of speeds, as a Markdown table."""
    lines = [
        "| command | seconds | range | MB/s | processor s | imports s | peak anonymous MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, measured in runs.items():
        seconds = [run.seconds for run in measured]
        anonymous = f"{max(run.anonymous for run in measured) / 1e6:.0f}" if name in imports else ""
        lines.append(
            f"| {name} | {median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} "
            f"| {sizes[name] / median(seconds) / 1e6:,.0f} | {median(run.processor for run in measured):.2f} "
            f"| {f'{imports[name]:.2f}' if name in imports else ''} | {anonymous} |"
        )
    lines.append("")
    for ours, theirs in (("convert", "cp"), ("verify", "cat")):
        pairs = list(zip(runs[ours], runs[theirs], strict=True))
        whole = median(other.seconds / own.seconds for own, other in pairs)
        bare = median(other.seconds / (own.seconds - imports[ours]) for own, other in pairs)
        lines.append(
            f"{ours} has {whole:.2f} of the speed of {theirs} (median of the rounds), {bare:.2f} without its imports"
        )
    return "\n".join(lines)


def machine(work: Path) -> str:
    """What the figures were taken on."""
    cpu = memory = disk = ""
    if Path("/proc/cpuinfo").exists():
        fields = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        cpu = next((value.strip() for name, _, value in fields if name.strip() == "model name"), "")
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB"
    device = work.stat().st_dev
    queue = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue")
    if queue.exists():
        disk = f"read-ahead {(queue / 'read_ahead_kb').read_text().strip()} KiB, "
    return (
        f"{cpu or platform.processor()}, {os.cpu_count()} cores, {memory} of memory, {disk}"
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f} at the end"
    )


def directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure convert against cp and verify against cat.")
    parser.add_argument("work", type=Path, metavar="WORK", help="a directory on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
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
    runs: dict[str, list[Run]] = {name: [] for name in bench.commands}
    for number in range(given.rounds + 1):
        order = list(bench.commands)
        for name in order if number % 2 else reversed(order):
            run = bench.commands[name]()
            print(f"round {number}: {name} {run.seconds:.2f} s", file=sys.stderr, flush=True)
            if number:
                runs[name].append(run)
    read, written = directory_bytes(bench.prepared), directory_bytes(source)
    sizes = {"cp": written, "convert": written, "cat": read, "verify": read}
    print(f"{machine(work)}\n{written / 1e9:.2f} GB, {given.rounds} rounds, page cache cold\n")
    print(report(runs, sizes, imports))
    if given.delete:
        for directory in (source, bench.prepared):
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
