"""A few tokens, measured against the least time that this machine's disk and memory allow for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from runner.errors import BloomdeskError
from runner.estimate import rates
from runner.estimate.forecast import Forecast, coded_share, forecast, limit
from runner.estimate.rates import Rates
from runner.format.manifest import load_manifest
from runner.generation.model import Model
from runner.kernel.matmul import Kernel
from runner.kernel.threads import workers
from runner.model.forward import OnPart
from runner.model.kv_cache import KVCache
from runner.system import memory
from runner.weights.checkpoint import TORCH_DTYPES

_FIRST_ID, _STEP = 1000, 37  # any ids make a prompt; these are no special ones where the vocabulary is large


@dataclass(frozen=True)
class Run:
    """What a prompt and some passes of one row took.

    `bytes_read_per_token` is what the kernel fetched from storage for each pass, None where it does not count;
    `stream_rate` the bytes a second that the stream saw while it read, None where it read nothing.
    """

    ram: int
    process_bytes: int
    prompt_tokens: int
    prompt_seconds: float
    pass_seconds: tuple[float, ...]
    bytes_read_per_token: float | None
    streamed_bytes_per_pass: float
    waiting_seconds: float  # of these passes, for the disk
    stream_rate: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Bench:
    """A run beside the machine's rates, and what `forecast` makes of them."""

    directory: Path
    rates: Rates
    run: Run
    forecast: Forecast

    @property
    def seconds_per_token(self) -> float:
        """The median of the passes of one row."""
        return median(self.run.pass_seconds)

    @property
    def limit_seconds(self) -> float:
        """The least that a pass can take: what was streamed at the disk's rate, or all weights at the memory's."""
        found = self.forecast
        return limit(found.weight_bytes, self.run.streamed_bytes_per_pass, self.rates, found.share)


def bench(
    directory: Path, ram: int | None, tokens: int, prompt_tokens: int, on_part: OnPart | None = None
) -> Bench:
    """Measure the disk, then a prompt and `tokens` passes of one row, then disk, memory and processor.

    The parts are cold at first, so the prompt's pass reads all of them. Raises `BloomdeskError` where the directory
    is no sound prepared checkpoint, or the RAM is too little.
    """
    if tokens < 1 or prompt_tokens < 1:
        raise BloomdeskError("there must be at least one token of the prompt, and one to generate")
    manifest = load_manifest(directory)
    paths = [
        directory / file for file in manifest.parts if (directory / file).is_file()
    ]  # `run` misses the others
    before = rates.disk_rate(paths)
    measured = run(directory, ram, tokens, prompt_tokens, on_part)  # its memory is free by the next line
    dtype = TORCH_DTYPES[manifest.model.dtype]
    kernel = Kernel(dtype, workers(torch.get_num_threads()))
    disk = max(before, rates.disk_rate(paths))  # of a disk that others use as well, what it can give
    found = Rates(disk, *rates.kernel_rates(kernel, dtype))
    predicted = forecast(
        manifest.model,
        measured.ram,
        measured.process_bytes,
        found,
        prompt_tokens,
        tokens,
        coded_share(manifest),
    )
    return Bench(directory, found, measured, predicted)


def run(directory: Path, ram: int | None, tokens: int, prompt_tokens: int, on_part: OnPart | None) -> Run:
    """Greedy generation that no end of a text ends."""
    model = Model.open(directory, ram)
    vocabulary = model.weights.model.vocab_size
    ids = [(_FIRST_ID + _STEP * place) % vocabulary for place in range(prompt_tokens)]
    cache = model.cache(prompt_tokens + tokens, rows=prompt_tokens)
    traffic = model.weights.stream.traffic
    prompt_seconds, last = _timed_pass(model, ids, cache, on_part)
    read, streamed, waited = memory.bytes_read_from_disk(), traffic.bytes_streamed, traffic.waiting_seconds
    taken = []
    for _ in range(tokens):
        seconds, last = _timed_pass(model, [last], cache, on_part)
        taken.append(seconds)
    read_since = memory.bytes_read_from_disk()
    return Run(
        ram=model.ram,
        process_bytes=model.process_nbytes,
        prompt_tokens=prompt_tokens,
        prompt_seconds=prompt_seconds,
        pass_seconds=tuple(taken),
        bytes_read_per_token=(read_since - read) / tokens
        if read is not None and read_since is not None
        else None,
        streamed_bytes_per_pass=(traffic.bytes_streamed - streamed) / tokens,
        waiting_seconds=traffic.waiting_seconds - waited,
        stream_rate=traffic.bytes_fetched / traffic.reading_seconds if traffic.reading_seconds else None,
        peak_bytes=memory.peak_memory(),
    )


def _timed_pass(
    model: Model, ids: Sequence[int], cache: KVCache, on_part: OnPart | None
) -> tuple[float, int]:
    """Its seconds, and the likeliest next id."""
    began = time.perf_counter()
    logits = model.forward(ids, cache, on_part=on_part)
    following = int(logits[-1].float().argmax())
    return time.perf_counter() - began, following
