"""Stop texts: where a growing text ends, also inside a token or a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class StopScanner:
    """Looks for the first of `stops` in bytes that come piece by piece.

    `end` is the position of its first byte, or None. `safe` is the number of bytes that belong to the text whatever
    follows: what could be the beginning of a stop text is held back.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self.text = bytearray()
        self.end: int | None = None
        self.safe = 0

    def push(self, data: bytes) -> None:
        """Append the bytes of a token; after a stop text nothing changes any more."""
        if self.end is not None:
            return
        start = max(0, len(self.text) - self._longest + 1)
        self.text += data
        found = [place for stop in self._stops if (place := self.text.find(stop, start)) >= 0]
        if found:
            self.end = self.safe = min(found)
            return
        self.safe = len(self.text)
        for place in range(max(0, len(self.text) - self._longest + 1), len(self.text)):
            if any(stop.startswith(self.text[place:]) for stop in self._stops):
                self.safe = place
                return


class ScannedText:
    """The text that a scanner lets through, as `TextStream` gives it: characters once they are whole."""

    def __init__(self, scanner: StopScanner) -> None:
        self._scanner, self._done = scanner, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that belongs to the continuation for sure, and was not given yet."""
        return self._until(self._scanner.safe)

    def finish(self) -> str:
        """The rest of it."""
        end = self._scanner.end
        return self._until(len(self._scanner.text) if end is None else end, final=True)

    def _until(self, end: int, *, final: bool = False) -> str:
        data = bytes(self._scanner.text[self._done : end])
        self._done = max(self._done, end)
        return self._decoder.decode(data, final)
