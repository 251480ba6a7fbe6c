"""The prefetch ring: buffers that readers fill ahead of a pass, and the chunks that stay in RAM.

A buffer of the ring goes through these states; `claim` and `hand_over` are called by readers, the others by the pass:

           claim             hand_over           take              release
    free ────────> claimed ────────────> ready ────────> in use ────────────> free
                      └── the read failed, or was claimed before a restart ──> free

A resident chunk has a buffer to itself, which is filled once and then kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from runner.system import files, memory, platform
from runner.weights.chunks import Chunk

# Seconds between looks at Ctrl-C: some systems interrupt no wait that has no time limit.
LONGEST_WAIT = 0.2

State = Enum("State", "FREE CLAIMED READY IN_USE")


class Buffer:
    """Page-aligned memory for one chunk."""

    def __init__(self, nbytes: int) -> None:
        self._memory = memory.anonymous(nbytes)
        self.view = memoryview(self._memory)
        self.state = State.FREE
        self._chunk: Chunk | None = None

    def weights(self, chunk: Chunk) -> torch.Tensor:
        """What was read into the buffer, as the chunk's tensor."""
        if chunk is not self._chunk:
            count = chunk.nbytes // chunk.dtype.itemsize
            skew = chunk.start % platform.PAGE
            flat = torch.frombuffer(self._memory, dtype=chunk.dtype, count=count, offset=skew)
            self._chunk, self._weights = chunk, flat.view(chunk.shape)
        return self._weights


def buffer_bytes(nbytes: int) -> int:
    """Size of a buffer for a chunk of `nbytes`: whole pages, wherever in its first page the chunk begins."""
    return files.whole_pages(nbytes + platform.PAGE - 1)


@dataclass
class Traffic:
    """Bytes and seconds of a stream so far.

    bytes_streamed   of streamed chunks that a pass has used
    bytes_loaded     of resident chunks, each counted once
    bytes_fetched    of all reads
    reading_seconds  with at least one read under way
    waiting_seconds  of passes, for chunks that were not read yet
    """

    bytes_streamed: int = 0
    bytes_loaded: int = 0
    bytes_fetched: int = 0
    reading_seconds: float = 0.0
    waiting_seconds: float = 0.0

    @property
    def bytes_read(self) -> int:
        """Bytes that the passes so far needed from the files."""
        return self.bytes_streamed + self.bytes_loaded


@dataclass(frozen=True)
class Claim:
    """A read that one reader makes: chunk `number` into `buffer`, which is the chunk's own if it `stays`."""

    epoch: int
    number: int
    chunk: Chunk
    buffer: Buffer
    stays: bool


class Ring:
    """The state that a pass and its readers share; the condition `changed` guards all of it.

    Chunks are numbered through all passes: number n is chunk `n % len(chunks)`.

    resident  indices of the chunks to keep
    kept      buffers of those that are loaded, by index
    buffers   of the ring
    ready     buffers that are read, or why that failed, by number
    position  number of the chunk in use, or next to be used
    claimed   number of the next chunk to read
    epoch     counts restarts; results of reads that were claimed in an older epoch are dropped
    in_use    stays set if an interruption prevents the release; the next `take` then restarts
    failed    the pass has got an error; nothing is read until it asks again
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = tuple(chunks)
        self.changed = threading.Condition()
        self.traffic = Traffic()
        self.resident = frozenset(range(len(self.chunks)))
        self.kept: dict[int, Buffer] = {}
        self.buffers: list[Buffer] = []
        self.ready: dict[int, Buffer | Exception] = {}
        self.position = self.claimed = self.epoch = 0
        self.in_use = self.failed = self.closed = False
        self._reads, self._reading_since = 0, 0.0

    @property
    def at_rest(self) -> bool:
        """Whether all chunks are kept: then they are handed out without locking."""
        return len(self.kept) == len(self.chunks)

    def arrange(self, resident: frozenset[int], count: int) -> None:
        """Keep the chunks `resident` from now on, and stream the others through `count` buffers, at least 2."""
        streamed = [chunk.nbytes for index, chunk in enumerate(self.chunks) if index not in resident]
        if streamed and count < 2:
            raise ValueError(f"{count} buffers cannot hold a chunk in use and one that is read")
        count = count if streamed else 0
        with self.changed:
            if self.resident == resident and len(self.buffers) == count:
                return
            self.resident = resident
            self.kept = {index: buffer for index, buffer in self.kept.items() if index in resident}
            self.buffers = []
            self._restart(0)
        # The memory of the old buffers is free by now, except of those that are still being read into.
        fresh = [Buffer(buffer_bytes(max(streamed))) for _ in range(count)]
        with self.changed:
            self.buffers = fresh
            self._restart(0)
            self.in_use = False

    def take(self, index: int) -> Buffer:
        """The buffer that holds chunk `index`, in use until it is released.

        If another chunk is the next in order, reading starts again from `index`. Raises what the read raised.
        """
        if self.at_rest:
            return self.kept[index]
        with self.changed:
            is_next = not self.in_use and self.position % len(self.chunks) == index
            self.in_use = True
            if not is_next:
                self._restart(index)
            began = time.perf_counter()
            buffer = self._awaited(index)
            self.traffic.waiting_seconds += time.perf_counter() - began
            if index not in self.resident:
                self.traffic.bytes_streamed += self.chunks[index].nbytes
            return buffer

    def _awaited(self, index: int) -> Buffer:
        # A failure while reading ahead may be over by now, so it counts only if it happens again.
        may_retry = self.position in self.ready
        while True:
            while index not in self.kept and self.position not in self.ready:
                self.changed.wait(LONGEST_WAIT)
            found = self.kept.get(index) or self.ready.pop(self.position)
            if isinstance(found, Buffer):
                found.state = State.IN_USE
                return found
            if not may_retry:
                self.failed = True
                raise found
            may_retry = False
            self._restart(index)

    def release(self, buffer: Buffer) -> None:
        """End the use of the chunk that was taken last; what was taken at rest needs no release."""
        if not self.in_use:
            return
        with self.changed:
            self.position += 1
            if buffer.state is State.IN_USE:
                buffer.state = State.FREE
            self.changed.notify_all()
            self.in_use = False

    def claim(self) -> Claim | None:
        """The next read for the calling thread, which waits until there is one; None once the ring is closed."""
        with self.changed:
            while not self.closed and not (claim := self._next_claim()):
                self.changed.wait()
            if self.closed:
                return None
            if not self._reads:
                self._reading_since = time.perf_counter()
            self._reads += 1
            return claim

    def _next_claim(self) -> Claim | None:
        if self.failed:
            return None
        while self.claimed < self.position + len(self.chunks):
            number, index = self.claimed, self.claimed % len(self.chunks)
            if index not in self.kept:
                stays, chunk = index in self.resident, self.chunks[index]
                if stays:
                    buffer = Buffer(buffer_bytes(chunk.nbytes))
                else:
                    buffer = next((each for each in self.buffers if each.state is State.FREE), None)
                    if not buffer:
                        return None
                buffer.state = State.CLAIMED
                self.claimed += 1
                return Claim(self.epoch, number, chunk, buffer, stays)
            self.claimed += 1
        return None

    def hand_over(self, claim: Claim, failure: Exception | None) -> None:
        """Take the result of a claim: its buffer is filled, unless there is a failure."""
        with self.changed:
            now, index = time.perf_counter(), claim.number % len(self.chunks)
            self.traffic.bytes_fetched += claim.chunk.nbytes
            self.traffic.reading_seconds += now - self._reading_since
            self._reading_since = now
            self._reads -= 1
            is_current = claim.epoch == self.epoch
            if is_current and failure:
                self.ready[claim.number] = failure
            if claim.stays:
                if not failure and index in self.resident and index not in self.kept:
                    self.kept[index] = claim.buffer
                    self.traffic.bytes_loaded += claim.chunk.nbytes
            elif is_current and not failure:
                claim.buffer.state = State.READY
                self.ready[claim.number] = claim.buffer
            else:
                claim.buffer.state = State.FREE
            self.changed.notify_all()

    def _restart(self, index: int) -> None:
        """Read from chunk `index` on, as if nothing had been read ahead."""
        self.epoch += 1
        for buffer in self.buffers:
            if buffer.state is not State.CLAIMED:
                buffer.state = State.FREE
        self.ready.clear()
        self.failed = False
        self.position = self.claimed = index
        self.changed.notify_all()

    def close(self) -> None:
        """End all readers once their reads are done."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
