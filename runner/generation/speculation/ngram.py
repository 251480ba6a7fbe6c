"""Proposals from the text itself: what came after its longest suffix when that stood there before.

Prompt lookup, as in https://github.com/apoorvumang/prompt-lookup-decoding, over prompt and output as they grow. Where
no suffix stood there, the text may have replaced some words of what it repeats: then it is taken to go on as there.
"""

from __future__ import annotations

from collections.abc import Iterable

# Beyond this, a later place counts for more than a longer match.
LONGEST = 16


class Lookup:
    """A text of token ids, and where each run of up to `LONGEST` of them ended last.

    A token costs the same however long the text is, in time and in memory.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._match_length = 0
        self._place: int | None = None
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Have the text go on with this token."""
        self._ids.append(token)
        self._match_length = 0
        if self._place is not None:
            self._place += 1
        end = len(self._ids)
        for length in range(1, min(LONGEST, end) + 1):
            run = tuple(self._ids[end - length :])
            if before := self._ends.get(run):
                self._match_length, self._place = length, before
            self._ends[run] = end

    @property
    def match_length(self) -> int:
        """Tokens of the longest suffix that stood in the text before, up to `LONGEST`."""
        return self._match_length

    @property
    def place(self) -> int | None:
        """Where in the text stands what is proposed, after that suffix or what it has become; None where nothing is."""
        return self._place

    def propose(self, count: int) -> list[int]:
        """The `count` tokens that stand from `place` on; none where there is no such place.

        Where they reach the end of the text, they go on with themselves: a text in a loop stays in it.
        """
        if self._place is None:
            return []
        period = len(self._ids) - self._place
        return [self._ids[self._place + step % period] for step in range(count)]
