"""N-grams: draft tokens from the text itself, which are what followed its longest suffix when that stood there before.

Prompt lookup, as in https://github.com/apoorvumang/prompt-lookup-decoding, over prompt and output as they grow. If no
suffix stood there before, the text may have replaced some words of what it repeats: then it is expected to continue
beside the place that it repeats.
"""

from __future__ import annotations

from collections.abc import Iterable

# Longer matches count as this long, so that the latest of them is chosen.
LONGEST = 16


class NgramIndex:
    """A text of token ids, and where each n-gram of up to `LONGEST` of them ended last.

    A token costs the same time and memory however long the text is. `match_length` is the length of the longest suffix
    that stood in the text before, and `place` the index of the next draft token in the text, or None.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.match_length = 0
        self.place: int | None = None
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, ids: Iterable[int]) -> None:
        """Append these tokens to the text."""
        for token in ids:
            self.ids.append(token)
            self.match_length = 0
            if self.place is not None:
                self.place += 1
            end = len(self.ids)
            for length in range(1, min(LONGEST, end) + 1):
                ngram = tuple(self.ids[end - length :])
                if before := self._ends.get(ngram):
                    self.match_length, self.place = length, before
                self._ends[ngram] = end

    def propose(self, count: int) -> list[int]:
        """The `count` tokens of the text from `place` on; none if there is no such place.

        At the end of the text they continue with themselves, so a text in a loop is expected to stay in it.
        """
        if self.place is None:
            return []
        period = len(self.ids) - self.place
        return [self.ids[self.place + step % period] for step in range(count)]
