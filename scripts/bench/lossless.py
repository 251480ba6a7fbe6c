"""Ways to keep bfloat16 weights in fewer bytes, side by side: what is left, and how fast they come back.

    python -m scripts.bench.lossless [DIR/block_00.safetensors] [--mb 192] [--rounds 5] [--json OUT]

Without a file the weights are normal ones. Each way decodes the same bytes on one thread, then on several, each thread
its own copy; ours also as a pass does it, decoding inside the product of one row, beside the product of the weights as
they are. In turns, medians; every way's result is compared with the weights first. A fixed 4-bit code is arithmetic:
its share is counted, not timed. Ways whose packages are missing are left out (pip install zstandard zipnn).

The last table is about drives: the lossless form is faster than the plain one on those below the rate of its decoder,
which is taken to grow with the cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from runner.format.coded import ROW_GROUP_ROWS
from runner.format.safetensors import read_header
from runner.kernel.decode import decode_row_groups
from runner.kernel.encode import encode_row_groups
from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from scripts.bench import harness
from scripts.bench.harness import Column, interleaved, save, table

COLUMNS = 4096
CORES = (2, 6, 8)
Decode = Callable[[], object]


def given_weights(path: Path | None, nbytes: int) -> torch.Tensor:
    """[N, COLUMNS] bfloat16, N a multiple of a row group's rows: a part's largest matrix, or normal ones."""
    rows = nbytes // (2 * COLUMNS) // ROW_GROUP_ROWS * ROW_GROUP_ROWS
    if path is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rows, COLUMNS, generator=generator).mul_(0.02).bfloat16()
    entry = max(read_header(path).tensors.values(), key=lambda entry: entry.nbytes)
    with path.open("rb") as file:
        file.seek(entry.start)
        data = bytearray(file.read(min(entry.nbytes, nbytes)))
    whole = len(data) // (2 * COLUMNS * ROW_GROUP_ROWS) * ROW_GROUP_ROWS
    return torch.frombuffer(data, dtype=torch.bfloat16, count=whole * COLUMNS).view(whole, COLUMNS)


def ours(weights: torch.Tensor) -> tuple[int, Callable[[], Decode]]:
    """Bytes when coded, and what makes a decoder with memory of its own."""
    data = as_bytes(weights)
    coded, lengths = encode_row_groups(data, COLUMNS)
    offsets = [0, *itertools.accumulate(lengths)]

    def make() -> Decode:
        source, out = bytearray(coded), bytearray(len(data))

        def decode() -> bytearray:
            decode_row_groups(source, offsets, weights.shape[0], COLUMNS, out)
            return out

        assert decode() == data
        return decode

    return len(coded), make


def zstd(weights: torch.Tensor) -> tuple[int, Callable[[], Decode]]:
    """zstandard on the bytes of the exponents alone; bringing them and the others together is not timed."""
    import zstandard

    data = as_bytes(exponents(weights).to(torch.uint8))
    packed = zstandard.ZstdCompressor(level=1).compress(data)
    assert zstandard.ZstdDecompressor().decompress(packed) == data

    def make() -> Decode:
        decompressor = zstandard.ZstdDecompressor()
        return lambda: decompressor.decompress(packed)

    return len(packed) + weights.numel(), make


def zipnn(weights: torch.Tensor) -> tuple[int, Callable[[], Decode]]:
    """ZipNN, which orders bytes and takes a Huffman code."""
    from zipnn import ZipNN

    coder = ZipNN(bytearray_dtype="bfloat16", threads=1)
    packed = coder.compress(as_bytes(weights))
    assert bytes(coder.decompress(packed)) == as_bytes(weights)

    def make() -> Decode:
        own = ZipNN(bytearray_dtype="bfloat16", threads=1)
        return lambda: own.decompress(packed)

    return len(packed), make


WAYS = {"bloomdesk": ours, "zstd on the exponents, not merged": zstd, "ZipNN": zipnn}


def as_bytes(tensor: torch.Tensor) -> bytearray:
    return bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def exponents(weights: torch.Tensor) -> torch.Tensor:
    return ((weights.view(torch.int16) >> 7) & 0xFF).flatten()


def fixed_code(weights: torch.Tensor) -> float:
    """The share of a code of 4 bits for the 15 commonest exponents, with a byte for the others."""
    counts = exponents(weights).bincount(minlength=256).sort(descending=True)
    rare = 1 - counts.values[:15].sum().item() / weights.numel()
    return (8 + 4 + 8 * rare) / 16


def entropy(weights: torch.Tensor) -> float:
    """The share of an ideal code of the exponents, one at a time."""
    counts = exponents(weights).bincount().double()
    shares = counts[counts > 0] / weights.numel()
    return (8 - (shares * shares.log2()).sum().item()) / 16


def decoding(weights: torch.Tensor, rounds: int, cores: int) -> dict[str, dict[str, float]]:
    """For each way its share, and the rates of decoded bytes on one core and on all."""
    makers, shares = {}, {}
    for name, way in WAYS.items():
        try:
            nbytes, makers[name] = way(weights)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        shares[name] = nbytes / weights.nbytes

    def decoded(make: Callable[[], Decode], count: int) -> float:
        decoders = [make() for _ in range(count)]
        harness.at_once(decoders)  # their memory is touched once before
        return harness.at_once(decoders)

    ways = itertools.product(makers.items(), {1, cores})
    timed = {f"{name} {count}": partial(decoded, make, count) for (name, make), count in ways}
    taken = interleaved(timed, rounds)
    return {
        name: {
            "share": shares[name],
            "one": weights.nbytes / median(taken[f"{name} 1"]),
            "all": cores * weights.nbytes / median(taken[f"{name} {cores}"]),
        }
        for name in makers
    }


def products(weights: torch.Tensor, rounds: int, cores: int) -> dict[str, float]:
    """Rates of weights in a product of one row: as they are, and coded, on one core and on all."""
    data, lengths = encode_row_groups(as_bytes(weights), COLUMNS)
    coded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    x, out = torch.ones(1, COLUMNS), torch.zeros(1, len(weights))
    ways: dict[str, Callable[[], object]] = {}
    for count in {1, cores}:
        kernel = Kernel(torch.bfloat16, workers(count))
        ways[f"plain {count}"] = partial(kernel.accumulate, x, weights, out)
        ways[f"coded {count}"] = partial(kernel.accumulate_coded, x, coded, offsets, out)
    timed = {name: partial(harness.seconds, way) for name, way in ways.items()}
    taken = interleaved(timed, rounds, warm_up=1)  # the first round compiles
    return {name: weights.nbytes / median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Lossless forms of bfloat16 weights, side by side.")
    parser.add_argument("file", type=Path, nargs="?", help="a plain prepared part; else normal weights")
    parser.add_argument("--mb", type=int, default=192, help="megabytes of weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args()
    cores = os.cpu_count() or 1
    weights = given_weights(given.file, given.mb * 10**6)
    ways = decoding(weights, given.rounds, cores)
    product = products(weights, given.rounds, cores)
    arithmetic = {"a fixed 4-bit code": fixed_code(weights), "the exponents' entropy": entropy(weights)}
    rows = [{"way": name, **found} for name, found in ways.items()]
    rows += [{"way": name, "share": share} for name, share in arithmetic.items()]
    rates = [Column("GB/s, 1 core", "one", ".2f", 1e9), Column(f"{cores} cores", "all", ".2f", 1e9)]
    share = Column("of bfloat16's bytes", "share", ".3f")
    print(table([Column("way to decode", "way"), share, *rates], rows))
    rows = [{"way": n, "one": product[f"{n} 1"], "all": product[f"{n} {cores}"]} for n in ("plain", "coded")]
    print(f"\n{table([Column('product of one row', 'way'), *rates], rows)}\n")
    rows = [{"cores": str(count), "rate": product["coded 1"] * count} for count in CORES]
    print(table([Column("cores", "cores"), Column("faster on drives below, GB/s", "rate", ".1f", 1e9)], rows))
    save(given.json, "lossless", {"cores": cores, "ways": ways, "products": product})


if __name__ == "__main__":
    main()
