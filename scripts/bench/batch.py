"""Tokens a second of one prompt, of a batch of 16, and of all means together, under the same limits.

    python -m scripts.bench.batch --work WORK --json batch.json --peers peers.json

On the checkpoint of bloom-3b's shapes that against_peers makes in the same WORK, in a control group of 3 GB with a
disk of 1.073 GB/s (scripts/bench/harness.py says how turns are taken):

    one prompt                      a token a pass, nothing proposed
    batch                           16 prompts of 16 tokens share each pass
    batch, lookup                   with draft tokens of prompt lookup, hardly ever right in a text of random weights
    lossless                        one prompt on the lossless form
    lossless, batch, lookup         all means together
    useless draft                   one prompt with a draft of random weights, which is hardly ever right

Tokens a second are counted from the first pass that carries no prompt any more. The same prompt must get the same
tokens in every way. With --peers, a result of against_peers, all means together are compared with its best peer.

WORK takes 3 times the checkpoint, and a little for the draft.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from runner.format.manifest import load_manifest
from scripts.bench import harness
from scripts.bench.harness import Benchmark, Column, Point, Row, Run, Turn
from scripts.bench.peers import forms
from scripts.fakehub.checkpoint import TRUE_SHAPES

DRAFT_SHAPE = (256, 4, 4)  # hidden size, heads, blocks
PLAIN, TOGETHER = "one prompt", "lossless, batch, lookup"


@dataclass(frozen=True)
class Way:
    """How prompts are generated: on which form, how many at a time, and what proposes tokens."""

    lossless: bool = False
    batched: bool = False
    speculate: str = "off"
    draft: bool = False


WAYS = {
    PLAIN: Way(),
    "batch": Way(batched=True),
    "batch, lookup": Way(batched=True, speculate="lookup"),
    "lossless": Way(lossless=True),
    TOGETHER: Way(lossless=True, batched=True, speculate="lookup"),
    "useless draft": Way(draft=True),
}
COLUMNS = (
    Column("way", "point"),
    Column("tokens/s", "tokens_per_second", ".3f"),
    Column("range of rounds", "rounds", ".3f"),
    Column("x one prompt", "times_plain"),
    Column("in a pass", "batch", "d"),
    Column("s/pass", "seconds_per_pass"),
    Column("tokens/pass", "tokens_per_pass"),
    Column("read GB", "read_bytes", ".2f", 1e9),
    Column("proposed", "proposed", "d"),
    Column("right", "accepted", "d"),
    Column("drafting s", "drafting_seconds"),
    Column("group's peak GB", "group_peak", ".2f", 1e9),
    Column("tokens", "same"),
)


def options(parser: argparse.ArgumentParser) -> None:
    harness.add_like(parser)
    harness.add_limits(parser)
    parser.add_argument("--lossless", type=Path, metavar="DIR", help="its lossless form; else WORK's")
    parser.add_argument("--draft-like", choices=TRUE_SHAPES, help="the draft's shapes; default: very small")
    parser.add_argument("--ways", default=",".join(map(str, range(len(WAYS)))), metavar="0,1,...")
    parser.add_argument("--batch", type=int, default=16, metavar="N")
    parser.add_argument("--tokens", type=int, default=6, metavar="N", help="new ones of each prompt")
    parser.add_argument("--draft-tokens", type=int, default=32, metavar="N", help="new ones with the draft")
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--peers", type=Path, metavar="PEERS.json", help="what against_peers wrote")


def points(given: argparse.Namespace, work: Path) -> tuple[Path, list[Point]]:
    """A point for each way."""
    prepared = harness.prepared(given, work, [] if given.lossless else ["lossless"])
    lossless = (given.lossless or forms.lossless(work, prepared)).resolve()
    draft = useless_draft(work, given.draft_like, load_manifest(prepared).model.vocab_size)
    prompt, limits = (
        harness.prompt_of(prepared, given.prompt_tokens),
        harness.limits_of(given.ram, given.disk),
    )
    made = []
    for name, way in (list(WAYS.items())[int(number)] for number in given.ways.split(",")):
        form = lossless if way.lossless else prepared
        tokens = given.draft_tokens if way.draft else given.tokens
        command = harness.peer("batch_passes", form, prompt, tokens, given, limits)
        settings = {"batch": given.batch if way.batched else 1, "speculate": way.speculate}
        settings |= {"draft": draft} if way.draft else {}
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        made.append(Point(name, command, limits, form))
    return prepared, made


def useless_draft(work: Path, like: str | None, vocabulary: int) -> Path:
    """A prepared directory of random weights that has the same tokenizer."""
    directory = work / (f"draft-{like}" if like else "draft")
    if not forms.is_prepared(directory):
        shape = (*(TRUE_SHAPES[like] if like else DRAFT_SHAPE), vocabulary)
        source = forms.random_weights(work / f"{directory.name}-source", shape, seed=1)
        forms.convert(source, directory, "--delete-source")
    return directory


def steady(turn: Turn) -> list[dict[str, Any]]:
    """The passes without rows of a prompt."""
    return [each for each in turn.report["passes"] if not each["prompt"]]


def tokens_per_second(turn: Turn) -> float:
    return sum(each["tokens"] for each in steady(turn)) / sum(each["seconds"] for each in steady(turn))


def row(run: Run, point: Point, done: list[Turn], rows: list[Row]) -> Row:
    """Medians over the rounds of a way."""
    passes = [each for turn in done for each in steady(turn)]
    if not all(map(steady, done)):
        return {"failure": "every pass carried a prompt: give more --tokens"}
    rounds = [tokens_per_second(turn) for turn in done]
    rate = median(rounds)
    plain = rate if point.name == PLAIN else None
    plain = next((each.get("tokens_per_second") for each in rows if each["point"] == PLAIN), plain)
    reports = [turn.report for turn in done]
    return {
        "tokens_per_second": rate,
        "rounds": rounds,
        "times_plain": rate / plain if plain else None,
        "batch": reports[0]["batch"],
        "seconds_per_pass": median(each["seconds"] for each in passes),
        "tokens_per_pass": sum(each["tokens"] for each in passes) / len(passes),
        "read_bytes": median(each["read_bytes"] for each in passes),
        "streamed_bytes": median(report["streamed_bytes"] for report in reports),
        "proposed": sum(report["proposed"] for report in reports),
        "accepted": sum(report["accepted"] for report in reports),
        "drafting_seconds": median(report["drafting_seconds"] for report in reports),
        "same": "same" if same(run, done) else "DIFFERENT",
    }


def same(run: Run, done: Sequence[Turn]) -> bool:
    """Whether each prompt got the tokens that it got first in this run, in the length that both have."""
    first: dict[int, list[int]] = {}
    for turn in run.done:
        for place, ids in enumerate(turn.report["ids"]):
            first.setdefault(place, ids)
    return all(
        all(own == other for own, other in zip(ids, first[place], strict=False))
        for turn in done
        for place, ids in enumerate(turn.report["ids"])
    )


def facts(run: Run) -> dict[str, Any]:
    return {"bytes": {point.form.name: forms.weights_bytes(point.form) for point in run.points}}


def below(run: Run) -> str:
    return beside_peers(run.measured(BENCHMARK), run.given.peers) if run.given.peers else ""


def beside_peers(rows: Sequence[Row], peers: Path) -> str:
    """All means together against the quickest of the others in a result of against_peers."""
    others = [row for row in json.loads(peers.read_text())["measured"] if "seconds" in row]
    best, name = min(
        (row["seconds"], row["point"]) for row in others if not row["point"].startswith("bloomdesk")
    )
    own = next((row.get("tokens_per_second") for row in rows if row["point"] == TOGETHER), None)
    compared = f"; all means together are {own * best:.1f} times that" if own else ""
    return f"The best peer, {name}: {1 / best:.3f} tokens a second{compared}."


BENCHMARK = Benchmark(
    "batch", "Measure batches, lookup and the lossless form together.",
    options, points, row, COLUMNS, facts, below,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(harness.main(BENCHMARK))
