"""Whole passes of models in many small chunks: the same bits whatever stays, and on any file system."""

from __future__ import annotations

import errno
import gc
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runner.generation.memory_plan
import runner.kernel.matmul
import runner.weights.ring
from runner.generation.model import Model
from runner.system import files, platform
from runner.weights import chunks
from tests.support.streaming import (
    IDS,
    SMALL_CHUNK,
    arrangement,
    logits_of,
    opened,
    promptly,
    readers_alive,
    soon,
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("readers", "threads", "largest"),
    [(1, 2, SMALL_CHUNK), (2, 1, 4096 * 3), (4, 3, SMALL_CHUNK), (2, 3, 32 * 2**20)],
)
def test_logits_have_the_same_bits_for_every_budget(
    prepared,
    logits_in_ram,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    readers: int,
    threads: int,
    largest: int,
) -> None:
    directory = prepared(dtype=dtype)[1]
    wanted = logits_in_ram(directory)
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", largest)
    monkeypatch.setattr(runner.kernel.matmul, "WORTH_SHARING", 0)
    model = opened(directory, readers=readers, threads=threads)
    if largest == SMALL_CHUNK:
        assert any(chunk.start % platform.PAGE for chunk in model.weights.stream.chunks)
    for name in ("nothing", "half", "resident", "first"):  # one after another, so they are also re-arranged
        shares = arrangement(model.weights, name)
        found = promptly(lambda shares=shares: logits_of(model, *shares))
        assert torch.equal(found, wanted), name


def streaming_ram(model: Model, capacity: int, share: float) -> int:
    """RAM in which `share` of the matrices stay resident."""
    plenty = replace(model, ram=2**50).memory_plan(capacity, len(IDS)).request
    weights = [chunk.nbytes for chunk in model.weights.stream.chunks]
    ahead = runner.generation.memory_plan.FEWEST_BUFFERS * max(
        map(runner.weights.chunks.buffer_bytes, weights)
    )
    return plenty.process + plenty.cache + plenty.activations + ahead + int(share * sum(weights))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
def test_generations_in_a_row_stream_under_a_budget(
    prepared, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    directory = prepared()[1]
    wanted = [list(runner.load(directory).generate(IDS, max_new_tokens=new)) for new in (5, 9, 5)]
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    monkeypatch.setattr(runner.generation.memory_plan, "MARGIN", 0)
    model = runner.load(directory)
    model = replace(model, ram=streaming_ram(model, len(IDS) + 9, share))
    weights = sum(chunk.nbytes for chunk in model.weights.stream.chunks)

    def generate() -> None:
        for new, ids in zip((5, 9, 5), wanted, strict=True):
            generation = model.generate(IDS, max_new_tokens=new, speculate="off")
            streamed = generation.streamed_bytes_per_pass
            assert 0 < streamed < weights
            assert list(generation) == ids
            assert new * streamed <= generation.bytes_read <= new * streamed + weights - streamed

    promptly(generate)


@pytest.mark.slow
def test_fifty_models_leave_no_threads_and_no_files(prepared) -> None:
    directory = prepared()[1]

    def use() -> None:
        model = opened(directory)
        model.weights.stream.arrange(frozenset({0, 3}), 2)
        cache = model.cache(4)
        model.weights.stream.arrange(frozenset({0, 3}), 2)
        model.forward([5], cache)

    def count() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps")
        mapped = maps.read_text().count(str(directory)) if maps.exists() else 0
        files = Path("/proc/self/fd")
        return len(readers_alive()), mapped, len(list(files.iterdir())) if files.exists() else 0

    promptly(use)
    before = count()
    for _ in range(50):
        promptly(use)
    soon(lambda: count() <= before)


class Refusing(io.FileIO):
    """A file that opens for reads past the page cache and then cannot do them."""

    def readinto(self, buffer: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class Halting(io.FileIO):
    """A file that gives less than was asked for."""

    def readinto(self, buffer: memoryview) -> int:
        return super().readinto(buffer[: max(1, len(buffer) // 3)])


@pytest.mark.parametrize("how", ["opening", "reading", "short reads"])
def test_without_reads_past_the_page_cache_the_bits_are_the_same(
    prepared, logits_in_ram, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    directory = prepared()[1]
    wanted = logits_in_ram(directory)
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    plain = []

    def open_for_streaming(path: Path, *, past_the_cache: bool) -> io.FileIO:
        if past_the_cache and how == "opening":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        if past_the_cache and how == "reading":
            return Refusing(path, "r")
        plain.append(path)
        return (Halting if how == "short reads" else io.FileIO)(path, "r")

    monkeypatch.setattr(files, "open_for_streaming", open_for_streaming)
    model = opened(directory)
    for name in ("nothing", "half"):
        shares = arrangement(model.weights, name)
        found = promptly(lambda shares=shares: logits_of(model, *shares))
        assert torch.equal(found, wanted)
    assert plain


def test_without_the_linux_calls_the_bits_are_the_same(
    prepared, logits_in_ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = prepared()[1]
    wanted = logits_in_ram(directory)
    monkeypatch.setattr(chunks, "LARGEST_CHUNK", SMALL_CHUNK)
    monkeypatch.setattr(platform, "LINUX_CALLS", False)
    model = opened(directory)
    for name in ("nothing", "half", "resident"):
        shares = arrangement(model.weights, name)
        found = promptly(lambda shares=shares: logits_of(model, *shares))
        assert torch.equal(found, wanted)
