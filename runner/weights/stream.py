"""The chunks of a model, handed out in the order of a pass: some stay in RAM, the others are read ahead.

    disk ──> buffers of the ring, filled by reader threads ──┐
                                                             ├──> take ──> product ──> release
    disk ──> memory of resident chunks, filled once ─────────┘

Both are read past the page cache into memory of the process: no other page is pushed out for them, and the memory is
in huge pages, which a product reads faster than the small ones of a mapped file. The order wraps: while the end of
one pass is computed, the beginning of the next is read.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from runner.weights.chunks import Chunk
from runner.weights.ring import Buffer, Ring

# One reads while the other hands over.
READERS = 2
READER_NAME = "weights reader"
# Seconds that a read may still take when its stream ends.
_LONGEST_READ = 10.0

Read = Callable[[Chunk, memoryview, bool], None]


class Stream:
    """Hands out `chunks` one at a time, first to last and around again; until `arrange`, all are resident.

    `readers` threads fill buffers with `read`, which gets the chunk, the buffer's memory, and whether it stays.
    """

    def __init__(self, chunks: Sequence[Chunk], readers: int = READERS, read: Read = Chunk.read) -> None:
        self.ring = Ring(chunks)
        self.chunks, self.traffic = self.ring.chunks, self.ring.traffic
        self._readers, self._read = readers, read
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self.ring, self._threads)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the chunks that are not resident: what each pass reads."""
        resident = self.ring.resident
        return sum(chunk.nbytes for index, chunk in enumerate(self.chunks) if index not in resident)

    def arrange(self, resident: frozenset[int], buffers: int) -> None:
        """Keep the chunks with these indices from now on, and stream the others through `buffers` buffers.

        Raises ValueError if something is to be streamed through fewer than 2 buffers.
        """
        self.ring.arrange(resident, buffers)

    @contextmanager
    def chunk(self, index: int) -> Iterator[torch.Tensor]:
        """The weights of chunk `index` [rows, K], valid inside the context.

        If another chunk is the next in order, reading starts again from `index`. Raises `BloomdeskError` if the file
        cannot be read, or has changed since it was opened.
        """
        buffer = self.take(index)
        try:
            yield buffer.weights(self.chunks[index])
        finally:
            self.ring.release(buffer)

    def take(self, index: int) -> Buffer:
        """The buffer that holds chunk `index`, in use until the ring releases it."""
        ring = self.ring
        while len(self._threads) < self._readers:
            arguments = (ring, self._read)
            thread = threading.Thread(target=_read_ahead, args=arguments, name=READER_NAME, daemon=True)
            thread.start()
            self._threads.append(thread)
        buffer, file = ring.take(index), self.chunks[index].file
        # A streamed chunk's file is checked at each read; that of resident ones at its first chunk in each pass.
        if index in ring.kept and (not index or self.chunks[index - 1].file is not file):
            file.check_unchanged()
        return buffer


def _read_ahead(ring: Ring, read: Read) -> None:
    """What a reader thread does; it must not hold its stream, which could never end then."""
    while claim := ring.claim():
        failure = None
        try:
            read(claim.chunk, claim.buffer.view, claim.stays)
        except Exception as error:
            failure = error
        ring.hand_over(claim, failure)
        # Nothing keeps a buffer of an older arrangement in memory while this thread waits.
        del claim


def _end(ring: Ring, threads: Sequence[threading.Thread]) -> None:
    """Stop the readers and wait for reads that are under way: a thread cut off at exit would abort the process."""
    ring.close()
    # A stream can end on one of its own readers, if garbage happens to be collected there.
    if threading.current_thread() in threads:
        return
    for thread in threads:
        thread.join(_LONGEST_READ)
