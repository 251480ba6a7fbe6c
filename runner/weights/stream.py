"""The pieces of a model, handed out in the order of a pass: some stay in RAM, the others are read ahead and let go.

    disk ──> slots, read ahead by threads ────────┐
                                                  ├──> take(piece) ──> product ──> release(piece)
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
from runner.weights.chunks import Piece

_LONGEST_READ = 10.0  # seconds that a disk may take for one piece before the program ends without it
READERS = 2  # one reads while the other hands over
# Seconds between looks at Ctrl-C, which interrupts no wait without an end on some systems.
_LONGEST_WAIT = 0.2


class Slot:
    """Page-aligned memory for one piece."""

    def __init__(self, nbytes: int) -> None:
        self._memory = memory.anonymous(nbytes)
        self.view = memoryview(self._memory)
        self._piece: Piece | None = None

    def weights(self, piece: Piece) -> torch.Tensor:
        """What was read into it, as the piece's tensor."""
        if piece is not self._piece:
            count = piece.nbytes // piece.dtype.itemsize
            skew = piece.start % platform.PAGE
            flat = torch.frombuffer(self._memory, dtype=piece.dtype, count=count, offset=skew)
            self._piece, self._weights = piece, flat.view(piece.shape)
        return self._weights


def slot_bytes(nbytes: int) -> int:
    """What a slot for a piece of `nbytes` must have: whole pages, wherever the piece begins in its first."""
    return (nbytes + 2 * platform.PAGE - 2) // platform.PAGE * platform.PAGE


@dataclass
class Traffic:
    """What a stream has done so far."""

    bytes_streamed: int = 0  # of streamed pieces that were handed out
    bytes_loaded: int = 0  # of resident pieces, once each
    reading_seconds: float = 0.0  # with at least one read under way
    bytes_fetched: int = 0  # in that time
    waiting_seconds: float = 0.0  # of the pass, for a piece that was not there yet

    @property
    def bytes_read(self) -> int:
        """What the passes so far needed from the files."""
        return self.bytes_streamed + self.bytes_loaded


class Stream:
    """Hands out `pieces` one at a time, first to last and around again.

    Until `arrange` says otherwise every piece is resident.
    """

    def __init__(self, pieces: Sequence[Piece], readers: int = READERS) -> None:
        self._shared = _Shared(tuple(pieces))
        self._readers = readers
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self._shared, self._threads)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self._shared.pieces

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the pieces that are not resident: what each pass reads."""
        shared = self._shared
        return sum(piece.nbytes for index, piece in enumerate(shared.pieces) if index not in shared.resident)

    @property
    def traffic(self) -> Traffic:
        return self._shared.traffic

    def arrange(self, resident: frozenset[int], slots: int) -> None:
        """Keep the pieces with these indices from now on, and stream the others through `slots` slots.

        Raises ValueError where something is to be streamed through fewer than 2 slots.
        """
        shared = self._shared
        streamed = [piece for index, piece in enumerate(shared.pieces) if index not in resident]
        if streamed and slots < 2:
            raise ValueError(f"{slots} slots cannot hold a piece in use and one that is read")
        nbytes = max((slot_bytes(piece.nbytes) for piece in streamed), default=0)
        with shared.changed:
            if shared.resident == resident and len(shared.slots) == (slots if streamed else 0):
                return
            shared.kept = {index: slot for index, slot in shared.kept.items() if index in resident}
            shared.counted &= resident
            shared.resident = resident
            shared.slots = []
            shared.restart(0)
        # The old slots are free by now, save those that are still being read into.
        fresh = [Slot(nbytes) for _ in range(slots if streamed else 0)]
        with shared.changed:
            shared.slots, shared.free = fresh, list(fresh)
            shared.restart(0)

    @contextmanager
    def piece(self, index: int) -> Iterator[torch.Tensor]:
        """The weights of piece `index` [rows, K], for as long as the context lasts.

        Out of turn, the stream begins anew there. Raises `BloomdeskError` where the file cannot be read, or has changed
        since it was opened.
        """
        weights, slot = self._take(index)
        try:
            yield weights
        finally:
            if slot:
                self._release(slot)

    def _take(self, index: int) -> tuple[torch.Tensor, Slot | None]:
        """Begin to use a piece; without a slot there is nothing to release."""
        shared = self._shared
        if shared.at_rest:
            return self._weights(index, shared.kept[index]), None
        with shared.changed:
            if shared.in_use or shared.position % len(shared.pieces) != index:
                shared.restart(index)
            shared.in_use = True
            self._start()
            slot = self._awaited(index)
        return self._weights(index, slot), slot

    def _weights(self, index: int, slot: Slot) -> torch.Tensor:
        """What the slot of a piece holds. A streamed piece's file is looked at when it is read, others' once a pass."""
        shared = self._shared
        piece = shared.pieces[index]
        if index in shared.kept and (not index or shared.pieces[index - 1].file is not piece.file):
            check_unchanged(piece)
        return slot.weights(piece)

    def _awaited(self, index: int) -> Slot:
        """The slot that piece `index`, the next in turn, is in."""
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
            shared.traffic.bytes_streamed += shared.pieces[index].nbytes
        elif index not in shared.counted:
            shared.counted.add(index)
            shared.traffic.bytes_loaded += shared.pieces[index].nbytes
        return found

    def _release(self, slot: Slot) -> None:
        shared = self._shared
        with shared.changed:
            shared.position += 1
            shared.give_back(slot)
            if len(shared.kept) < len(shared.pieces):
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

    Pieces are counted on through all passes: number `n` is piece `n % len(pieces)`. `position` is the one in use or
    next to be, `claimed` the next that a reader will take on. A claim of an older `epoch` is of no use any more.
    `in_use` stays set where an interruption came between taking a piece and releasing it.
    """

    pieces: tuple[Piece, ...]
    resident: frozenset[int] = field(init=False)
    kept: dict[int, Slot] = field(default_factory=dict)  # the resident ones that are there
    counted: set[int] = field(default_factory=set)  # of these, those that were handed out
    slots: list[Slot] = field(default_factory=list)
    free: list[Slot] = field(default_factory=list)
    filling: set[Slot] = field(default_factory=set)
    ready: dict[int, Slot | Exception] = field(default_factory=dict)
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
        self.resident = frozenset(range(len(self.pieces)))

    @property
    def at_rest(self) -> bool:
        """Whether all pieces are there for good: then they are handed out without any of this."""
        return len(self.counted) == len(self.pieces)

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def restart(self, index: int) -> None:
        """Begin at piece `index`, with nothing read."""
        self.epoch += 1
        self.free = [slot for slot in self.slots if slot not in self.filling]
        self.ready.clear()
        self.failed = False
        self.position = self.claimed = index
        self.changed.notify_all()

    def give_back(self, slot: Slot) -> None:
        """Take a slot back, unless it is a resident one, or of an older arrangement, or back already."""
        if slot in self.slots and slot not in self.free:
            self.free.append(slot)

    def claim(self) -> tuple[int, int, Slot] | None:
        """The next piece to be read: epoch, number, slot; None while there is nothing to do."""
        if self.failed:
            return None
        count = len(self.pieces)
        while self.claimed < self.position + count:
            index = self.claimed % count
            if index not in self.kept:
                if index in self.resident:
                    slot = Slot(slot_bytes(self.pieces[index].nbytes))
                elif self.free:
                    slot = self.free.pop()
                    self.filling.add(slot)
                else:
                    return None
                self.claimed += 1
                return self.epoch, self.claimed - 1, slot
            self.claimed += 1
        return None

    def hand_over(self, epoch: int, number: int, slot: Slot, failure: Exception | None) -> None:
        """Take what became of a claim."""
        index = number % len(self.pieces)
        is_current = epoch == self.epoch
        if slot in self.filling:
            self.filling.discard(slot)
            if is_current and not failure:
                self.ready[number] = slot
            else:
                self.give_back(slot)
        elif not failure and index in self.resident:  # it may be arranged otherwise meanwhile
            self.kept.setdefault(index, slot)
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
        epoch, number, slot = claim
        piece = shared.pieces[number % len(shared.pieces)]
        failure = None
        try:
            _fetch(piece, slot, stays=slot not in shared.filling)
        except Exception as error:
            failure = _worded(piece, error)
        with shared.changed:
            shared.reading -= 1
            shared.traffic.bytes_fetched += piece.nbytes
            now = time.perf_counter()  # another read may be under way, and so on for ever
            shared.traffic.reading_seconds += now - shared.reading_since
            shared.reading_since = now
            shared.hand_over(epoch, number, slot, failure)
            shared.changed.notify_all()


def _fetch(piece: Piece, slot: Slot, *, stays: bool) -> None:
    """Bring a piece into its slot; what stays is taken from the page cache as far as it happens to be there."""
    start = piece.start // platform.PAGE * platform.PAGE
    wanted = piece.start + piece.nbytes - start
    done = 0
    if stays:
        check_unchanged(piece)
        done = files.read_cached(piece.file.path, start, slot.view[:wanted])
        if done == wanted:
            return
        done -= done % platform.PAGE
    try:
        _fill(piece, slot, start, done, wanted, past_the_cache=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _fill(piece, slot, start, done, wanted, past_the_cache=False)


def _fill(piece: Piece, slot: Slot, start: int, done: int, wanted: int, *, past_the_cache: bool) -> None:
    view = slot.view[: -(-wanted // platform.PAGE) * platform.PAGE]
    with files.open_for_streaming(piece.file.path, past_the_cache=past_the_cache) as file:
        check_unchanged(piece, file.fileno())
        file.seek(start + done)
        while done < wanted:
            count = file.readinto(view[done:])
            if not count:
                raise OSError(errno.EIO, "the file ends too early", str(piece.file.path))
            done += count
        if not past_the_cache:
            files.forget(file, start, wanted)


def check_unchanged(piece: Piece, descriptor: int | None = None) -> None:
    """Raises `BloomdeskError` where a piece's file, by its path or as opened, is not as it was at first."""
    try:
        found = os.stat(piece.file.path if descriptor is None else descriptor)  # noqa: PTH116 - of either kind
    except OSError as error:
        raise _worded(piece, error) from error
    if (found.st_size, found.st_mtime_ns) != (piece.file.size, piece.file.changed_ns):
        raise BloomdeskError(
            f"{piece.file.path} was changed while the model was in use: opened with {piece.file.size:,} bytes, "
            f"now {found.st_size:,} bytes written at another time",
            f"see that it is whole, then run it again: bloomdesk verify {piece.file.path.parent}",
        )


def _worded(piece: Piece, error: Exception) -> Exception:
    if not isinstance(error, OSError):
        return error
    return BloomdeskError(
        f"{piece.file.path} cannot be read at bytes {piece.start:,} to {piece.start + piece.nbytes:,}: "
        f"{error.strerror or error}",
        f"see what is damaged: bloomdesk verify {piece.file.path.parent}",
    )
