"""Products with bfloat16 weights in every form, beside the memory: billions of weights and GB of stored bytes a second.

    python -m scripts.bench.form_products [--rows 1,16] [--outputs 24576] [--columns 4096] [--rounds 9] [--json OUT]

The weights are normal, one matrix in each form. Ours runs on one thread and on several, in turns in one process;
medians. The memory's rate is that of torch's sum over the same stored bytes, on as many threads.
`BLOOMDESK_KERNEL=avx2` takes that variant.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from runner.format.quantised import CODINGS, Coding
from runner.kernel.encode import encode_row_groups
from runner.kernel.library import ENVIRONMENT, usable_variants
from runner.kernel.matmul import Kernel
from runner.kernel.quantised import quantise_rows
from runner.kernel.threads import workers
from runner.weights.chunks import STORED_DTYPES
from scripts.bench.harness import Column, interleaved, save, seconds, table
from scripts.bench.turns import machine, numbers

# Adds the product of x [T, K] to out [T, N].
Product = Callable[[Kernel, torch.Tensor, torch.Tensor], object]


@dataclass(frozen=True)
class Stored:
    """A matrix in one form: the tensors that store it, and its product."""

    tensors: Sequence[torch.Tensor]
    product: Product

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.tensors)

    def sum(self) -> None:
        """Go once through all whole int64 numbers in its memory."""
        for each in self.tensors:
            each.view(-1).view(torch.uint8)[: each.nbytes // 8 * 8].view(torch.int64).sum()


def lossless(weights: torch.Tensor, data: bytearray) -> Stored:
    coded, lengths = encode_row_groups(data, weights.shape[1])
    held = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return Stored([held], lambda kernel, x, out: kernel.accumulate_coded(x, held, offsets, out))


def quantised(weights: torch.Tensor, data: bytearray, coding: Coding) -> Stored:
    integers, scales = quantise_rows(data, weights.shape[1], coding, "BF16")
    held = torch.frombuffer(integers, dtype=STORED_DTYPES[coding.dtype]).view(coding.shape(weights.shape))
    own = torch.frombuffer(scales, dtype=STORED_DTYPES[coding.scale_dtype])
    own = own.view(coding.scales_shape(weights.shape))
    return Stored([held, own], lambda kernel, x, out: kernel.accumulate_quantised(x, held, own, coding, out))


def every_form(outputs: int, columns: int) -> dict[str, Stored]:
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(outputs, columns, generator=generator) * 0.02).bfloat16()
    data = bytearray(weights.view(torch.uint8).numpy().tobytes())
    return {
        "plain": Stored([weights], lambda kernel, x, out: kernel.accumulate(x, weights, out)),
        "lossless": lossless(weights, data),
        **{name: quantised(weights, data, coding) for name, coding in CODINGS.items()},
    }


def summed(stored: Stored, threads: int) -> float:
    """Seconds that torch takes to sum the same bytes."""
    torch.set_num_threads(threads)
    return seconds(stored.sum)


def measure(
    forms: dict[str, Stored], shape: tuple[int, int], rows: int, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """For each form its rates and their share of the memory's."""
    outputs, columns = shape
    kernel = Kernel(torch.bfloat16, workers(threads))
    x, out = torch.randn(rows, columns), torch.zeros(rows, outputs)
    ways: dict[str, Callable[[], float]] = {}
    for name, stored in forms.items():
        ways[name] = partial(seconds, partial(stored.product, kernel, x, out))
        ways[f"{name}, memory"] = partial(summed, stored, threads)
    taken = {name: median(each) for name, each in interleaved(ways, rounds, warm_up=1).items()}
    return [
        {
            "form": name,
            "rows": rows,
            "threads": threads,
            "weights": outputs * columns / taken[name],
            "bytes": stored.nbytes / taken[name],
            "memory": stored.nbytes / taken[f"{name}, memory"],
            "share": taken[f"{name}, memory"] / taken[name],
        }
        for name, stored in forms.items()
    ]


TITLES = (
    Column("form", "form"),
    Column("billion weights/s", "weights", ".1f", 1e9),
    Column("GB/s stored", "bytes", ".1f", 1e9),
    Column("memory GB/s", "memory", ".1f", 1e9),
    Column("of the memory", "share"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure products with weights in every form.")
    parser.add_argument("--rows", type=numbers, default=[1, 16], metavar="N,N,...")
    parser.add_argument("--outputs", type=int, default=24_576, metavar="N")
    parser.add_argument("--columns", type=int, default=4096, metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args(arguments)
    shape, lines = (given.outputs, given.columns), []
    forms, variant = every_form(*shape), os.environ.get(ENVIRONMENT) or usable_variants()[-1]
    print(machine(Path.cwd()))
    with torch.inference_mode():
        for rows, threads in itertools.product(given.rows, sorted({1, given.threads})):
            found = measure(forms, shape, rows, threads, given.rounds)
            print(f"\n{variant}, rows: {rows}, threads: {threads}\n\n{table(TITLES, found)}", flush=True)
            lines += found
    save(given.json, "form_products", {"variant": variant, "measured": lines})


if __name__ == "__main__":
    main()
