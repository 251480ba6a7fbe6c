"""bloomdesk's runner beside its peers: the same weights, RAM and disk, in turns in one run.

    python -m scripts.bench.against_peers --work WORK --like bloom-3b --ram 3GB --disk 1.073GB/s
    python -m scripts.bench.against_peers CHECKPOINT --work WORK --ram none --disk none

RAM bounds the process and the page cache together, the disk's rate is braked, and the checkpoint's files begin cold
(scripts/bench/harness.py). With `--ram none --disk none` all
begins in the page cache, which is the mode for models that fit in RAM.

The peers are small programs in scripts/bench/peers: bloomdesk, a token a pass, and the same on a directory made with
`convert --form lossless`, whose passes read less; the tutorial of 2022, a block at a time and no KV cache;
transformers with accelerate's disk offload; llama.cpp; AirLLM; bloomdesk and llama.cpp with four bits a weight, which
are other weights with other tokens. One whose packages are missing is left out with a word (pip install accelerate;
llama-cpp-python gguf; airllm sentencepiece scipy). A turn takes the prompt in one pass, the first token, then one pass
for each further token; seconds a token are the median over the latter of all rounds.

The limit is what no program can beat that keeps as much in RAM as bloomdesk: the bytes that it streams in a pass over
the rate of the disk, or all weights over the rate of the memory. Both rates are measured in every round; the brake's
counts unless the disk gives less.

WORK takes 6 times the checkpoint, 7 times if the script makes it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench import harness, turns
from scripts.bench.harness import Benchmark, Column, Point, Row, Run, Turn
from scripts.bench.peers import forms
from scripts.bench.turns import CannotRun, say
from scripts.fakehub.checkpoint import TRUE_SHAPES


@dataclass(frozen=True)
class Peer:
    """A program of scripts/bench/peers, the packages that it needs, and the form of the checkpoint that it reads.

    `made` is the name of that form in WORK, unless it is the prepared directory.
    """

    module: str
    needs: tuple[str, ...]
    form: Callable[[Path, Path], Path]
    made: str = ""

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


PEERS = {
    "bloomdesk": Peer("with_bloomdesk", (), lambda work, prepared: prepared),
    "bloomdesk-lossless": Peer("with_bloomdesk", (), forms.lossless, "lossless"),
    "tutorial": Peer("with_tutorial", ("transformers",), forms.torch_files, "torch"),
    "transformers": Peer("with_transformers", ("transformers", "accelerate"), forms.hub, "hub"),
    "llama.cpp": Peer("with_llama_cpp", ("llama_cpp", "gguf"), forms.gguf, "bloom.gguf"),
    "bloomdesk-int4": Peer("with_bloomdesk", (), forms.int4, "int4"),
    "llama.cpp-Q4_K_M": Peer("with_llama_cpp", ("llama_cpp", "gguf"), forms.four_bits_gguf, "Q4_K_M.gguf"),
    "airllm": Peer("with_airllm", ("airllm",), forms.hub, "hub"),
}
COLUMNS = (
    Column("peer", "point"),
    Column("s/token", "seconds", ".3f"),
    Column("range of rounds", "rounds", ".3f"),
    Column("limit s", "limit", ".3f"),
    Column("x bloomdesk", "times_own"),
    Column("x limit", "times_limit"),
    Column("load s", "load_seconds"),
    Column("prompt s", "prompt_seconds"),
    Column("GB read a token", "read_bytes", ".2f", 1e9),
    Column("group's peak GB", "group_peak", ".2f", 1e9),
    Column("process's peak GB", "peak_rss", ".2f", 1e9),
    Column("tokens", "same"),
)


def setting(text: str) -> tuple[str, str]:
    """("llama.cpp", "n_batch=64") of "llama.cpp:n_batch=64"."""
    peer, _, rest = text.partition(":")
    if peer not in PEERS or "=" not in rest:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write PEER:NAME=VALUE")
    return peer, rest


def options(parser: argparse.ArgumentParser) -> None:
    harness.add_limits(parser)
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="in the Hub's layout")
    parser.add_argument("--like", choices=TRUE_SHAPES, help="make a checkpoint of these shapes instead")
    parser.add_argument("--tokens", type=int, default=5, metavar="N", help="the first is the prompt's pass")
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="A,B,...")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="PEER:NAME=VALUE")


def points(given: argparse.Namespace, work: Path) -> tuple[Path, list[Point]]:
    """A point for each peer whose packages are installed."""
    names = given.peers.split(",")
    if not (given.checkpoint or given.like or given.prepared or forms.is_prepared(work / "prepared")):
        raise CannotRun("give a CHECKPOINT, --prepared or --like")
    if given.tokens < 2:
        raise CannotRun("--tokens must be at least 2: the first is the prompt's pass")
    if unknown := set(names) - set(PEERS):
        raise CannotRun(f"unknown peers {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
    more = {PEERS[name].made for name in names} - {""}
    prepared = harness.prepared(given, work, more)
    prompt, limits = (
        harness.prompt_of(prepared, given.prompt_tokens),
        harness.limits_of(given.ram, given.disk),
    )
    made = []
    for name in names:
        if missing := PEERS[name].missing():
            say(f"{name} is left out: {' and '.join(missing)} not installed")
            continue
        form = PEERS[name].form(work, prepared)
        command = harness.peer(PEERS[name].module, form, prompt, given.tokens, given, limits)
        command += [word for own, text in given.set if own == name for word in ("--set", text)]
        made.append(Point(name, command, limits, form))
    return prepared, made


def limit(run: Run) -> tuple[float, str]:
    """Seconds that a pass takes at least, and how that is computed."""
    if run.points[0].warm:
        total, rate = forms.weights_bytes(run.prepared), max(run.memory_rates)
        return total / rate, f"{total / 1e9:.2f} GB of weights / {rate / 1e9:.1f} GB/s of the memory"
    streamed, how = streamed_bytes(run)
    found = median(rate for turn in run.turns for rate in turn.disk_rates)
    # The rate over each whole turn too: a limit is none if a peer was beyond it.
    own = [sum(turn.report["read_bytes"]) / sum(turn.report["seconds"]) for turn in run.done]
    limits = run.points[0].limits
    rate = turns.rate_of_the_limit([found, *own], limits)
    source = "the most that the disk gave" + (", below the brake" if limits.disk else "")
    source = "the brake" if rate == limits.disk else source
    return streamed / rate, f"{streamed / 1e9:.3f} GB {how} / {rate / 1e9:.3f} GB/s, {source}"


def streamed_bytes(run: Run) -> tuple[float, str]:
    """Bytes that a pass of bloomdesk takes from the disk by its plan; without its turns all weights."""
    planned = [turn.report["streamed_bytes"] for turn in run.done if turn.point == "bloomdesk"]
    return (
        (median(planned), "streamed by bloomdesk")
        if planned
        else (forms.weights_bytes(run.prepared), "of weights")
    )


def row(run: Run, point: Point, done: list[Turn], rows: list[Row]) -> Row:
    """Medians over the rounds of a peer."""
    if not all(turn.steps for turn in done):
        return {"failure": "too few tokens"}
    passes, least = harness.pass_facts(done), limit(run)[0]
    own = [second for turn in run.done if turn.point == "bloomdesk" for second in turn.steps]
    failed = sum(turn.point == point.name for turn in run.turns) - len(done)
    return {
        **passes,
        "load_seconds": median(turn.report["load_seconds"] for turn in done),
        "times_own": passes["seconds"] / median(own) if own else None,
        "limit": least,
        "times_limit": passes["seconds"] / least if least else None,
        "same": agreement(run, done) + (f", {failed} failed" if failed else ""),
    }


def agreement(run: Run, done: Sequence[Turn]) -> str:
    """Whether these turns gave the tokens of the first turn of the run that gave any."""
    first = next(turn for turn in run.done if turn.steps)
    shares = []
    for turn in done:
        pairs = list(zip(turn.report["ids"], first.report["ids"], strict=False))
        same = next((place for place, (own, other) in enumerate(pairs) if own != other), len(pairs))
        shares.append((same, len(pairs)))
    same, count = min(shares)
    return "same" if same == count else f"same until {same + 1} of {count}"


def facts(run: Run) -> dict[str, Any]:
    least = dict(zip(("seconds", "how"), limit(run), strict=True)) if run.done else None
    return {"weights_bytes": forms.weights_bytes(run.prepared), "limit": least}


def below(run: Run) -> str:
    least, how = limit(run)
    return f"The limit: {least:.3f} s, {how}."


BENCHMARK = Benchmark(
    "against_peers", "Measure bloomdesk beside its peers under the same limits.",
    options, points, row, COLUMNS, facts, below,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(harness.main(BENCHMARK))
