"""bloomdesk's runner beside its peers: the same weights, RAM and disk, in turns in one run.

    python -m scripts.bench.against_peers --work WORK --like bloom-3b --ram 3GB --disk 1.073GB/s
    python -m scripts.bench.against_peers CHECKPOINT --work WORK --ram none --disk none

Each turn is a fresh process in a fresh control group (scripts/bench/control_group.py): RAM bounds the process and the
page cache together, the disk's rate is braked, and the checkpoint's files begin cold. With `--ram none --disk none` all
begins in the page cache, which is the mode for models that fit in RAM.

The peers are small programs in scripts/bench/peers: bloomdesk, a token a pass, and the same on a directory made with
`convert --lossless`, whose passes read less; the tutorial of 2022, a block at a time and no KV cache;
transformers with accelerate's disk offload; llama.cpp; AirLLM. One whose packages are missing is left out with a word
(pip install accelerate; llama-cpp-python gguf; airllm sentencepiece scipy). A turn takes the prompt in one pass, the
first token, then one pass for each further token; seconds a token are the median over the latter of all rounds.

The limit is what no program can beat that keeps as much in RAM as bloomdesk: the bytes that it streams in a pass over
the rate of the disk, or all weights over the rate of the memory. Both rates are measured in every round; the brake's
counts unless the disk gives less.

WORK takes 5 times the checkpoint, 6 times where the script makes it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from scripts.bench import turns
from scripts.bench.peers import forms
from scripts.bench.turns import CannotRun, Limits, machine, say, size
from scripts.fakehub.checkpoint import TRUE_SHAPES


@dataclass(frozen=True)
class Peer:
    """A program of scripts/bench/peers, the packages that it needs, and the form of the checkpoint that it reads."""

    module: str
    needs: tuple[str, ...]
    form: Callable[[Path, Path], Path]

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


PEERS = {
    "bloomdesk": Peer("with_bloomdesk", (), lambda work, prepared: prepared),
    "bloomdesk-lossless": Peer("with_bloomdesk", (), forms.lossless),
    "tutorial": Peer("with_tutorial", ("transformers",), forms.torch_files),
    "transformers": Peer("with_transformers", ("transformers", "accelerate"), forms.hub),
    "llama.cpp": Peer("with_llama_cpp", ("llama_cpp", "gguf"), forms.gguf),
    "airllm": Peer("with_airllm", ("airllm",), forms.hub),
}
# What is made in WORK beside the prepared directory, and for whom.
FORMS = {
    "lossless": {"bloomdesk-lossless"},
    "torch": {"tutorial"},
    "hub": {"transformers", "airllm"},
    "bloom.gguf": {"llama.cpp"},
}


@dataclass(kw_only=True)
class Turn(turns.Turn):
    """A peer's turn."""

    peer: str
    round: int


class Bench:
    """All turns of one run; `given` are the options."""

    def __init__(self, given: argparse.Namespace, prepared: Path, peers: dict[str, Path]) -> None:
        self.given, self.prepared, self.peers = given, prepared, peers
        self.limits = Limits(given.ram, given.disk)
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
        given = self.given
        command = turns.module(f"scripts.bench.peers.{PEERS[name].module}", form)
        command += ["--prompt", ",".join(map(str, self.prompt)), "--tokens", given.tokens]
        command += ["--threads", given.threads, *(["--ram", given.ram] if given.ram else [])]
        for peer, setting in given.set:
            command += ["--set", setting] if peer == name else []
        turn = turns.take_turn(command, self.limits, form, given.timeout)
        self.kind = turn.group
        return Turn(**asdict(turn), peer=name, round=number)

    def rate(self, what: str) -> float:
        """Bytes a second of the memory, or of the disk under the same limits as the peers."""
        if what == "memory":
            return turns.memory_rate(self.given.threads)
        return turns.disk_rate(self.prepared, self.limits)

    def begin(self, form: Path) -> None:
        """The page cache as the turn should find it: none of the checkpoint, or all of this form and no other."""
        turns.cool({*self.peers.values(), self.prepared})
        if self.in_memory:
            forms.warm(form)

    def limit(self) -> tuple[float, str]:
        """Seconds a pass can't be faster than, and how that comes about."""
        if self.in_memory:
            total, rate = forms.weights_bytes(self.prepared), max(self.rates["memory"])
            return total / rate, f"{total / 1e9:.2f} GB of weights / {rate / 1e9:.1f} GB/s of the memory"
        streamed, how = self.streamed()
        rate = turns.rate_of_the_limit([median(self.rates["disk"]), *self.turn_rates()], self.limits)
        source = "the most that the disk gave" + (", below the brake" if self.given.disk else "")
        if rate == self.given.disk:
            source = "the brake"
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
            "benchmark": "peers",
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


def in_words(turn: Turn) -> str:
    report = turn.report
    steps = " ".join(f"{second:.3f}" for second in report["seconds"])
    return f"{steps} s; {report['settings']}; tokens {report['ids']}"


def setting(text: str) -> tuple[str, str]:
    """("llama.cpp", "n_batch=64") of "llama.cpp:n_batch=64"."""
    peer, _, rest = text.partition(":")
    if peer not in PEERS or "=" not in rest:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write PEER:NAME=VALUE")
    return peer, rest


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
    try:
        with turns.sole_worker(given.work.resolve(), Limits(given.ram, given.disk)):
            return run(given, given.work.resolve())
    except CannotRun as error:
        say(str(error))
        return 2


def run(given: argparse.Namespace, work: Path) -> int:
    """Everything from the forms of the checkpoint to the table; the exit status."""
    wanted = set(given.peers.split(","))
    more = [name for name, users in FORMS.items() if users & wanted]
    turns.check_room(work, forms.bytes_to_make(work, given.prepared, given.checkpoint, given.like, more))
    prepared = (given.prepared or forms.prepared(work, given.checkpoint, given.like)).resolve()
    peers = {}
    for name in given.peers.split(","):
        if missing := PEERS[name].missing():
            say(f"{name} is left out: {' and '.join(missing)} not installed")
        else:
            peers[name] = PEERS[name].form(work, prepared)
    bench = Bench(given, prepared, peers)
    status = 0 if turns.to_the_end(bench.run) else turns.INTERRUPTED
    state = "all in the page cache" if bench.in_memory else f"cold, control groups {bench.kind}"
    print(f"{machine(prepared)}\n{given.rounds} rounds, prompt of {given.prompt_tokens}, {state}\n")
    if any(bench.rates.values()):
        print(bench.table())
    return status


if __name__ == "__main__":
    sys.exit(main())
