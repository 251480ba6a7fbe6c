"""One prompt of a batch: what was asked, and the tokens that it has so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from runner.generation.speculation.ngram import Lookup
from runner.model.kv_cache import KVCache, Segment


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token id, and how many new tokens it may get."""

    prompt_ids: Sequence[int]
    max_new_tokens: int

    @property
    def capacity(self) -> int:
        """Positions in a cache; the last token is never fed back, so it needs none."""
        return len(self.prompt_ids) + self.max_new_tokens - 1


@dataclass(eq=False)
class Continuation:
    """A prompt's new tokens, and what they took.

    `stop_reason` is "eos" where the last of `ids` is `</s>`, "length" where `max_new_tokens` ended it, and None while
    more may come. `passes` are those that carried rows of it; `bytes_read`, `seconds` and `drafting_seconds` are its
    even share of them. `proposed` counts the tokens that a pass carried on trial, `accepted` those that were right.
    """

    index: int
    request: Request
    ids: list[int] = field(default_factory=list)
    stop_reason: str | None = None
    passes: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    proposed: int = 0
    accepted: int = 0
    drafting_seconds: float = 0.0
    is_unsound: bool = False  # what is proposed for it made numbers overflow
    cache: KVCache | None = None
    lookup: Lookup | None = None

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.request.prompt_ids

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return self.request.max_new_tokens - len(self.ids)

    @property
    def settled(self) -> int:
        """Positions of the cache that the next token leaves as they are, once the prompt is through."""
        return len(self.prompt_ids) + len(self.ids) - 1

    def prompt_segment(self, most: int) -> Segment:
        """The next rows of the prompt, up to `most`."""
        done = self.cache.length
        ids = self.prompt_ids[done : done + most]
        return Segment(ids, self.cache, 1 if done + len(ids) == len(self.prompt_ids) else 0)

    def segment(self, proposed: Sequence[int]) -> Segment:
        """The last token's row, and one for each that is proposed to follow."""
        return Segment([self.ids[-1], *proposed], self.cache, 1 + len(proposed))

    def take(self, likeliest: Sequence[int], proposed: Sequence[int], eos: int | None) -> int:
        """Add what a pass gave: the likeliest token after each row, of which the first is certain; how many it took.

        Row n counts where all proposals before it were right.
        """
        self.proposed += len(proposed)
        for place, token in enumerate(likeliest):
            self.ids.append(token)
            if self.lookup:
                self.lookup.append(token)
            if token == eos:
                self.stop_reason = "eos"
            elif not self.remaining:
                self.stop_reason = "length"
            if self.stop_reason or place == len(proposed) or proposed[place] != token:
                break
        self.accepted += place
        return place + 1
