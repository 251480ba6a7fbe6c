"""Scores of 1,000 lines of the miniature, beside transformers one at a time: how alike, and how many lines a second.

    python -m scripts.bench.scoring [--lines 1000] [--rounds 3]

Every line is scored by both, in turns. The reference is float64 of the same weights: its distance from transformers in
bfloat16 is what the dtype gives, and the runner's should be no other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import runner
from runner.generation.model import Model
from runner.generation.scorer import Text
from scripts.fakehub import checkpoint
from toolkit.commands.convert import convert

MINIATURE = Path(__file__).parents[2] / "miniature"
Lines = list[tuple[list[int], int]]


def lines_of(model: Model, count: int) -> Lines:
    """Token ids of prompt and answer, and the position of the first token of the answer."""
    given = [json.loads(line) for line in (MINIATURE / "unseen.jsonl").read_text().splitlines()]
    found = []
    for number in range(count):
        prompt, answer = given[number % len(given)]["prompt"], given[(number * 7) % len(given)]["answer"]
        start = model.tokenizer.encode(prompt)
        found.append((start + model.tokenizer.encode(answer), len(start)))
    return found


def ours(model: Model, lines: Lines) -> list[float]:
    """The log-probability of each line's answer, as many in a pass as the RAM has room for."""
    texts = [Text(index, ids, first) for index, (ids, first) in enumerate(lines)]
    found = {each.text.index: each.logprob for each in model.scorer(texts).run()}
    return [found[index] for index in range(len(lines))]


@torch.inference_mode()
def theirs(model: torch.nn.Module, lines: Lines) -> list[float]:
    """The same of transformers, one line at a time."""
    found = []
    for ids, first in lines:
        logits = model(torch.tensor([ids])).logits[0, first - 1 : -1]
        scores = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        found.append(float(scores.gather(1, torch.tensor(ids[first:])[:, None]).sum()))
    return found


def main() -> None:
    """Print differences and rates."""
    from transformers import BloomForCausalLM

    parser = argparse.ArgumentParser(description="Score lines beside transformers.")
    parser.add_argument("--lines", type=int, default=1000, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source, directory = Path(place) / "source", Path(place) / "bloom"
        checkpoint.miniature(source)
        convert(source, directory)
        model, peer = runner.load(directory), BloomForCausalLM.from_pretrained(source, dtype="auto").eval()
        lines = lines_of(model, given.lines)
        exact = theirs(BloomForCausalLM.from_pretrained(source, dtype=torch.float64).eval(), lines)
        seconds: dict[str, list[float]] = {"bloomdesk": [], "transformers": []}
        for _ in range(given.rounds):
            begin = time.perf_counter()
            own = ours(model, lines)
            middle = time.perf_counter()
            other = theirs(peer, lines)
            seconds["bloomdesk"].append(middle - begin)
            seconds["transformers"].append(time.perf_counter() - middle)
    for name, one, two in (
        ("bloomdesk and transformers", own, other),
        ("bloomdesk and float64", own, exact),
        ("transformers and float64", other, exact),
    ):
        apart = sorted(abs(a - b) for a, b in zip(one, two, strict=True))
        print(f"{name}: {apart[len(apart) // 2]:.4f} apart in the median, {apart[-1]:.4f} at most")
    tokens = sum(len(ids) - first for ids, first in lines)
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(
            f"{name}: {len(lines) / middle:.1f} lines a second ({tokens:,} scored tokens in {middle:.1f} s)"
        )
    ratio = statistics.median(
        b / a for a, b in zip(seconds["bloomdesk"], seconds["transformers"], strict=True)
    )
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
