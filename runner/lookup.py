"""Proposals from the text itself: what came after its longest suffix when that stood there before.

Prompt lookup, as in https://github.com/apoorvumang/prompt-lookup-decoding, over prompt and output as they grow.
"""

from __future__ import annotations

from collections.abc import Iterable

# One token alone comes again everywhere; two are a phrase. Beyond the longest, a later place counts for more than a
# longer match.
SHORTEST, LONGEST = 2, 16


class Lookup:
    """A text of token ids, and where each run of `SHORTEST` to `LONGEST` of them ended last.

    A token costs the same however long the text is, in time and in memory.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._match = (0, 0)
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        self._ids.append(token)
        self._match = (0, 0)
        end = len(self._ids)
        for length in range(SHORTEST, min(LONGEST, end) + 1):
            run = tuple(self._ids[end - length :])
            if before := self._ends.get(run):
                self._match = length, before
            self._ends[run] = end

    @property
    def match_length(self) -> int:
        """Tokens of the longest suffix that stood in the text before, up to `LONGEST`; 0 where it is too short."""
        return self._match[0]

    def propose(self, count: int) -> list[int]:
        """The `count` tokens that followed the last place where that suffix stood; none where there is no such place.

        Where they reach the end of the text, they go on with themselves: a text in a loop stays in it.
        """
        length, end = self._match
        if not length:
            return []
        period = len(self._ids) - end
        return [self._ids[end + place % period] for place in range(count)]
