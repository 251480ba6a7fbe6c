"""What the tests of streams share: one file of odd chunks without a model, and passes of models in many chunks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import runner
from runner.generation.model import Model
from runner.weights.checkpoint import Weights
from runner.weights.chunks import Chunk
from runner.weights.part_file import PartFile
from runner.weights.ring import READER_NAME, Buffer, ReadChunk
from runner.weights.stream import Stream

IDS = [5, 700, 31, 9, 1101, 64, 8]
SMALL_CHUNK = 9000  # no multiple of a page, nor of a row
LONGEST = 60  # seconds; what takes longer hangs


def promptly(action: Callable[[], Any]) -> Any:
    """What the action returns; fails if it hangs."""
    returned: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(action())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LONGEST)
    assert not thread.is_alive(), "it hangs"
    if raised:
        raise raised[0]
    return returned[0]


def soon(condition: Callable[[], bool]) -> None:
    """Wait for what other threads will make true."""
    deadline = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def readers_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == READER_NAME]


def ready(stream: Stream) -> list[Buffer]:
    """The buffers of a stream that wait for their use."""
    held = [buffer for buffer in stream.buffers if buffer.number is not None and buffer.read.done.is_set()]
    return [buffer for buffer in held if not stream.in_use or buffer.number > stream.position]


@dataclass
class Shelf:
    path: Path
    data: bytes = field(repr=False)
    chunks: tuple[Chunk, ...] = field(repr=False)

    def stream(
        self,
        resident: frozenset[int] = frozenset(),
        buffers: int = 3,
        readers: int = 2,
        read: ReadChunk = Chunk.read,
    ) -> Stream:
        made = Stream(self.chunks, readers, read)
        made.arrange(resident, buffers)
        return made

    def holds(self, index: int, weights: torch.Tensor) -> bool:
        chunk = self.chunks[index]
        return weights.numpy().tobytes() == self.data[chunk.start :][: chunk.nbytes]

    def check(self, stream: Stream, index: int) -> None:
        with stream.chunk(index) as weights:
            assert weights.shape == self.chunks[index].shape
            assert self.holds(index, weights)

    def check_pass(self, stream: Stream) -> None:
        for index in range(len(self.chunks)):
            self.check(stream, index)

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)


def make_shelf(path: Path) -> Shelf:
    sizes = [1, 4095, 4096, 4097, 9000, 12288, 5000, 77, 8192, 20000, 3, 4096, 6001]
    skew = 777
    data = torch.randint(0, 256, (skew + sum(sizes),), dtype=torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    state, found, at = PartFile.of(path), [], skew
    for size in sizes:
        found.append(Chunk(state, at, 0, 1, torch.uint8, (1, size)))
        at += size
    return Shelf(path, data, tuple(found))


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def opened(directory: Path, *, readers: int = 2, threads: int = 1) -> Model:
    model = runner.load(directory)
    with computing_with(threads):
        return replace(model, weights=Weights.open(directory, readers=readers))


def arrangement(weights: Weights, name: str) -> tuple[frozenset[int], int]:
    count = len(weights.stream.chunks)
    return {
        "resident": (frozenset(range(count)), 0),
        "half": (frozenset(range(0, count, 2)), 3),
        "first": (frozenset(range(count // 3)), 5),
        "nothing": (frozenset(), 2),
    }[name]


def logits_of(model: Model, resident: frozenset[int], buffers: int) -> torch.Tensor:
    """A prompt and three cached steps, all rows of them."""
    cache = model.cache(len(IDS) + 3)
    model.weights.stream.arrange(resident, buffers)
    steps = [model.forward(IDS, cache, all_rows=True)]
    steps += [model.forward([token], cache) for token in (12, 1100, 77)]
    return torch.cat(steps)
