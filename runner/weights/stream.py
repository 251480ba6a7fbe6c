"""The chunks of a model, handed out in the order of a pass: some stay in RAM, the others are read ahead and let go.

    disk ──> buffers, read ahead by threads ────────┐
                                                  ├──> take(chunk) ──> product ──> release(chunk)
    disk ──> memory of their own, once, resident ─┘

Both are read past the page cache into memory of our own: no other page is pushed out for them, and that memory comes
in huge pages, which a product goes through faster than through a mapped file's small ones. The order wraps: while the
end of one pass is computed, the beginning of the next is read.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from runner.errors import BloomdeskError
from runner.system import files, memory, platform
from runner.weights.chunks import Chunk

_LONGEST_READ = 10.0  # seconds that a disk may take for one chunk before the program ends without it
READERS = 2  # one reads while the other hands over
# Seconds between looks at Ctrl-C, which interrupts no wait without an end on some systems.
_LONGEST_WAIT = 0.2


class Buffer:
    """Page-aligned memory for one chunk."""

    def __init__(self, nbytes: int) -> None:
        self._memory = memory.anonymous(nbytes)
        self.view = memoryview(self._memory)
        self._chunk: Chunk | None = None

    def weights(self, chunk: Chunk) -> torch.Tensor:
        """What was read into it, as the chunk's tensor."""
        if chunk is not self._chunk:
            count = chunk.nbytes // chunk.dtype.itemsize
            skew = chunk.start % platform.PAGE
            flat = torch.frombuffer(self._memory, dtype=chunk.dtype, count=count, offset=skew)
            self._chunk, self._weights = chunk, flat.view(chunk.shape)
        return self._weights


def buffer_bytes(nbytes: int) -> int:
    """What a buffer for a chunk of `nbytes` must have: whole pages, wherever the chunk begins in its first."""
    return (nbytes + 2 * platform.PAGE - 2) // platform.PAGE * platform.PAGE


@dataclass
class Traffic:
    """What a stream has done so far."""

    bytes_streamed: int = 0  # of streamed chunks that were handed out
    bytes_loaded: int = 0  # of resident chunks, once each
    reading_seconds: float = 0.0  # with at least one read under way
    bytes_fetched: int = 0  # in that time
    waiting_seconds: float = 0.0  # of the pass, for a chunk that was not there yet

    @property
    def bytes_read(self) -> int:
        """What the passes so far needed from the files."""
        return self.bytes_streamed + self.bytes_loaded


class Stream:
    """Hands out `chunks` one at a time, first to last and around again.

    Until `arrange` says otherwise every chunk is resident.
    """

    def __init__(self, chunks: Sequence[Chunk], readers: int = READERS) -> None:
        self._shared = _Shared(tuple(chunks))
        self._readers = readers
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self._shared, self._threads)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self._shared.chunks

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the chunks that are not resident: what each pass reads."""
        shared = self._shared
        return sum(chunk.nbytes for index, chunk in enumerate(shared.chunks) if index not in shared.resident)

    @property
    def traffic(self) -> Traffic:
        return self._shared.traffic

    def arrange(self, resident: frozenset[int], buffers: int) -> None:
        """Keep the chunks with these indices from now on, and stream the others through `buffers` buffers.

        Raises ValueError where something is to be streamed through fewer than 2 buffers.
        """
        shared = self._shared
        streamed = [chunk for index, chunk in enumerate(shared.chunks) if index not in resident]
        if streamed and buffers < 2:
            raise ValueError(f"{buffers} buffers cannot hold a chunk in use and one that is read")
        nbytes = max((buffer_bytes(chunk.nbytes) for chunk in streamed), default=0)
        with shared.changed:
            if shared.resident == resident and len(shared.buffers) == (buffers if streamed else 0):
                return
            shared.kept = {index: buffer for index, buffer in shared.kept.items() if index in resident}
            shared.counted &= resident
            shared.resident = resident
            shared.buffers = []
            shared.restart(0)
        # The old buffers are free by now, save those that are still being read into.
        fresh = [Buffer(nbytes) for _ in range(buffers if streamed else 0)]
        with shared.changed:
            shared.buffers, shared.free = fresh, list(fresh)
            shared.restart(0)

    @contextmanager
    def chunk(self, index: int) -> Iterator[torch.Tensor]:
        """The weights of chunk `index` [rows, K], for as long as the context lasts.

        Out of turn, the stream begins anew there. Raises `BloomdeskError` where the file cannot be read, or has changed
        since it was opened.
        """
        weights, buffer = self._take(index)
        try:
            yield weights
        finally:
            if buffer:
                self._release(buffer)

    def _take(self, index: int) -> tuple[torch.Tensor, Buffer | None]:
        """Begin to use a chunk; without a buffer there is nothing to release."""
        shared = self._shared
        if shared.at_rest:
            return self._weights(index, shared.kept[index]), None
        with shared.changed:
            if shared.in_use or shared.position % len(shared.chunks) != index:
                shared.restart(index)
            shared.in_use = True
            self._start()
            buffer = self._awaited(index)
        return self._weights(index, buffer), buffer

    def _weights(self, index: int, buffer: Buffer) -> torch.Tensor:
        """What the buffer of a chunk holds. A streamed chunk's file is checked when it is read, others' once a pass."""
        shared = self._shared
        chunk = shared.chunks[index]
        if index in shared.kept and (not index or shared.chunks[index - 1].file is not chunk.file):
            check_unchanged(chunk)
        return buffer.weights(chunk)

    def _awaited(self, index: int) -> Buffer:
        """The buffer that chunk `index`, the next in turn, is in."""
        shared = self._shared
        began = time.perf_counter()
        # A failure while reading ahead may be over by now, so it counts only where it happens again.
        again = shared.position not in shared.ready
        while True:
            while index not in shared.kept and shared.position not in shared.ready:
                shared.changed.wait(_LONGEST_WAIT)
            found = shared.kept.get(index) or shared.ready.pop(shared.position)
            if not isinstance(found, Exception):
                break
            if again:
                shared.failed = True
                raise found
            again = True
            shared.restart(index)
        shared.traffic.waiting_seconds += time.perf_counter() - began
        if index not in shared.resident:
            shared.traffic.bytes_streamed += shared.chunks[index].nbytes
        elif index not in shared.counted:
            shared.counted.add(index)
            shared.traffic.bytes_loaded += shared.chunks[index].nbytes
        return found

    def _release(self, buffer: Buffer) -> None:
        shared = self._shared
        with shared.changed:
            shared.position += 1
            shared.give_back(buffer)
            if len(shared.kept) < len(shared.chunks):
                shared.changed.notify_all()
            shared.in_use = False

    def _start(self) -> None:
        while len(self._threads) < self._readers:
            thread = threading.Thread(target=_read_ahead, args=(self._shared,), daemon=True)
            thread.start()
            self._threads.append(thread)


@dataclass
class _Shared:
    """What the pass and the readers share; `changed` guards it.

    Chunks are counted on through all passes: number `n` is chunk `n % len(chunks)`. `position` is the one in use or
    next to be, `claimed` the next that a reader will take on. A claim of an older `epoch` is of no use any more.
    `in_use` stays set where an interruption came between taking a chunk and releasing it.
    """

    chunks: tuple[Chunk, ...]
    resident: frozenset[int] = field(init=False)
    kept: dict[int, Buffer] = field(default_factory=dict)  # the resident ones that are there
    counted: set[int] = field(default_factory=set)  # of these, those that were handed out
    buffers: list[Buffer] = field(default_factory=list)
    free: list[Buffer] = field(default_factory=list)
    filling: set[Buffer] = field(default_factory=set)
    ready: dict[int, Buffer | Exception] = field(default_factory=dict)
    position: int = 0
    claimed: int = 0
    epoch: int = 0
    reading: int = 0
    reading_since: float = 0.0
    in_use: bool = False
    failed: bool = False  # and nothing is read until a pass asks again
    stopped: bool = False
    traffic: Traffic = field(default_factory=Traffic)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.resident = frozenset(range(len(self.chunks)))

    @property
    def at_rest(self) -> bool:
        """Whether all chunks are there for good: then they are handed out without any of this."""
        return len(self.counted) == len(self.chunks)

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def restart(self, index: int) -> None:
        """Begin at chunk `index`, with nothing read."""
        self.epoch += 1
        self.free = [buffer for buffer in self.buffers if buffer not in self.filling]
        self.ready.clear()
        self.failed = False
        self.position = self.claimed = index
        self.changed.notify_all()

    def give_back(self, buffer: Buffer) -> None:
        """Take a buffer back, unless it is a resident one, or of an older arrangement, or back already."""
        if buffer in self.buffers and buffer not in self.free:
            self.free.append(buffer)

    def claim(self) -> tuple[int, int, Buffer] | None:
        """The next chunk to be read: epoch, number, buffer; None while there is nothing to do."""
        if self.failed:
            return None
        count = len(self.chunks)
        while self.claimed < self.position + count:
            index = self.claimed % count
            if index not in self.kept:
                if index in self.resident:
                    buffer = Buffer(buffer_bytes(self.chunks[index].nbytes))
                elif self.free:
                    buffer = self.free.pop()
                    self.filling.add(buffer)
                else:
                    return None
                self.claimed += 1
                return self.epoch, self.claimed - 1, buffer
            self.claimed += 1
        return None

    def hand_over(self, epoch: int, number: int, buffer: Buffer, failure: Exception | None) -> None:
        """Take what became of a claim."""
        index = number % len(self.chunks)
        is_current = epoch == self.epoch
        if buffer in self.filling:
            self.filling.discard(buffer)
            if is_current and not failure:
                self.ready[number] = buffer
            else:
                self.give_back(buffer)
        elif not failure and index in self.resident:  # it may be arranged otherwise meanwhile
            self.kept.setdefault(index, buffer)
        if is_current and failure:
            self.ready[number] = failure


def _end(shared: _Shared, threads: Sequence[threading.Thread]) -> None:
    """Stop the readers and wait for the reads that are under way: a thread cut off at exit would abort the process."""
    shared.stop()
    if threading.current_thread() in threads:  # where garbage happened to be collected
        return
    for thread in threads:
        thread.join(_LONGEST_READ)


def _read_ahead(shared: _Shared) -> None:
    """A reader's life: claim, read, hand over."""
    while True:
        with shared.changed:
            while not shared.stopped and not (claim := shared.claim()):
                shared.changed.wait()
            if shared.stopped:
                return
            if not shared.reading:
                shared.reading_since = time.perf_counter()
            shared.reading += 1
        epoch, number, buffer = claim
        chunk = shared.chunks[number % len(shared.chunks)]
        failure = None
        try:
            _fetch(chunk, buffer, stays=buffer not in shared.filling)
        except Exception as error:
            failure = _worded(chunk, error)
        with shared.changed:
            shared.reading -= 1
            shared.traffic.bytes_fetched += chunk.nbytes
            now = time.perf_counter()  # another read may be under way, and so on for ever
            shared.traffic.reading_seconds += now - shared.reading_since
            shared.reading_since = now
            shared.hand_over(epoch, number, buffer, failure)
            shared.changed.notify_all()


def _fetch(chunk: Chunk, buffer: Buffer, *, stays: bool) -> None:
    """Bring a chunk into its buffer; what stays is taken from the page cache as far as it happens to be there."""
    start = chunk.start // platform.PAGE * platform.PAGE
    wanted = chunk.start + chunk.nbytes - start
    done = 0
    if stays:
        check_unchanged(chunk)
        done = files.read_cached(chunk.file.path, start, buffer.view[:wanted])
        if done == wanted:
            return
        done -= done % platform.PAGE
    try:
        _fill(chunk, buffer, start, done, wanted, past_the_cache=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _fill(chunk, buffer, start, done, wanted, past_the_cache=False)


def _fill(chunk: Chunk, buffer: Buffer, start: int, done: int, wanted: int, *, past_the_cache: bool) -> None:
    view = buffer.view[: -(-wanted // platform.PAGE) * platform.PAGE]
    with files.open_for_streaming(chunk.file.path, past_the_cache=past_the_cache) as file:
        check_unchanged(chunk, file.fileno())
        file.seek(start + done)
        while done < wanted:
            count = file.readinto(view[done:])
            if not count:
                raise OSError(errno.EIO, "the file ends too early", str(chunk.file.path))
            done += count
        if not past_the_cache:
            files.forget(file, start, wanted)


def check_unchanged(chunk: Chunk, descriptor: int | None = None) -> None:
    """Raises `BloomdeskError` where a chunk's file, by its path or as opened, is not as it was at first."""
    try:
        found = os.stat(chunk.file.path if descriptor is None else descriptor)  # noqa: PTH116 - of either kind
    except OSError as error:
        raise _worded(chunk, error) from error
    if (found.st_size, found.st_mtime_ns) != (chunk.file.size, chunk.file.changed_ns):
        raise BloomdeskError(
            f"{chunk.file.path} was changed while the model was in use: opened with {chunk.file.size:,} bytes, "
            f"now {found.st_size:,} bytes written at another time",
            f"see that it is whole, then run it again: bloomdesk verify {chunk.file.path.parent}",
        )


def _worded(chunk: Chunk, error: Exception) -> Exception:
    if not isinstance(error, OSError):
        return error
    return BloomdeskError(
        f"{chunk.file.path} cannot be read at bytes {chunk.start:,} to {chunk.start + chunk.nbytes:,}: "
        f"{error.strerror or error}",
        f"see what is damaged: bloomdesk verify {chunk.file.path.parent}",
    )
