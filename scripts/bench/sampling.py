"""What choosing a token takes at BLOOM's vocabulary, beside a pass that reads the weights from a disk.

    python -m scripts.bench.sampling [--rounds 9] [--disk 1e9]

The share is of a pass over bloom-3b (6 GB of bfloat16, 250,880 rows in the head) on a disk of that many bytes a second,
and of bloom (352 GB).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from runner.generation.options import Sampling
from runner.generation.sampling import Sampler
from runner.generation.scoring import score

VOCABULARY = 250_880
PASSES = {"bloom-3b": 6.0e9, "bloom": 352.5e9}
PROMPT, TEXT = list(range(100, 1100)), list(range(500, 900))
SETTINGS = {
    "the likeliest": Sampling(),
    "temperature 0.8": Sampling(temperature=0.8, seed=1),
    "top k 50": Sampling(temperature=0.8, top_k=50, seed=1),
    "top p 0.95": Sampling(temperature=0.8, top_p=0.95, seed=1),
    "min p 0.05": Sampling(temperature=0.8, min_p=0.05, seed=1),
    "penalties": Sampling(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
    "all of them": Sampling(1.0, 50, 0.95, 0.05, 1.2, 0.5, 0.5, {7: 1.0}, seed=1),
}


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """The median of several runs, after one that is left out."""
    work()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Print milliseconds a token, and the shares of a pass."""
    parser = argparse.ArgumentParser(description="Time the choice of a token.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--disk", type=float, default=1e9, metavar="BYTES", help="a second")
    given = parser.parse_args()
    torch.manual_seed(0)
    row = (torch.randn(VOCABULARY) * 2).bfloat16()
    work: dict[str, Callable[[], object]] = {}
    for name, sampling in SETTINGS.items():
        sampler = Sampler(sampling, PROMPT, [2])
        work[name] = lambda sampler=sampler: sampler.choose(row, TEXT)
    for count in (0, 20):
        work[f"log-probabilities, {count} others"] = lambda count=count: score(row, 5, count)
    names = list(work)
    random.Random(1).shuffle(names)
    found = {name: seconds_of(work[name], given.rounds) for name in names}
    for name in work:
        shares = ", ".join(
            f"{found[name] / (size / given.disk):.3%} of a pass of {model}" for model, size in PASSES.items()
        )
        print(f"{name}: {found[name] * 1000:.2f} ms, {shares}")


if __name__ == "__main__":
    main()
