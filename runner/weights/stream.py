"""The chunks of a model, handed out in the order of a pass: some stay in RAM, the others are read ahead.

    disk 0 ──> buffers of its ring, filled by its readers ───┐
    disk 1 ──> buffers of its ring, filled by its readers ───┤
                                                             ├──> take ──> product ──> release
    page cache ──> mapped files, paged in once ──────────────┘

If a model is spread over several disks, each has a ring and readers of its own, so all of them are busy although one is
faster; their chunks take turns in the order.

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
from runner.weights.ring import Buffer, Read, ReadChunk, Readers, Resident, Ring

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

    Only one thread at a time may use a stream, so nothing is locked; `readers` threads for each disk fill its buffers
    with `read`.
    Chunks are numbered through all passes: number n is chunk `n % len(chunks)`. `position` is the number of the chunk
    in use, or next to be used.
    """

    def __init__(self, chunks: Sequence[Chunk], readers: int = READERS, read: ReadChunk = Chunk.read) -> None:
        self.chunks = tuple(chunks)
        self.traffic = Traffic()
        self.resident = frozenset(range(len(self.chunks)))
        # The resident chunks that are read, or about to be, by index.
        self.kept: dict[int, Resident] = {}
        self.position = 0
        # Stays set if an interruption prevents the release; the next `take` then restarts.
        self.in_use = False
        # Whether all chunks are resident, read and counted; then they are handed out without any of this.
        self._is_at_rest = False
        # The number of each chunk's disk.
        self.disks = tuple(chunk.file.disk for chunk in self.chunks)
        self._rings = [Ring(disk, Readers(readers, read)) for disk in range(max(self.disks, default=0) + 1)]
        # The first chunk of each file, at which it is checked in each pass.
        self._first_of_file = {chunk.file: index for index, chunk in reversed([*enumerate(self.chunks)])}
        self._read_until = 0.0
        for ring in self._rings:
            weakref.finalize(self, ring.readers.end)

    @property
    def buffers(self) -> list[Buffer]:
        """Those of all rings."""
        return [buffer for ring in self._rings for buffer in ring.buffers]

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the chunks that are not resident: what each pass reads."""
        return sum(chunk.nbytes for index, chunk in enumerate(self.chunks) if index not in self.resident)

    def arrange(self, resident: frozenset[int], buffers: int) -> None:
        """Keep the chunks with these indices from now on, and stream the others through `buffers` buffers of each disk.

        Raises ValueError if something is to be streamed through fewer than 2 buffers.
        """
        streamed = self._streamed(resident)
        if any(streamed) and buffers < 2:
            raise ValueError(f"{buffers} buffers cannot hold a chunk in use and one that is read")
        counts = [buffers if sizes else 0 for sizes in streamed]
        if self.resident == resident and [len(ring.buffers) for ring in self._rings] == counts:
            return
        self.resident, self._is_at_rest = resident, False
        for index in self.kept.keys() - resident:
            self.kept.pop(index).let_go()
        # The memory of the old buffers is freed before new ones are made, except of those that are being read into.
        self._restart(0)
        for ring in self._rings:
            ring.buffers = []
        for ring, sizes, count in zip(self._rings, streamed, counts, strict=True):
            ring.buffers = [Buffer(buffer_bytes(max(sizes))) for _ in range(count)]

    def _streamed(self, resident: frozenset[int]) -> list[list[int]]:
        """Bytes of the chunks that are not `resident`, for each disk."""
        found: list[list[int]] = [[] for _ in self._rings]
        for index, chunk in enumerate(self.chunks):
            if index not in resident:
                found[chunk.file.disk].append(chunk.nbytes)
        return found

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
        if self._first_of_file[file] == index:
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
                    self._ring(index).buffers[0].read.done.wait(LONGEST_WAIT)
            while not buffer.read.done.is_set():
                buffer.read.done.wait(LONGEST_WAIT)
            if not buffer.read.failure:
                return buffer
            self.kept.pop(index, None)
            self._restart(index)
            if not may_retry:
                raise buffer.read.failure
            buffer, may_retry = None, False

    def _ring(self, index: int) -> Ring:
        return self._rings[self.disks[index]]

    def _current(self, index: int) -> Buffer | Resident | None:
        """What is for chunk `index`, the next in order, if its read was started."""
        return self.kept.get(index) or self._ring(index).buffer(self.position)

    def _read_ahead(self) -> None:
        """Start reading the chunks that come next, as far as there are free buffers."""
        if len(self.kept) == len(self.chunks):
            return
        for ring in self._rings:
            self._read_ahead_on(ring)

    def _read_ahead_on(self, ring: Ring) -> None:
        while ring.next < self.position + len(self.chunks):
            index = ring.next % len(self.chunks)
            is_own = self.disks[index] == ring.disk
            if is_own and ring.next > self.position and ring.readers.queued >= MOST_QUEUED:
                return
            if is_own and not self._start_read(ring, index):
                return
            ring.next += 1

    def _start_read(self, ring: Ring, index: int) -> bool:
        """Have chunk `index` read, unless that was done; False if there is no free buffer for it."""
        # Whatever an interruption leaves undone here, no buffer is read into twice, and none is lost.
        if index not in self.resident:
            buffer = ring.free_buffer
            if not buffer:
                return False
            buffer.read = Read(self.chunks[index], buffer.view)
            ring.readers.start(buffer.read)
            buffer.number = ring.next
        elif index not in self.kept:
            held = Resident(self.chunks[index])
            ring.readers.start(held.read)
            self.kept[index] = held
        return True

    def _restart(self, index: int) -> None:
        """Read from chunk `index` on, and drop what was to be read ahead."""
        waiting = [buffer for buffer in self.kept.values() if not buffer.read.done.is_set()]
        self.kept = {index: buffer for index, buffer in self.kept.items() if buffer.read.done.is_set()}
        for buffer in (*self.buffers, *waiting):
            buffer.number = None
            if buffer.read:
                buffer.read.is_dropped = True
        self.position = index
        for ring in self._rings:
            ring.next = index

    def _count(self, read: Read) -> None:
        read.is_counted = True
        if read.stays:
            self.traffic.bytes_loaded += read.chunk.nbytes
        else:
            self.traffic.bytes_streamed += read.chunk.nbytes
        # Those of a disk begin in the order in which they are counted, and may overlap.
        self.traffic.reading_seconds += max(0.0, read.ended - max(read.began, self._read_until))
        self._read_until = max(self._read_until, read.ended)
