"""A few tokens, timed beside the least time that this machine's disk and memory allow for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from runner.errors import BloomdeskError
from runner.estimate import rates
from runner.estimate.forecast import Forecast, forecast, limit, stored_as
from runner.estimate.rates import Rates
from runner.format.slice_set import find_slices, require_all_slices
from runner.generation.model import Model
from runner.model.forward import OnPart
from runner.model.kv_cache import KVCache
from runner.system import memory
from runner.weights.checkpoint import TORCH_DTYPES

# Any ids make a prompt; these are no special ones of a large vocabulary.
_FIRST_ID, _STEP = 1000, 37


@dataclass(frozen=True)
class Run:
    """What a prompt and some passes of one row took.

    `bytes_read_per_token` is the operating system's count of bytes from storage for each pass, None if it does not
    count. `stream_rate` is the stream's bytes a second while it read, None if it read nothing. `waiting_seconds` is
    the time that the passes of one row waited for the disk.
    """

    ram: int
    process_bytes: int
    prompt_tokens: int
    prompt_seconds: float
    pass_seconds: tuple[float, ...]
    bytes_read_per_token: float | None
    streamed_bytes_per_pass: float
    waiting_seconds: float
    stream_rate: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Bench:
    """A run, the machine's rates, and the forecast from them."""

    rates: Rates
    run: Run
    forecast: Forecast

    @property
    def seconds_per_token(self) -> float:
        """Median of the passes of one row."""
        return median(self.run.pass_seconds)

    @property
    def limit_seconds(self) -> float:
        """The least time of such a pass: streamed bytes at the disk's rate, or all weights at the memory's."""
        weights, stored = self.forecast.weight_bytes, self.forecast.stored
        return limit(weights, self.run.streamed_bytes_per_pass, self.rates, stored)


def bench(
    directory: Path,
    ram: int | None,
    tokens: int,
    prompt_tokens: int,
    on_part: OnPart | None = None,
    also: Sequence[Path] = (),
) -> Bench:
    """Times of a prompt and of `tokens` passes of one row, between two measurements of the disk.

    The parts are cold at first, so the prompt's pass reads all of them. Raises `BloomdeskError` if the directory is
    no sound prepared checkpoint, or the RAM is too little.
    """
    if tokens < 1 or prompt_tokens < 1:
        raise BloomdeskError("there must be at least one token of the prompt, and one to generate")
    slices = find_slices(directory, also)
    require_all_slices(slices)
    model, stored = slices.first.model, stored_as([*slices.manifests.values()])
    # A missing part is reported by `run`.
    paths = slices.files
    before = rates.disk_rates(paths)
    done = run(directory, ram, tokens, prompt_tokens, on_part, also)
    # Other programs may use a disk: the higher rate is the one that it can give.
    disks = tuple(map(max, before, rates.disk_rates(paths)))
    disk = rates.together(disks, [sum(path.stat().st_size for path in own) for own in paths])
    kernel = rates.kernel_rates(rates.compiled(model.dtype), TORCH_DTYPES[model.dtype])
    found = Rates(disk, *kernel, disks if len(disks) > 1 else ())
    predicted = forecast(
        model, done.ram, done.process_bytes, found, prompt_tokens, tokens, stored, slices.shares
    )
    return Bench(found, done, predicted)


def run(
    directory: Path,
    ram: int | None,
    tokens: int,
    prompt_tokens: int,
    on_part: OnPart | None,
    also: Sequence[Path] = (),
) -> Run:
    """Greedy generation of exactly `tokens` tokens: an end of text does not end it."""
    model = Model.open(directory, ram, also)
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
    now = memory.bytes_read_from_disk()
    return Run(
        ram=model.ram,
        process_bytes=model.process_nbytes,
        prompt_tokens=prompt_tokens,
        prompt_seconds=prompt_seconds,
        pass_seconds=tuple(taken),
        bytes_read_per_token=None if read is None or now is None else (now - read) / tokens,
        streamed_bytes_per_pass=(traffic.bytes_streamed - streamed) / tokens,
        waiting_seconds=traffic.waiting_seconds - waited,
        stream_rate=traffic.bytes_read / traffic.reading_seconds if traffic.reading_seconds else None,
        peak_bytes=memory.peak_memory(),
    )


def _timed_pass(
    model: Model, ids: Sequence[int], cache: KVCache, on_part: OnPart | None
) -> tuple[float, int]:
    """Seconds of a pass, and the likeliest next id."""
    began = time.perf_counter()
    logits = model.forward(ids, cache, on_part=on_part)
    following = int(logits[-1].float().argmax())
    return time.perf_counter() - began, following
