"""A turn of a benchmark: a fresh process under limits, the JSON object that it prints, and what the disk gives then.

    with sole_worker(work):
        cool([prepared])
        turn = take_turn(command, Limits(3 * 10**9, 1.073e9), prepared, timeout=600)

A program of scripts/bench/peers prints such an object. Benchmarks that compare take their turns interleaved, in one
run, because a machine is not the same from minute to minute.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from runner.system.disk import existing_directory, free_bytes
from scripts.bench.control_group import NoControlGroups, control_group
from scripts.bench.peers import forms

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
RATES = "scripts.bench.peers.rates"
SECONDS_FOR_A_RATE = 4.0
DISK_THREADS = 4
BRAKE_KEEPS_TO = 0.98  # a disk at this share of its brake is braked; one below is slower by itself
PAGES_OF_OTHERS = 500_000_000
INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C
PACKAGES = ("torch", "transformers", "accelerate", "llama_cpp_python", "airllm")
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


class CannotRun(Exception):
    """Why a benchmark can't be run here, in one sentence."""


@dataclass(frozen=True)
class Limits:
    """RAM in bytes, the page cache included, and the disk's rate in bytes a second; None is no limit.

    `also` are places on further disks, and their rates.
    """

    ram: int | None
    disk: float | None
    also: tuple[tuple[Path, float], ...] = ()

    def __str__(self) -> str:
        ram = "all RAM" if self.ram is None else f"{self.ram / 1e9:g} GB"
        return f"{ram}, {'no brake' if self.disk is None else f'{self.disk / 1e9:g} GB/s'}"


@dataclass
class Turn:
    """What a process reported, or why it failed; the group's peak includes the page cache."""

    report: dict[str, Any] = field(default_factory=dict)
    group: str = "none"
    group_peak: int | None = None
    failure: str | None = None

    @property
    def steps(self) -> list[float]:
        """Seconds of the passes over one token, the prompt's left out; none of a turn that failed."""
        return [] if self.failure else self.report.get("seconds", [])[1:]


def take_turn(command: Sequence[object], limits: Limits, disk_of: Path, timeout: float | None = None) -> Turn:
    """Run a command that prints a JSON object last, in a group of its own; the files should be cold before."""
    turn = Turn()
    with control_group(ram=limits.ram, read_rate=limits.disk, disk_of=disk_of, also=limits.also) as group:
        turn.group = group.kind
        try:
            turn.report = last_object(group.command(map(str, command)), timeout)
        except (subprocess.SubprocessError, ValueError) as error:
            turn.failure = failure(error)
        turn.group_peak = group.peak()
    # A process may have more in place than its group was charged for: programs and libraries that others run.
    in_place = turn.report.get("peak_rss")
    if in_place and turn.group_peak and in_place - turn.group_peak > PAGES_OF_OTHERS:
        turn.failure = "not cold: another process had the checkpoint in the page cache"
    return turn


def module(name: str, *arguments: object) -> list[object]:
    """The command that runs a module of this project with this interpreter."""
    return [sys.executable, "-m", name, *arguments]


def cool(forms_: Iterable[Path]) -> None:
    """Take files out of the page cache, and say which stay in it."""
    os.sync()  # what is not on the disk yet can't be dropped
    for form in set(forms_):
        if left := forms.cool(form):
            say(f"warning: {left:.0%} of {form.name} stays in the page cache")


def disk_rate(directory: Path, limits: Limits) -> float:
    """Bytes a second that the disk of a prepared directory gives under these limits, its parts cold."""
    command = module(RATES, "disk", "--seconds", SECONDS_FOR_A_RATE)
    command += ["--threads", DISK_THREADS, "--directory", directory]
    forms.cool(directory)
    with control_group(ram=limits.ram, read_rate=limits.disk, disk_of=directory) as group:
        return last_object(group.command(map(str, command)), None)["bytes_per_second"]


def memory_rate(threads: int) -> float:
    """Bytes a second that the memory gives to so many threads."""
    command = module(RATES, "memory", "--seconds", SECONDS_FOR_A_RATE, "--threads", threads)
    return last_object(list(map(str, command)), None)["bytes_per_second"]


def rate_of_the_limit(found: Iterable[float], limits: Limits) -> float:
    """The rate that a limit is computed with: the most that the disk gave, or its brake where that held it."""
    most = max(found)
    return limits.disk if limits.disk and most > BRAKE_KEEPS_TO * limits.disk else most


def rate_while_reading(report: Mapping[str, Any]) -> float:
    """What the disk gave to a turn of one_row_passes in the time in which a read was under way; 0 without reads."""
    seconds = sum(report["reading_seconds"])
    return report["streamed_bytes"] * len(report["reading_seconds"]) / seconds if seconds else 0.0


def last_object(command: list[str], timeout: float | None) -> dict[str, Any]:
    """The JSON object that a command prints last. Raises SubprocessError where it fails, ValueError without one."""
    environment = {**os.environ, **QUIET}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=True
    )
    return json.loads((done.stdout.strip().splitlines() or [""])[-1])


def failure(error: Exception) -> str:
    """Why a turn failed, in a few words."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done after {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        if -error.returncode == signal.SIGKILL or error.returncode == 128 + signal.SIGKILL:
            return "killed: more memory than the group has"
        last = (error.stderr.strip().splitlines() or [""])[-1]
        return f"ended with {error.returncode}: {last[:200]}"
    return f"no report: {error}"


def check_limits(work: Path, limits: Iterable[Limits]) -> None:
    """Raises `CannotRun` if one of these limits is not possible on the disk of `work`."""
    for each in limits:
        try:
            with control_group(ram=each.ram, read_rate=each.disk, disk_of=existing_directory(work)):
                pass
        except NoControlGroups as error:
            raise CannotRun(f"{error}\nrun it as root on Linux, or without limits") from error


@contextmanager
def sole_worker(work: Path) -> Iterator[None]:
    """Hold the working directory, which is made. Raises `CannotRun` if another run holds it.

    SIGTERM then ends the process as an exception does, so that control groups are removed on the way out.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work.mkdir(parents=True, exist_ok=True)
    held = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        why = "two at once would warm each other's page cache"
        raise CannotRun(f"another run works in {work}: {why}") from None
    finally:
        os.close(held)


def check_room(work: Path, needed: int) -> None:
    """Raises `CannotRun` where the disk of `work` has less than `needed` bytes free."""
    free = free_bytes(work)
    if free < needed:
        raise CannotRun(f"{work} needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")


def machine(directory: Path) -> str:
    """What the figures were taken on."""
    cpu = ""
    if Path("/proc/cpuinfo").exists():
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or ""
    device = directory.stat().st_dev
    readahead = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    disk = f"read-ahead {readahead.read_text().strip()} KiB, " if readahead.exists() else ""
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    return (
        f"{cpu or platform.processor()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB of memory, {disk}"
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {', '.join(versions)}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def size(text: str) -> float | None:
    """Bytes, or bytes a second, of "3GB", "512MiB", "1.073GB/s" or "none"."""
    if text == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?)B?(?:/s)?", text, re.IGNORECASE)
    if not found or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 3GB, 512MiB, 1.073GB/s or none")
    return float(found[1]) * UNITS[found[2].upper()]


def numbers(text: str) -> list[int]:
    """[16, 512] of "16,512"."""
    return [int(word) for word in text.split(",")]


def sizes(text: str) -> list[float | None]:
    """Several of them with commas between."""
    return [size(word) for word in text.split(",")]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def to_the_end(run: Callable[[], None]) -> bool:
    """Run it; False where Ctrl-C ended it, after which what there is can still be shown."""
    try:
        run()
    except KeyboardInterrupt:
        return False
    return True
