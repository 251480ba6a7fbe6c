"""A file on the Hub to seek and read in, as a zip's directory is read: a few bytes here and there."""

from __future__ import annotations

from collections.abc import Callable

from toolkit.hub.connection import Connection
from toolkit.hub.failures import Resource, network_errors
from toolkit.hub.line import Line
from toolkit.hub.retry import RetryPolicy
from toolkit.hub.revision import HubFile, Revision
from toolkit.hub.transfer import locate_same

PAGE = 4096


class RemoteFile:
    """The bytes of a large file, over one connection; those that have come stay in memory.

    Reading raises `Unranged` if they don't come by ranges, and `BloomdeskError` if the Hub refuses, cannot be reached,
    or has another file there. `received` counts the bytes that came.
    """

    def __init__(self, revision: Revision, file: HubFile, line: Line, check: Callable[[], None]) -> None:
        """`check` is called now and then while nothing comes; it may raise to end all."""
        self.received = self._position = 0
        self._file, self._line, self._check = file, line, check
        self._resource = Resource(revision.repo, revision.commit, file.path)
        self._location = None
        self._pages: dict[int, memoryview] = {}
        self._connection = Connection(line, check)

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position, from the start, from where it is, or from the end."""
        self._position = max(0, (0, self._position, self._file.size)[whence] + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer at the end of the file."""
        start, stop = self._position, min(self._position + size, self._file.size)
        if start >= stop:
            return b""
        first, last = start // PAGE, -(-stop // PAGE)
        missing = [page for page in range(first, last) if page not in self._pages]
        if missing:
            self._fetch(missing[0], missing[-1] + 1)
        data = b"".join(self._pages[page] for page in range(first, last))
        self._position = stop
        return data[start - first * PAGE : stop - first * PAGE]

    def _fetch(self, first: int, last: int) -> None:
        start, stop = first * PAGE, min(last * PAGE, self._file.size)
        room, filled = memoryview(bytearray(stop - start)), 0
        retries = RetryPolicy(self._resource, self._line, self._check)
        while filled < len(room):
            before = filled
            try:
                self._location = self._location or locate_same(self._resource, self._file)
                for count in self._connection.read(self._location, start + filled, room[filled:]):
                    self._line.came(count)
                    filled += count
                    self.received += count
            except network_errors() as error:
                if filled > before:
                    retries.reset()
                self._location = None
                retries.backoff(error)
        for page in range(first, last):
            self._pages[page] = room[page * PAGE - start : (page + 1) * PAGE - start]
