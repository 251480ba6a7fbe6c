#!/usr/bin/env python3
"""bloomdesk's runner beside its peers: the same weights, RAM and disk, in turns in one run.

    python scripts/bench_peers.py --work WORK --like bloom-3b --ram 3GB --disk 1.073GB/s
    python scripts/bench_peers.py CHECKPOINT --work WORK --ram none --disk none

Each turn is a fresh process in a fresh control group (scripts/control_group.py): RAM bounds the process and the page
cache together, the disk's rate is braked, and the checkpoint's files begin cold. With `--ram none --disk none` all
begins in the page cache, which is the mode for models that fit in RAM.

The peers are small programs in scripts/peers: bloomdesk; the tutorial of 2022, a block at a time and no KV cache;
transformers with accelerate's disk offload; llama.cpp; AirLLM. One whose packages are missing is left out with a word
(pip install accelerate; llama-cpp-python gguf; airllm sentencepiece scipy). A turn takes the prompt in one pass, the
first token, then one pass for each further token; seconds a token are the median over the latter of all rounds.

The limit is what no program can beat that keeps as much in RAM as bloomdesk: the bytes that it streams in a pass over
the rate of the disk, or all weights over the rate of the memory. Both rates are measured in every round; the brake's
counts unless the disk gives less.

WORK takes 4 times the checkpoint, 5 times where the script makes it.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.control_group import NoControlGroups, control_group  # noqa: E402 - the script runs from anywhere
from scripts.make_checkpoint import TRUE_SHAPES  # noqa: E402
from scripts.peers import forms  # noqa: E402

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
SECONDS_FOR_A_RATE = 4.0
DISK_THREADS = 4
PAGES_OF_OTHERS = 500_000_000
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Peer:
    """A program of scripts/peers, the packages that it needs, and the form of the checkpoint that it reads."""

    module: str
    needs: tuple[str, ...]
    form: Callable[[Path, Path], Path]

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


PEERS = {
    "bloomdesk": Peer("with_bloomdesk", (), lambda work, prepared: prepared),
    "tutorial": Peer("with_tutorial", ("transformers",), forms.torch_files),
    "transformers": Peer("with_transformers", ("transformers", "accelerate"), forms.hub),
    "llama.cpp": Peer("with_llama_cpp", ("llama_cpp", "gguf"), forms.gguf),
    "airllm": Peer("with_airllm", ("airllm",), forms.hub),
}


@dataclass
class Turn:
    """A peer's turn: what it reported, or why it failed; the group's peak includes the page cache."""

    peer: str
    round: int
    report: dict[str, Any] = field(default_factory=dict)
    group_peak: int | None = None
    failure: str | None = None

    @property
    def steps(self) -> list[float]:
        """Seconds of the passes over one token, the prompt's left out; none of a turn that failed."""
        return [] if self.failure else self.report.get("seconds", [])[1:]


class Bench:
    """All turns of one run; `given` are the options."""

    def __init__(self, given: argparse.Namespace, prepared: Path, peers: dict[str, Path]) -> None:
        self.given, self.prepared, self.peers = given, prepared, peers
        self.in_memory = given.ram is None and given.disk is None
        vocabulary = json.loads((prepared / "config.json").read_text())["vocab_size"]
        choose = random.Random(0)
        self.prompt = [choose.randrange(4, vocabulary) for _ in range(given.prompt_tokens)]
        self.turns: list[Turn] = []
        self.rates: dict[str, list[float]] = {"disk": [], "memory": []}
        self.kind = "none"

    def run(self) -> None:
        for number in range(1, self.given.rounds + 1):
            what = "memory" if self.in_memory else "disk"
            self.rates[what].append(self.rate(what))
            say(f"round {number}: the {what} gives {self.rates[what][-1] / 1e9:.3f} GB/s")
            for name, form in self.peers.items():
                turn = self.turn(name, form, number)
                self.turns.append(turn)
                say(f"round {number}: {name} {turn.failure or in_words(turn)}")
                self.save()

    def turn(self, name: str, form: Path, number: int) -> Turn:
        """One peer, from a fresh process to its last token."""
        self.begin(form)
        given, turn = self.given, Turn(name, number)
        command = [sys.executable, "-m", f"scripts.peers.{PEERS[name].module}", form]
        command += ["--prompt", ",".join(map(str, self.prompt)), "--tokens", given.tokens]
        command += ["--threads", given.threads, *(["--ram", given.ram] if given.ram else [])]
        for peer, setting in given.set:
            command += ["--set", setting] if peer == name else []
        with control_group(ram=given.ram, read_rate=given.disk, disk_of=form) as group:
            self.kind = group.kind
            try:
                turn.report = last_object(group.command(map(str, command)), given.timeout)
            except (subprocess.SubprocessError, ValueError) as error:
                turn.failure = failure(error)
            turn.group_peak = group.peak()
        # A process may have more in place than its group was charged for: programs and libraries that others run.
        if turn.report and turn.group_peak and turn.report["peak_rss"] - turn.group_peak > PAGES_OF_OTHERS:
            turn.failure = "not cold: another process had the checkpoint in the page cache"
        return turn

    def rate(self, what: str) -> float:
        """Bytes a second of the memory, or of the disk under the same limits as the peers."""
        command = [sys.executable, "-m", "scripts.peers.rates", what, "--seconds", str(SECONDS_FOR_A_RATE)]
        if what == "memory":
            return last_object([*command, "--threads", str(self.given.threads)], None)["bytes_per_second"]
        command += ["--threads", str(DISK_THREADS), "--directory", str(self.prepared)]
        forms.cool(self.prepared)
        with control_group(ram=self.given.ram, read_rate=self.given.disk, disk_of=self.prepared) as group:
            return last_object(group.command(command), None)["bytes_per_second"]

    def begin(self, form: Path) -> None:
        """The page cache as the turn should find it: none of the checkpoint, or all of this form and no other."""
        os.sync()  # what is not on the disk yet can't be dropped
        for other in {*self.peers.values(), self.prepared}:
            left = forms.cool(other)
            if left and not self.in_memory:
                say(f"warning: {left:.0%} of {other.name} stays in the page cache")
        if self.in_memory:
            forms.warm(form)

    def limit(self) -> tuple[float, str]:
        """Seconds a pass can't be faster than, and how that comes about."""
        if self.in_memory:
            total, rate = forms.weights_bytes(self.prepared), max(self.rates["memory"])
            return total / rate, f"{total / 1e9:.2f} GB of weights / {rate / 1e9:.1f} GB/s of the memory"
        streamed, how = self.streamed()
        rate = max(median(self.rates["disk"]), *self.turn_rates())
        if self.given.disk and rate > 0.98 * self.given.disk:  # within what a brake keeps to
            rate, source = self.given.disk, "the brake"
        else:
            source = "the most that the disk gave" + (", below the brake" if self.given.disk else "")
        return streamed / rate, f"{streamed / 1e9:.3f} GB {how} / {rate / 1e9:.3f} GB/s, {source}"

    def turn_rates(self) -> list[float]:
        """What the disk gave over each whole turn: a limit is none if a peer was beyond it."""
        reports = [turn.report for turn in self.turns if turn.steps]
        return [0.0, *(sum(report["read_bytes"]) / sum(report["seconds"]) for report in reports)]

    def streamed(self) -> tuple[float, str]:
        """Bytes that a pass of bloomdesk takes from the disk, by its plan, else by the kernel's count."""
        reports = [turn.report for turn in self.turns if turn.peer == "bloomdesk" and turn.report]
        planned = [report["streamed_bytes"] for report in reports if report["streamed_bytes"] is not None]
        if planned:
            return median(planned), "streamed by bloomdesk"
        counted = [count for report in reports for count in report["read_bytes"][1:]]
        if counted:
            return median(counted), "read by bloomdesk"
        return forms.weights_bytes(self.prepared), "of weights"

    def table(self) -> str:
        """The result as Markdown."""
        limit, how = self.limit()
        own = [second for turn in self.turns if turn.peer == "bloomdesk" for second in turn.steps]
        columns = (
            "peer | s/token | range of rounds | x bloomdesk | x limit | prompt s | GB read a token "
            "| group's peak GB | process's peak GB | tokens"
        )
        lines = [f"| {columns} |", "| --- |" + " ---: |" * 8 + " --- |"]
        for name in self.peers:
            turns = [turn for turn in self.turns if turn.peer == name]
            done = [turn for turn in turns if turn.steps]
            if not done:
                why = "; ".join({turn.failure or "too few tokens" for turn in turns}) or "no turn yet"
                lines.append(f"| {name} | {why} |" + " |" * 8)
                continue
            seconds = median(second for turn in done for second in turn.steps)
            rounds = [median(turn.steps) for turn in done]
            read = median(count for turn in done for count in turn.report["read_bytes"][1:])
            peaks = [turn.group_peak for turn in done if turn.group_peak is not None]
            cells = (
                name,
                f"{seconds:.3f}",
                f"{min(rounds):.3f} to {max(rounds):.3f}",
                f"{seconds / median(own):.2f}" if own else "",
                f"{seconds / limit:.2f}" if limit else "",
                f"{median(turn.report['seconds'][0] for turn in done):.2f}",
                f"{read / 1e9:.2f}",
                f"{max(peaks) / 1e9:.2f}" if peaks else "",
                f"{max(turn.report['peak_rss'] for turn in done) / 1e9:.2f}",
                self.agreement(done)
                + (f", {len(turns) - len(done)} failed" if len(done) < len(turns) else ""),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"| the limit | {limit:.3f} |" + " |" * 8)
        return "\n".join([*lines, "", f"The limit: {how}."])

    def agreement(self, turns: list[Turn]) -> str:
        """Whether these turns gave the tokens of the first turn of the run that gave any."""
        first = next(turn for turn in self.turns if turn.steps)
        shares = []
        for turn in turns:
            pairs = list(zip(turn.report["ids"], first.report["ids"], strict=False))
            same = next((place for place, (own, other) in enumerate(pairs) if own != other), len(pairs))
            shares.append((same, len(pairs)))
        same, count = min(shares)
        if same == count:
            return "same"
        return f"same until {same + 1} of {count}"

    def save(self) -> None:
        """Everything so far as JSON, where it was asked for."""
        if not self.given.json:
            return
        body = {
            "machine": machine(self.prepared),
            "ram": self.given.ram,
            "disk": self.given.disk,
            "control_group": self.kind,
            "threads": self.given.threads,
            "weights_bytes": forms.weights_bytes(self.prepared),
            "prompt": self.prompt,
            "rates": self.rates,
            "limit": dict(zip(("seconds", "how"), self.limit(), strict=True)),
            "turns": [asdict(turn) for turn in self.turns],
        }
        self.given.json.write_text(json.dumps(body, indent=1) + "\n")


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


def in_words(turn: Turn) -> str:
    report = turn.report
    steps = " ".join(f"{second:.3f}" for second in report["seconds"])
    return f"{steps} s; {report['settings']}; tokens {report['ids']}"


def machine(directory: Path) -> str:
    """What the figures were taken on."""
    cpu = memory = ""
    if Path("/proc/cpuinfo").exists():
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or ""
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB of memory, "
    device = directory.stat().st_dev
    readahead = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    disk = f"read-ahead {readahead.read_text().strip()} KiB, " if readahead.exists() else ""
    versions = [
        f"{name} {version(name)}"
        for name in ("torch", "transformers", "accelerate", "llama_cpp_python", "airllm")
    ]
    return (
        f"{cpu or platform.processor()}, {os.cpu_count()} cores, {memory}{disk}"
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {', '.join(versions)}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def version(package: str) -> str:
    from importlib import metadata

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


def setting(text: str) -> tuple[str, str]:
    """("llama.cpp", "n_batch=64") of "llama.cpp:n_batch=64"."""
    peer, _, rest = text.partition(":")
    if peer not in PEERS or "=" not in rest:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write PEER:NAME=VALUE")
    return peer, rest


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure bloomdesk beside its peers under the same limits.")
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="in the Hub's layout")
    parser.add_argument("--like", choices=TRUE_SHAPES, help="make a checkpoint of these shapes instead")
    parser.add_argument(
        "--prepared", type=Path, metavar="DIR", help="a prepared directory of it; else WORK's"
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--ram", type=size, default="3GB", metavar="SIZE")
    parser.add_argument("--disk", type=size, default="1.073GB/s", metavar="RATE")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=5, metavar="N", help="the first is the prompt's pass")
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="A,B,...")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one turn")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="PEER:NAME=VALUE")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    given.ram = given.ram and int(given.ram)
    if not (given.checkpoint or given.like or given.prepared or (given.work / "prepared").exists()):
        parser.error("give a CHECKPOINT, --prepared or --like")
    if given.tokens < 2:
        parser.error("--tokens must be at least 2: the first is the prompt's pass")
    if unknown := set(given.peers.split(",")) - set(PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return given


def main() -> int:
    given = options()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # control groups go on the way out
    work = given.work.resolve()
    try:
        with control_group(ram=given.ram, read_rate=given.disk, disk_of=existing(work)):
            pass
    except NoControlGroups as error:
        say(f"{error}\nrun it as root on Linux, or without limits: --ram none --disk none")
        return 2
    work.mkdir(parents=True, exist_ok=True)
    held = os.open(work, os.O_RDONLY)  # to the end of the process
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another run works in {work}: two at once would warm each other's page cache")
        return 2
    prepared = (given.prepared or forms.prepared(work, given.checkpoint, given.like)).resolve()
    peers = {}
    for name in given.peers.split(","):
        if missing := PEERS[name].missing():
            say(f"{name} is left out: {' and '.join(missing)} not installed")
        else:
            peers[name] = PEERS[name].form(work, prepared)
    bench, status = Bench(given, prepared, peers), 0
    try:
        bench.run()
    except KeyboardInterrupt:  # what there is so far is shown
        status = 128 + signal.SIGINT
    state = "all in the page cache" if bench.in_memory else f"cold, control groups {bench.kind}"
    print(f"{machine(prepared)}\n{given.rounds} rounds, prompt of {given.prompt_tokens}, {state}\n")
    if any(bench.rates.values()):
        print(bench.table())
    return status


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that there is."""
    return next(place for place in (path, *path.parents) if place.exists())


if __name__ == "__main__":
    sys.exit(main())
