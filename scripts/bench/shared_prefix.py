"""What it saves to compute a shared beginning once: lines scored, prompts answered and choices drawn, both ways.

    python -m scripts.bench.shared_prefix --work WORK [--shape 512,8,6,4000] [--json OUT]

On a prepared directory of random weights, made in WORK, or on DIR with --prepared; all of it in RAM, in one process.
The beginning has 200 tokens, and each line 10 of its own:

    score                 lines of which the own tokens are scored
    score, whole lines    lines of which every token is scored
    prompts               continuations of one token, so what is counted is the reading of prompts
    choices               several continuations of the beginning alone, of one token each
    decoding              passes with a row of each of 16 sequences that share it: what joining costs later on

Ways take turns, medians of the rounds; both must give the same scores and tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch

import runner
from runner.generation import shared_prefixes
from runner.generation.model import Model
from runner.generation.options import GenerationOptions, Sampling
from runner.generation.scorer import Text
from runner.generation.sequence import Request
from scripts.bench.harness import Column, interleaved, save, table
from scripts.bench.peers import forms
from scripts.bench.turns import machine, say

SEQUENCES = 16
COLUMNS = (
    Column("", "what"),
    Column("a second, without", "without", ".2f"),
    Column("shared", "shared", ".2f"),
    Column("times", "times", ".2f"),
    Column("range of rounds", "rounds", ".2f"),
)
# What was found, and how much of it in a second.
Measured = tuple[object, float]


@contextmanager
def nothing_shared() -> Iterator[None]:
    before, shared_prefixes.LEAST_SHARED = shared_prefixes.LEAST_SHARED, sys.maxsize
    try:
        yield
    finally:
        shared_prefixes.LEAST_SHARED = before


def random_ids(model: Model, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, model.weights.model.vocab_size, (count,), generator=generator).tolist()


def scored(model: Model, lines: Sequence[Sequence[int]], first: int) -> Measured:
    """The scores of lines, and lines a second."""
    texts = [Text(index, ids, first) for index, ids in enumerate(lines)]
    began = time.perf_counter()
    found = [each.scores for each in model.scorer(texts).run()]
    return found, len(lines) / (time.perf_counter() - began)


def answered(model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Measured:
    """The first token of each continuation, and continuations a second."""
    began = time.perf_counter()
    found = model.generate_all(prompts, max_new_tokens=1, sampling=sampling)
    ids = {each.index: each.ids for each in found}
    return ids, len(ids) / (time.perf_counter() - began)


def decoded(model: Model, prompts: Sequence[Sequence[int]], passes: int) -> Measured:
    """The new tokens of each prompt, and passes a second after the first one."""
    requests = [Request(ids, passes + 1, Sampling(ignore_eos=True)) for ids in prompts]
    batch = model.batch(requests, GenerationOptions(speculate="off", batch=len(requests)))
    batch.step()
    began = time.perf_counter()
    list(batch.run())
    return [each.ids for each in batch.sequences], passes / (time.perf_counter() - began)


def without(work: Callable[[], Measured]) -> Measured:
    with nothing_shared():
        return work()


def measure(model: Model, given: argparse.Namespace) -> list[dict[str, object]]:
    beginning = random_ids(model, given.shared, 0)
    lines = [[*beginning, *random_ids(model, given.own, seed + 1)] for seed in range(given.lines)]
    choices = Sampling(temperature=1.0, seed=1, n=SEQUENCES)
    works: dict[str, Callable[[], Measured]] = {
        "score": partial(scored, model, lines, given.shared),
        "score, whole lines": partial(scored, model, lines, 1),
        "prompts": partial(answered, model, lines, Sampling()),
        "choices": partial(answered, model, [beginning], choices),
        "decoding": partial(decoded, model, lines[:SEQUENCES], 16),
    }
    rows = []
    for name, work in [list(works.items())[int(number)] for number in given.works.split(",")]:
        say(name)
        ways = {"shared": work, "without": partial(without, work)}
        turns = interleaved(ways, given.rounds, warm_up=1)
        first = turns["shared"][0][0]
        if any(found != first for each in turns.values() for found, _ in each):
            raise SystemExit(f"{name}: the results differ")
        rates = {way: [rate for _, rate in each] for way, each in turns.items()}
        pairs = [one / other for one, other in zip(rates["shared"], rates["without"], strict=True)]
        medians = {way: median(each) for way, each in rates.items()}
        rows.append({"what": name, **medians, "times": median(pairs), "rounds": pairs})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what a shared beginning saves.")
    parser.add_argument("--work", type=Path, required=True, metavar="WORK")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="instead of random weights")
    parser.add_argument("--shape", default="512,8,6,4000", metavar="HIDDEN,HEADS,BLOCKS,VOCABULARY")
    parser.add_argument("--shared", type=int, default=200, metavar="N", help="tokens of the beginning")
    parser.add_argument("--own", type=int, default=10, metavar="N", help="tokens of each line besides")
    parser.add_argument("--lines", type=int, default=64, metavar="N")
    parser.add_argument("--works", default="0,1,2,3,4", metavar="0,1,...", help="which of the five")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args(arguments)
    directory = given.prepared
    if directory is None:
        given.work.mkdir(parents=True, exist_ok=True)
        source = forms.random_weights(given.work / "source", [*map(int, given.shape.split(","))])
        directory = forms.convert(source, given.work / "prepared")
    rows = measure(runner.load(directory), given)
    print(f"{machine(Path.cwd())}\n\n{table(COLUMNS, rows)}")
    save(given.json, "shared prefix", {"measured": rows})


if __name__ == "__main__":
    main()
