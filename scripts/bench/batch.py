"""Tokens a second of one prompt, of a batch of 16, and of all means together, under the same limits.

    python -m scripts.bench.batch --work WORK --json batch.json --peers peers.json

On the checkpoint of bloom-3b's shapes that bench_peers.py makes in the same WORK, in a control group of 3 GB with a
disk of 1.073 GB/s. Each turn is a fresh process that finds every file cold; the ways take turns, round by round:

    one prompt                      a token a pass, nothing proposed
    batch                           16 prompts of 16 tokens share each pass
    batch, lookup                   with proposals, which are hardly ever right in a text of random weights
    lossless                        one prompt on the lossless form
    lossless, batch, lookup         all means together
    useless draft                   one prompt with a draft of random weights, which is hardly ever right

Tokens a second are counted from the first pass that carries no prompt any more. The same prompt must get the same
tokens in every way. With --peers, a result of bench_peers.py, all means together are compared with its best peer.

WORK takes 3 times the checkpoint, and a little for the draft.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from runner.format.manifest import load_manifest
from scripts.bench import turns
from scripts.bench.peers import forms
from scripts.bench.turns import CannotRun, Limits, machine, say, size
from scripts.fakehub.checkpoint import TRUE_SHAPES, synthetic

DRAFT_SHAPE = {"hidden_size": 256, "heads": 4, "blocks": 4}
PLAIN, TOGETHER = "one prompt", "lossless, batch, lookup"


@dataclass(frozen=True)
class Way:
    """How prompts are generated: on which form, how many at a time, and what proposes."""

    name: str
    lossless: bool = False
    batched: bool = False
    speculate: str = "off"
    draft: bool = False


WAYS = (
    Way(PLAIN),
    Way("batch", batched=True),
    Way("batch, lookup", batched=True, speculate="lookup"),
    Way("lossless", lossless=True),
    Way(TOGETHER, lossless=True, batched=True, speculate="lookup"),
    Way("useless draft", draft=True),
)


@dataclass(kw_only=True)
class Turn(turns.Turn):
    way: str
    round: int

    @property
    def steady(self) -> list[dict[str, Any]]:
        """The passes without rows of a prompt; none of a turn that failed."""
        return [] if self.failure else [each for each in self.report["passes"] if not each["prompt"]]

    @property
    def tokens_per_second(self) -> float:
        return sum(each["tokens"] for each in self.steady) / sum(each["seconds"] for each in self.steady)


class Bench:
    """All turns of one run; `given` are the options."""

    def __init__(self, given: argparse.Namespace, prepared: Path, lossless: Path, draft: Path) -> None:
        self.given, self.prepared, self.lossless, self.draft = given, prepared, lossless, draft
        self.limits = Limits(given.ram, given.disk)
        choose = random.Random(0)
        vocabulary = load_manifest(prepared).model.vocab_size
        self.prompt = [choose.randrange(4, vocabulary) for _ in range(given.prompt_tokens)]
        self.turns: list[Turn] = []
        self.disk_rates: list[float] = []

    def run(self) -> None:
        for number in range(1, self.given.rounds + 1):
            self.disk_rates.append(turns.disk_rate(self.prepared, self.limits))
            say(f"round {number}: the disk gives {self.disk_rates[-1] / 1e9:.3f} GB/s")
            for way in self.given.ways:
                turn = self.turn(way, number)
                self.turns.append(turn)
                say(f"round {number}: {way.name}: {turn.failure or in_words(turn)}")
                self.save()

    def turn(self, way: Way, number: int) -> Turn:
        form = self.lossless if way.lossless else self.prepared
        turns.cool([self.prepared, self.lossless, self.draft])
        tokens = self.given.draft_tokens if way.draft else self.given.tokens
        command = turns.module("scripts.bench.peers.batch_passes", form, "--tokens", tokens)
        command += ["--prompt", ",".join(map(str, self.prompt)), "--threads", self.given.threads]
        command += ["--ram", self.given.ram] if self.given.ram else []
        command += ["--set", f"batch={self.given.batch if way.batched else 1}"]
        command += ["--set", f"speculate={way.speculate}"]
        command += ["--set", f"draft={self.draft}"] if way.draft else []
        turn = turns.take_turn(command, self.limits, form, self.given.timeout)
        found = Turn(**asdict(turn), way=way.name, round=number)
        if not found.failure and not found.steady:
            found.failure = "every pass carried a prompt: give more --tokens"
        return found

    def measured(self) -> list[dict[str, Any]]:
        """Medians over the rounds, by way."""
        rows, plain = [], None
        for way in self.given.ways:
            done = [turn for turn in self.turns if turn.way == way.name and turn.steady]
            if not done:
                failures = {turn.failure or "" for turn in self.turns if turn.way == way.name}
                rows.append({"way": way.name, "failure": "; ".join(failures) or "no turn yet"})
                continue
            passes = [each for turn in done for each in turn.steady]
            rounds = [turn.tokens_per_second for turn in done]
            rate = median(rounds)
            plain = rate if way.name == PLAIN else plain
            rows.append(
                {
                    "way": way.name,
                    "tokens_per_second": rate,
                    "rounds": rounds,
                    "times_plain": rate / plain if plain else None,
                    "batch": done[0].report["batch"],
                    "seconds_per_pass": median(each["seconds"] for each in passes),
                    "tokens_per_pass": sum(each["tokens"] for each in passes) / len(passes),
                    "read_bytes": median(each["read_bytes"] for each in passes),
                    "streamed_bytes": median(turn.report["streamed_bytes"] for turn in done),
                    "proposed": sum(turn.report["proposed"] for turn in done),
                    "accepted": sum(turn.report["accepted"] for turn in done),
                    "drafting_seconds": median(turn.report["drafting_seconds"] for turn in done),
                    "group_peak": max(turn.group_peak or 0 for turn in done) or None,
                    "same": self.same(done),
                }
            )
        return rows

    def same(self, done: Sequence[Turn]) -> bool:
        """Whether each prompt got the tokens that it got first in this run, as far as both go."""
        first: dict[int, list[int]] = {}
        for turn in (turn for turn in self.turns if turn.steady):
            for place, ids in enumerate(turn.report["ids"]):
                first.setdefault(place, ids)
        return all(
            all(own == other for own, other in zip(ids, first[place], strict=False))
            for turn in done
            for place, ids in enumerate(turn.report["ids"])
        )

    def save(self) -> None:
        """Everything so far as JSON, where it was asked for."""
        if not self.given.json:
            return
        body = {
            "benchmark": "batch",
            "machine": machine(self.prepared),
            "ram": self.given.ram,
            "disk": self.given.disk,
            "control_group": self.turns[-1].group,
            "threads": self.given.threads,
            "disk_rates": self.disk_rates,
            "bytes": {
                "plain": forms.weights_bytes(self.prepared),
                "lossless": forms.weights_bytes(self.lossless),
                "draft": forms.weights_bytes(self.draft),
            },
            "measured": self.measured(),
            "turns": [asdict(turn) for turn in self.turns],
        }
        self.given.json.write_text(json.dumps(body, indent=1) + "\n")


def in_words(turn: Turn) -> str:
    passes = " ".join(f"{each['seconds']:.2f}" for each in turn.report["passes"])
    return f"{turn.tokens_per_second:.3f} tokens a second; passes of {passes} s"


COLUMNS = (
    "way",
    "tokens/s",
    "range of rounds",
    "x one prompt",
    "in a pass",
    "s/pass",
    "tokens/pass",
    "read GB",
    "proposed",
    "right",
    "drafting s",
    "group's peak GB",
    "tokens",
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "failure" in row:
            lines.append((f"{row['way']}: {row['failure']}", *[""] * (len(COLUMNS) - 1)))
            continue
        lines.append(
            (
                row["way"],
                f"{row['tokens_per_second']:.3f}",
                f"{min(row['rounds']):.3f} to {max(row['rounds']):.3f}",
                f"{row['times_plain']:.2f}" if row["times_plain"] else "",
                str(row["batch"]),
                f"{row['seconds_per_pass']:.2f}",
                f"{row['tokens_per_pass']:.2f}",
                f"{row['read_bytes'] / 1e9:.2f}",
                str(row["proposed"]),
                str(row["accepted"]),
                f"{row['drafting_seconds']:.2f}",
                f"{row['group_peak'] / 1e9:.2f}" if row["group_peak"] else "",
                "same" if row["same"] else "DIFFERENT",
            )
        )
    return turns.table(COLUMNS, lines)


def beside_peers(rows: Sequence[dict[str, Any]], peers: Path) -> str:
    """All means together against the quickest of the others in a result of bench_peers.py."""
    seconds: dict[str, list[float]] = {}
    for turn in json.loads(peers.read_text())["turns"]:
        if not turn["failure"] and not turn["peer"].startswith("bloomdesk"):
            seconds.setdefault(turn["peer"], []).extend(turn["report"]["seconds"][1:])
    best, name = min((median(steps), name) for name, steps in seconds.items() if steps)
    own = next((row["tokens_per_second"] for row in rows if row["way"] == TOGETHER and "rounds" in row), None)
    compared = f"; all means together are {own * best:.1f} times that" if own else ""
    return f"The best peer, {name}: {1 / best:.3f} tokens a second{compared}."


def useless_draft(work: Path, like: str | None, vocabulary: int) -> Path:
    """A prepared directory of random weights that has the same tokenizer."""
    directory = work / (f"draft-{like}" if like else "draft")
    if not (directory / "manifest.backup.json").exists():
        shape = (
            dict(zip(DRAFT_SHAPE, TRUE_SHAPES[like], strict=True)) if like else DRAFT_SHAPE
        )  # hidden size, heads, blocks
        source = work / f"{directory.name}-source"
        synthetic(source, **shape, vocab_size=vocabulary, seed=1, normal_embedding=True)
        command = turns.module("toolkit.cli.app", "convert", source, directory, "--delete-source")
        subprocess.run(list(map(str, command)), cwd=turns.ROOT, stdout=sys.stderr, check=True)
    return directory


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure batches, lookup and the lossless form together.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--like", choices=TRUE_SHAPES, default="bloom-3b", help="the shapes that WORK gets")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="a prepared directory; else WORK's")
    parser.add_argument("--lossless", type=Path, metavar="DIR", help="its lossless form; else WORK's")
    parser.add_argument(
        "--draft-like", choices=TRUE_SHAPES, help="the draft's shapes; default: a very small one"
    )
    parser.add_argument("--ways", default=",".join(str(i) for i in range(len(WAYS))), metavar="0,1,...")
    parser.add_argument("--ram", type=size, default="3GB", metavar="SIZE")
    parser.add_argument("--disk", type=size, default="1.073GB/s", metavar="RATE")
    parser.add_argument("--batch", type=int, default=16, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=6, metavar="N", help="new ones of each prompt")
    parser.add_argument("--draft-tokens", type=int, default=32, metavar="N", help="new ones with the draft")
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one turn")
    parser.add_argument("--peers", type=Path, metavar="PEERS.json", help="what bench_peers.py wrote")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    given.ram = given.ram and int(given.ram)
    given.ways = [WAYS[int(number)] for number in given.ways.split(",")]
    return given


def main() -> int:
    given = options()
    work = given.work.resolve()
    try:
        with turns.sole_worker(work, Limits(given.ram, given.disk)):
            more = [] if given.lossless else ["lossless"]
            turns.check_room(work, forms.bytes_to_make(work, given.prepared, None, given.like, more))
            prepared = (given.prepared or forms.prepared(work, None, given.like)).resolve()
            lossless = (given.lossless or forms.lossless(work, prepared)).resolve()
            draft = useless_draft(work, given.draft_like, load_manifest(prepared).model.vocab_size)
            bench = Bench(given, prepared, lossless, draft)
            to_the_end = turns.to_the_end(bench.run)
    except CannotRun as error:
        say(str(error))
        return 2
    rows = bench.measured()
    print(f"{machine(prepared)}\nprompts of {given.prompt_tokens}, {bench.limits}\n\n{table(rows)}")
    if given.peers:
        print(f"\n{beside_peers(rows, given.peers)}")
    return 0 if to_the_end else turns.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
