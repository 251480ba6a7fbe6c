"""A file's bytes over several connections, handed out in their order, from a bounded window of memory.

    file    [ handed out ....... |  range  |  range  |  range  |  range  | not asked for yet ........ ]
                              frontier      each of them on its way or whole         next

Ranges are given to connections in their order, one window of memory ahead of the frontier. A range that comes
early waits in memory, so the file on the disk stays a clean beginning and is hashed as it grows. If only some of the
file is wanted, these stretches follow one another as if there were nothing between them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from toolkit.hub import client
from toolkit.hub.client import Location
from toolkit.hub.connection import Connection
from toolkit.hub.failures import Resource, network_errors
from toolkit.hub.line import Line
from toolkit.hub.retry import RetryPolicy

# Bytes of all ranges that are being fetched or wait for an earlier one; a kill loses at most these.
WINDOW = 64 * 2**20
SMALLEST, LARGEST = 2**20, 8 * 2**20
MOST_CONNECTIONS = 32
BLOCK = 2**20
# Seconds after which what came of a range is handed out, however little it is.
SECONDS_BETWEEN_BLOCKS = 0.5
# Seconds that all other ranges wait for one before its rest is fetched over a new connection.
SECONDS_OF_GRACE = 3.0
# For a thread that waits in a name look-up; any other one ends at once.
SECONDS_TO_STOP = 2.0


def range_size(connections: int) -> int:
    """Bytes of a range: as large as lets each connection have one on its way and one that waits."""
    return max(SMALLEST, min(LARGEST, WINDOW // (2 * connections)))


@dataclass
class _Range:
    start: int
    room: memoryview
    connection: Connection
    filled: int = 0
    taken: int = 0

    @property
    def whole(self) -> bool:
        return self.filled == len(self.room)


class _Stopped(Exception):
    """The others have ended, so this range is of no use any more."""


class Ahead:
    """The bytes of a file in `wanted`, stretches in order, fetched ahead by as many threads as connections.

    Each range is tried again and gone on with on its own. A first range alone shows that there are ranges;
    if there are none, `blocks` raises `Unranged` at the position it has reached.
    """

    def __init__(
        self,
        resource: Resource,
        locate: Callable[[], Location],
        wanted: Sequence[tuple[int, int]],
        connections: int,
        line: Line,
        check: Callable[[], None],
    ) -> None:
        """`wanted` has the first byte of each stretch, and the one after its last.

        `locate` asks the Hub where the file is; raises one of `network_errors` or `BloomdeskError`.

        `check` is called now and then where the blocks are taken, while none comes; it may raise to end all.
        """
        self.received = 0
        self._line, self._check = line, check
        self._resource, self._address = resource, _Address(locate)
        self._size = range_size(connections)
        # First byte and length of those that are not asked for yet.
        self._left = deque(
            (at, min(self._size, stop - at))
            for start, stop in wanted
            for at in range(start, stop, self._size)
        )
        self._proven = self._began = False
        self._ranges: deque[_Range] = deque()
        largest = max((length for _, length in self._left), default=0)
        # One more than ranges: only a full window has none left.
        self._spare = [bytearray(largest) for _ in range(min(len(self._left) + 1, WINDOW // self._size))]
        self._failure: BaseException | None = None
        self._held_up_since: float | None = None
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        count = min(connections, len(self._left))
        self._connections = [Connection(line, self._raise_if_stopped) for _ in range(count)]
        self._threads = [
            threading.Thread(
                target=self._work, args=(connection,), daemon=True, name=f"range {resource.path}"
            )
            for connection in self._connections
        ]

    def __enter__(self) -> Ahead:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # interrupted, or no thread to be had
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(SECONDS_TO_STOP)

    def blocks(self) -> Iterator[memoryview]:
        """What comes, in order; a block may change once the next one is asked for.

        Raises `Unranged`, or `BloomdeskError` if the Hub refuses or cannot be reached; before that, all that came
        up to the gap is handed out.
        """
        while self._ranges or self._left:
            yield self._take()
            with self._changed:
                first = self._ranges[0]
                if first.taken == len(first.room):
                    self._spare.append(self._ranges.popleft().room.obj)  # type: ignore[arg-type]
                    self._changed.notify_all()

    def _take(self) -> memoryview:
        """The next bytes at the frontier, a block of some size if it is not long in coming."""
        in_time = True
        while True:
            with self._changed:
                if self._ranges:
                    first = self._ranges[0]
                    count = first.filled - first.taken
                    now = first.whole or count >= BLOCK or not in_time or self._failure is not None
                    if count and now:
                        first.taken = first.filled
                        return first.room[first.taken - count : first.taken]
                if self._failure is not None:
                    raise self._failure
                in_time = self._changed.wait(SECONDS_BETWEEN_BLOCKS)
                self._drop_straggler()
                self._drop_unanswered()
            if not in_time:
                self._check()

    def _drop_unanswered(self) -> None:
        """A header whose bytes trickle in is no answer, though there is always one more to wait for."""
        for connection in self._connections:
            since = connection.asking_since
            if since is not None and time.monotonic() - since > client.SECONDS_OF_A_SHORT_ANSWER:
                connection.drop()

    def _drop_straggler(self) -> None:
        """One connection that crawls must not keep the others from working once the window is full."""
        now, others = time.monotonic(), list(self._ranges)[1:]
        if not others or self._spare or not all(part.whole for part in others):
            self._held_up_since = None
        elif self._held_up_since is None:
            self._held_up_since = now
        elif now - self._held_up_since > SECONDS_OF_GRACE:
            self._held_up_since = None
            self._ranges[0].connection.drop()

    def _work(self, connection: Connection) -> None:
        try:
            while (part := self._claim(connection)) is not None:
                self._fill(part)
        except BaseException as error:  # raised again where the blocks are taken
            self._end(error)
        finally:
            connection.close()

    def _claim(self, connection: Connection) -> _Range | None:
        """The next range to fetch, when there is room for it; None when there is nothing left to do."""
        with self._changed:
            while not self._stopping.is_set() and self._left:
                if self._spare and (self._proven or not self._began):
                    start, length = self._left.popleft()
                    part = _Range(start, memoryview(self._spare.pop())[:length], connection)
                    self._ranges.append(part)
                    self._began = True
                    return part
                self._changed.wait()
        return None

    def _fill(self, part: _Range) -> None:
        retries = RetryPolicy(self._resource, self._line, self._raise_if_stopped)
        while not part.whole:
            before, location = part.filled, None
            try:
                location = self._address.location()
                for count in part.connection.read(location, part.start + before, part.room[before:]):
                    self._grow(part, count)
            except network_errors() as error:
                # No failure if the others have hung up.
                self._raise_if_stopped()
                if part.filled > before:
                    retries.reset()
                else:
                    self._address.renew(location)
                retries.backoff(error)

    def _grow(self, part: _Range, count: int) -> None:
        if count:
            self._line.came(count)
        with self._changed:
            part.filled += count
            self.received += count
            self._proven = True
            if not count or part.whole or part.filled // BLOCK > (part.filled - count) // BLOCK:
                self._changed.notify_all()

    def _raise_if_stopped(self) -> None:
        if self._stopping.is_set():
            raise _Stopped

    def _end(self, failure: BaseException | None = None) -> None:
        with self._changed:
            if failure is not None and not self._stopping.is_set():
                self._failure = failure
            self._stopping.set()
            self._changed.notify_all()
        for connection in self._connections:
            connection.hang_up()
        self._line.wake()


class _Address:
    """Where a file is, asked for once and shared, until a connection found that it leads nowhere."""

    def __init__(self, locate: Callable[[], Location]) -> None:
        self._locate, self._lock = locate, threading.Lock()
        self._known: Location | None = None

    def location(self) -> Location:
        with self._lock:
            if self._known is None:
                self._known = self._locate()
            return self._known

    def renew(self, failed: Location | None) -> None:
        """Ask anew the next time, unless another connection has done so since."""
        with self._lock:
            if self._known is failed:
                self._known = None
