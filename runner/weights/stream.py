"""The chunks of a model, handed out in the order of a pass: some stay in RAM, the others are read ahead.

    disk ──> buffers of the ring, filled by readers ─────────┐
                                                             ├──> take ──> product ──> release
    page cache ──> mapped files, paged in once ──────────────┘

Streamed chunks are read past the page cache into memory of the process, so no page is pushed out for them. Resident
ones are pages of the page cache: what is there already is not read, and other processes share it. The order wraps:
while the end of one pass is computed, the beginning of the next is read.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from runner.errors import BloomdeskError
from runner.weights.chunks import Chunk, Loaded, buffer_bytes
from runner.weights.ring import Buffer, Read, ReadChunk, Readers, Resident

# One reads while the other hands over.
READERS = 2
# Reads that wait for a reader at a time.
MOST_QUEUED = 16
# Seconds between looks at Ctrl-C: some systems interrupt no wait that has no time limit.
LONGEST_WAIT = 0.2


@dataclass
class Traffic:
    """Bytes and seconds of a stream so far.

    bytes_streamed   of streamed chunks that a pass has used
    bytes_loaded     of resident chunks that a pass has used, each counted once
    reading_seconds  with at least one of their reads under way
    waiting_seconds  of passes, for chunks that were not read yet
    """

    bytes_streamed: int = 0
    bytes_loaded: int = 0
    reading_seconds: float = 0.0
    waiting_seconds: float = 0.0

    @property
    def bytes_read(self) -> int:
        """Bytes that the passes so far needed from the files."""
        return self.bytes_streamed + self.bytes_loaded


class Stream:
    """Hands out `chunks` one at a time, first to last and around again; until `arrange`, all are resident.

    Only one thread at a time may use a stream, so nothing is locked; `readers` threads fill its buffers with `read`.
    Chunks are numbered through all passes: number n is chunk `n % len(chunks)`. `position` is the number of the chunk
    in use, or next to be used.
    """

    def __init__(self, chunks: Sequence[Chunk], readers: int = READERS, read: ReadChunk = Chunk.read) -> None:
        self.chunks = tuple(chunks)
        self.traffic = Traffic()
        self.resident = frozenset(range(len(self.chunks)))
        # The resident chunks that are read, or about to be, by index.
        self.kept: dict[int, Resident] = {}
        self.buffers: list[Buffer] = []
        self.position = self._next = 0
        # Stays set if an interruption prevents the release; the next `take` then restarts.
        self.in_use = False
        # Whether all chunks are resident, read and counted; then they are handed out without any of this.
        self._is_at_rest = False
        self._readers = Readers(readers, read)
        self._read_until = 0.0
        weakref.finalize(self, self._readers.end)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the chunks that are not resident: what each pass reads."""
        return sum(chunk.nbytes for index, chunk in enumerate(self.chunks) if index not in self.resident)

    def arrange(self, resident: frozenset[int], buffers: int) -> None:
        """Keep the chunks with these indices from now on, and stream the others through `buffers` buffers.

        Raises ValueError if something is to be streamed through fewer than 2 buffers.
        """
        streamed = [chunk.nbytes for index, chunk in enumerate(self.chunks) if index not in resident]
        if streamed and buffers < 2:
            raise ValueError(f"{buffers} buffers cannot hold a chunk in use and one that is read")
        count = buffers if streamed else 0
        if self.resident == resident and len(self.buffers) == count:
            return
        self.resident, self._is_at_rest = resident, False
        for index in self.kept.keys() - resident:
            self.kept.pop(index).let_go()
        # The memory of the old buffers is freed before new ones are made, except of those that are being read into.
        self._restart(0)
        self.buffers = []
        self.buffers = [Buffer(buffer_bytes(max(streamed))) for _ in range(count)]

    @contextmanager
    def chunk(self, index: int) -> Iterator[Loaded]:
        """The weights of chunk `index` [rows, K] as they are stored, valid inside the context.

        If another chunk is the next in order, reading starts again from `index`. Raises `BloomdeskError` if the file
        cannot be read, or has changed since it was opened; also at the end, if it was cut short in the meantime.
        """
        rests = self._is_at_rest
        if rests:
            self._check_resident(index)
        held = self.kept[index] if rests else self.take(index)
        try:
            yield held.weights(self.chunks[index])
        finally:
            if not rests:
                self._release(held)
            self._check_used(held, index)

    def take(self, index: int) -> Buffer | Resident:
        """What holds chunk `index`, in use until it is released."""
        is_next = not self.in_use and self.position % len(self.chunks) == index
        self.in_use = True
        if not is_next:
            self._restart(index)
        began = time.perf_counter()
        buffer = self._ready(index)
        self.traffic.waiting_seconds += time.perf_counter() - began
        if not buffer.read.is_counted:
            self._count(buffer.read)
        if buffer.read.stays:
            self._check_resident(index)
        return buffer

    def _check_resident(self, index: int) -> None:
        """Check the file of a resident chunk at its first chunk in each pass; a streamed one's is at each read."""
        file = self.chunks[index].file
        if not index or self.chunks[index - 1].file is not file:
            file.check_unchanged()

    def _check_used(self, held: Buffer | Resident, index: int) -> None:
        """Check that what a product has just used was whole; else all chunks of the file are read again."""
        try:
            held.check(self.chunks[index])
        except BloomdeskError:
            file = self.chunks[index].file
            self.kept = {each: kept for each, kept in self.kept.items() if self.chunks[each].file is not file}
            self._is_at_rest = False
            self._restart(0)
            raise

    def _release(self, held: Buffer | Resident) -> None:
        held.number = None
        self.position += 1
        self._read_ahead()
        self.in_use = False
        if not self.position % len(self.chunks) and len(self.kept) == len(self.chunks):
            self._is_at_rest = all(each.read.is_counted for each in self.kept.values())

    def _ready(self, index: int) -> Buffer | Resident:
        """What holds chunk `index`, the next in order, once it is read."""
        # A failure while reading ahead may be over by now, so it counts only if it happens again.
        buffer = self._current(index)
        may_retry = buffer is not None
        while True:
            while not buffer:
                self._read_ahead()
                buffer = self._current(index)
                # All buffers are still being read into, for chunks that are not needed any more.
                if not buffer:
                    self.buffers[0].read.done.wait(LONGEST_WAIT)
            while not buffer.read.done.is_set():
                buffer.read.done.wait(LONGEST_WAIT)
            if not buffer.read.failure:
                return buffer
            self.kept.pop(index, None)
            self._restart(index)
            if not may_retry:
                raise buffer.read.failure
            buffer, may_retry = None, False

    def _current(self, index: int) -> Buffer | Resident | None:
        """What is for chunk `index`, the next in order, if its read was started."""
        if buffer := self.kept.get(index):
            return buffer
        return next((buffer for buffer in self.buffers if buffer.number == self.position), None)

    def _read_ahead(self) -> None:
        """Start reading the chunks that come next, as far as there are free buffers."""
        if len(self.kept) == len(self.chunks):
            return
        while self._next < self.position + len(self.chunks):
            if self._next > self.position and self._readers.queued >= MOST_QUEUED:
                return
            index = self._next % len(self.chunks)
            chunk = self.chunks[index]
            # Whatever an interruption leaves undone here, no buffer is read into twice, and none is lost.
            if index not in self.resident:
                buffer = next((each for each in self.buffers if each.is_free), None)
                if not buffer:
                    return
                buffer.read = Read(chunk, buffer.view)
                self._readers.start(buffer.read)
                buffer.number = self._next
            elif index not in self.kept:
                held = Resident(chunk)
                self._readers.start(held.read)
                self.kept[index] = held
            self._next += 1

    def _restart(self, index: int) -> None:
        """Read from chunk `index` on, and drop what was to be read ahead."""
        waiting = [buffer for buffer in self.kept.values() if not buffer.read.done.is_set()]
        self.kept = {index: buffer for index, buffer in self.kept.items() if buffer.read.done.is_set()}
        for buffer in (*self.buffers, *waiting):
            buffer.number = None
            if buffer.read:
                buffer.read.is_dropped = True
        self.position = self._next = index

    def _count(self, read: Read) -> None:
        read.is_counted = True
        if read.stays:
            self.traffic.bytes_loaded += read.chunk.nbytes
        else:
            self.traffic.bytes_streamed += read.chunk.nbytes
        # Reads begin in the order in which they are counted, and may overlap.
        self.traffic.reading_seconds += max(0.0, read.ended - max(read.began, self._read_until))
        self._read_until = max(self._read_until, read.ended)
