"""The buffers of the prefetch ring, the chunks that stay, and the threads that read both.

A buffer of the ring goes through these states; all steps but the reader's are the pass's own, so nothing is locked:

           queued         a reader begins       it ends          taken          released
    free ─────────> queued ────────────> reading ──────> ready ────────> in use ────────> free
                      └── a restart drops the read ────────┴─────────────────────────────> free

A chunk that stays is paged in once, as part of its mapped file, and has no buffer.

A read that is dropped before it has begun is never made; the buffer of one that has begun is free when it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from runner.system import memory
from runner.weights.chunks import Chunk, Loaded

READER_NAME = "weights reader"
# Seconds that a read may still take when its stream ends.
_LONGEST_READ = 10.0

# Reads a chunk into memory, or without any pages it in.
ReadChunk = Callable[[Chunk, memoryview | None], None]


class Buffer:
    """Page-aligned memory for one chunk of the ring: for that with this `number` of all passes, or free."""

    def __init__(self, nbytes: int) -> None:
        self._memory = memory.anonymous(nbytes)
        self.view = memoryview(self._memory)
        self.read: Read | None = None
        self.number: int | None = None
        self._chunk: Chunk | None = None

    @property
    def is_free(self) -> bool:
        """Whether it may be read into: nobody waits for its last read, and that is over or will not be made."""
        return self.number is None and (not self.read or not self.read.has_begun or self.read.done.is_set())

    def weights(self, chunk: Chunk) -> Loaded:
        """What was read into the buffer, as the chunk's tensor or tensors."""
        if chunk is not self._chunk:
            self._chunk, self._weights = chunk, chunk.in_buffer(self._memory)
        return self._weights

    def check(self, chunk: Chunk) -> None:
        """Nothing can happen to what was read."""


class Resident:
    """A chunk that stays: a view of its mapped file."""

    def __init__(self, chunk: Chunk) -> None:
        self.read = Read(chunk, None)
        self.number: int | None = None
        self._weights: Loaded | None = None

    def weights(self, chunk: Chunk) -> Loaded:
        """The chunk's tensor or tensors, once it was read."""
        if self._weights is None:
            self._weights = chunk.mapped()
        return self._weights

    def check(self, chunk: Chunk) -> None:
        """Raise `BloomdeskError` if the file no longer had some of the weights when they were used."""
        chunk.file.check_mapping()

    def let_go(self) -> None:
        """Free its RAM, now or as soon as its read has ended."""
        self.read.is_unwanted = True
        if self.read.done.is_set():
            self.read.free()


@dataclass(eq=False)
class Read:
    """One read of a chunk, from `began` to `ended` seconds; `done` is set also after a `failure`.

    It goes into the memory `view`, or without it into the page cache, where it stays.
    """

    chunk: Chunk
    view: memoryview | None
    done: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None
    began: float = 0.0
    ended: float = 0.0
    has_begun: bool = False
    is_dropped: bool = False
    is_unwanted: bool = False
    is_counted: bool = False

    @property
    def stays(self) -> bool:
        return self.view is None

    def make(self, read_chunk: ReadChunk) -> None:
        """Read the chunk, unless the read was dropped before."""
        # A restart sets `is_dropped` and then looks at `has_begun`, so one of the two sees the other.
        self.has_begun = True
        if self.is_dropped:
            self.has_begun = False
            return
        self.began = time.perf_counter()
        try:
            read_chunk(self.chunk, self.view)
        except Exception as error:
            self.failure = error
        self.ended = time.perf_counter()
        self.done.set()
        # Who lets go sets `is_unwanted` and then looks at `done`, so one of the two frees it.
        if self.is_unwanted:
            self.free()

    def free(self) -> None:
        """Free the RAM of a chunk that does not stay any more."""
        self.chunk.drop()


class Readers:
    """`count` threads that make reads one after another; they start with the first one."""

    def __init__(self, count: int, read: ReadChunk) -> None:
        self._count, self._read = count, read
        self._reads = SimpleQueue[Read | None]()
        self._threads: list[threading.Thread] = []

    @property
    def queued(self) -> int:
        """Number of reads that have not begun."""
        return self._reads.qsize()

    def start(self, read: Read) -> None:
        """Have a read made; its `done` is set afterwards."""
        while len(self._threads) < self._count:
            arguments = (self._reads, self._read)
            thread = threading.Thread(target=_make_reads, args=arguments, name=READER_NAME, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._reads.put(read)

    def end(self) -> None:
        """Wait for the reads that are under way: a thread that is cut off at exit would abort the process."""
        with suppress(Empty):
            while True:
                self._reads.get_nowait()
        for _ in self._threads:
            self._reads.put(None)
        # A stream can end on one of its own readers, if garbage happens to be collected there.
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join(_LONGEST_READ)


class Ring:
    """The buffers and the readers of one disk; chunk number `next` of all passes is the first not read ahead yet."""

    def __init__(self, disk: int, readers: Readers) -> None:
        self.disk, self.readers = disk, readers
        self.buffers: list[Buffer] = []
        self.next = 0

    @property
    def free_buffer(self) -> Buffer | None:
        """One that may be read into, if there is one."""
        return next((each for each in self.buffers if each.is_free), None)

    def buffer(self, number: int) -> Buffer | None:
        """The one that is for chunk `number`, if its read was started."""
        return next((each for each in self.buffers if each.number == number), None)


def _make_reads(reads: SimpleQueue[Read | None], read_chunk: ReadChunk) -> None:
    while read := reads.get():
        read.make(read_chunk)
        # A waiting thread keeps no memory from being freed.
        del read
