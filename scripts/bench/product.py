"""The matrix product beside torch's, by rows of x and by columns: GB/s of bfloat16 weights that go through it.

    python -m scripts.bench.product [--columns 1024,2560,4096,10240] [--rows 1,2,4,8,16,64] [--mb 128] [--json OUT]

The weights are chunks of 32 MB, as in a pass, and more of them than any cache holds. Ours runs on one thread and on
several, torch's `F.linear` on as many; in turns in one process, medians. The memory's rate is that of torch's sum over
the same bytes, on as many threads. The multipliers' is what they would take of weights if they did nothing else
(scripts/bench/multipliers.c).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from runner.system import memory
from runner.weights.chunks import LARGEST_CHUNK
from scripts.bench.harness import Column, interleaved, save, seconds, table
from scripts.bench.multipliers import multipliers
from scripts.bench.turns import machine, numbers

Case = tuple[int, int]  # rows of x, columns


def ways(weights: torch.Tensor, rows: int, threads: int) -> dict[str, Callable[[], object]]:
    """What goes once through all of `weights` [N, columns], for x of `rows` rows."""
    columns = weights.shape[1]
    chunks = weights.split(max(1, LARGEST_CHUNK // (2 * columns)))
    x, stored = torch.ones(rows, columns), torch.ones(rows, columns, dtype=weights.dtype)
    outs = [torch.zeros(rows, len(chunk)) for chunk in chunks]

    def ours(count: int) -> Callable[[], object]:
        kernel = Kernel(weights.dtype, workers(count))
        return lambda: [kernel.accumulate(x, chunk, out) for chunk, out in zip(chunks, outs, strict=True)]

    found = {f"bloomdesk, threads: {count}": ours(count) for count in sorted({1, threads})}
    found[f"torch, threads: {threads}"] = lambda: [F.linear(stored, chunk) for chunk in chunks]
    return found


def measure(buffer: torch.Tensor, case: Case, rounds: int, threads: int) -> dict[str, float]:
    """GB/s of each way, over as many of the elements of `buffer` as make whole rows."""
    rows, columns = case
    weights = buffer[: buffer.numel() // columns * columns].view(-1, columns)
    found = ways(weights, rows, threads)
    found["the memory"] = lambda: buffer.view(torch.int64).sum()
    found["the multipliers"] = multiply = multipliers(threads)
    taken = interleaved({name: partial(seconds, way) for name, way in found.items()}, rounds)
    bytes_of = dict.fromkeys(found, weights.nbytes)
    bytes_of["the multipliers"] = multiply() / rows * weights.itemsize
    return {name: bytes_of[name] / median(each) / 1e9 for name, each in taken.items()}


def shown(measured: dict[Case, dict[str, float]], columns: int) -> str:
    cases = [case for case in measured if case[1] == columns]
    titles = [Column("rows", "way"), *(Column(str(case[0]), str(case[0]), ".2f") for case in cases)]
    return table(
        titles,
        [{"way": way, **{str(case[0]): measured[case][way] for case in cases}} for way in measured[cases[0]]],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the matrix product beside torch's.")
    parser.add_argument("--columns", type=numbers, default=[1024, 2560, 4096, 10240], metavar="N,N,...")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 64], metavar="N,N,...")
    parser.add_argument("--mb", type=int, default=128, metavar="MB", help="of weights")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    buffer = torch.frombuffer(memory.anonymous(given.mb * 10**6), dtype=torch.bfloat16).fill_(0.01)
    cases = [(rows, columns) for columns in given.columns for rows in given.rows]
    with torch.inference_mode():
        measured = {case: measure(buffer, case, given.rounds, given.threads) for case in cases}
    print(machine(Path.cwd()))
    for columns in given.columns:
        print(f"\n{columns:,} columns, GB/s of weights:\n\n{shown(measured, columns)}")
    lines = [{"rows": case[0], "columns": case[1], "rates": rates} for case, rates in measured.items()]
    save(given.json, "product", {"measured": lines})


if __name__ == "__main__":
    main()
