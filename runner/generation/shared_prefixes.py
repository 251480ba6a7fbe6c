"""Shared prefixes: which texts begin with the same tokens, and the caches of these beginnings while they are needed.

The texts, sorted by their tokens, make a tree; each node is a prefix that its texts share, and is computed once:

    few-shot examples ──┬── a document ──┬── a question
                        │                └── another question
                        └── another document ── ...

A prefix's cache lives while a text that is read uses it, and after that, if there is room, until the last of its texts
has begun. So what is shared never takes more RAM than caches of their own would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from runner.generation.sequence import Ids, common_length
from runner.model.forward import ModelRunner
from runner.model.kv_cache import KVCache, whole_lanes

# Fewest positions of a prefix beyond the one before it: a segment of its own costs about as much as a few rows.
LEAST_SHARED = 32


@dataclass(eq=False)
class Prefix:
    """The first `end` tokens of the texts `members`, of which `waiting` have not begun. `parent` is a shorter one."""

    end: int
    parent: Prefix | None
    members: Sequence[int]
    waiting: int
    cache: KVCache | None = None

    @property
    def start(self) -> int:
        return self.parent.end if self.parent else 0

    @property
    def chain(self) -> tuple[Prefix, ...]:
        """Those before it, the first positions first, and this one."""
        return (*self.parent.chain, self) if self.parent else (self,)


class SharedPrefixes:
    """The prefixes that texts share; a text has a number, its place among `texts`.

    The last token of a text is never shared: its row gives the first new token. With `ahead`, as many tokens after a
    prefix are the same in its texts too, so that its rows predict the same tokens.
    """

    def __init__(self, texts: Sequence[Ids], ahead: int = 0) -> None:
        prefixes = list(_tree(texts, ahead))
        # Number of positions of all prefixes, each counted once.
        self.positions = sum(prefix.end - prefix.start for prefix in prefixes)
        # Parents come first, so the deepest prefix of a text stays.
        self._deepest = {member: prefix for prefix in prefixes for member in prefix.members}
        self._kept: list[Prefix] = []

    def shared(self, number: int) -> int:
        """Number of the first positions of a text that are shared."""
        return self._deepest[number].end if number in self._deepest else 0

    def members(self, number: int, end: int) -> Sequence[int]:
        """Numbers of the texts that share the prefix of text `number` that has `end` positions; else its own."""
        chain = self._deepest[number].chain if number in self._deepest else ()
        return next((prefix.members for prefix in chain if prefix.end == end), (number,))

    def new_cache(
        self, model: ModelRunner, number: int, capacity: int, active: Iterable[KVCache], most: int
    ) -> KVCache | None:
        """A cache for text `number`, which begins now, or None if there is no room for it.

        It and the `active` caches, with all prefixes, may have up to `most` positions; prefixes that no active one uses
        make room.
        """
        chain = self._worthwhile(number)
        used = _with_prefixes([*active, *(prefix.cache for prefix in chain if prefix.cache)])
        own = sum(prefix.cache.positions for prefix in chain if prefix.cache)
        room = most - (whole_lanes(capacity) - own)
        if _positions(used | {prefix.cache for prefix in self._kept}) > room:
            self._keep(lambda prefix: prefix.cache in used)
            if _positions(used) > room:
                return None
        cache = None
        for prefix in chain:
            if prefix.cache is None:
                prefix.cache = model.new_cache(prefix.end, cache, is_prefix=True)
                self._kept.append(prefix)
            cache = prefix.cache
        cache = model.new_cache(capacity, cache)
        for prefix in self._deepest[number].chain if number in self._deepest else ():
            prefix.waiting -= 1
        self._keep(lambda prefix: prefix.waiting > 0)
        return cache

    def _worthwhile(self, number: int) -> tuple[Prefix, ...]:
        """The prefixes of a text that are in RAM, or that a later text needs as well."""
        prefix = self._deepest.get(number)
        while prefix and prefix.cache is None and prefix.waiting < 2:
            prefix = prefix.parent
        return prefix.chain if prefix else ()

    def _keep(self, is_needed: Callable[[Prefix], bool]) -> None:
        """Give up the caches of all other prefixes; active texts keep those that they use."""
        for prefix in self._kept:
            if not is_needed(prefix):
                prefix.cache = None
        self._kept = [prefix for prefix in self._kept if prefix.cache]


def _with_prefixes(caches: Iterable[KVCache]) -> set[KVCache]:
    return {each for cache in caches for each in cache.chain}


def _positions(caches: Iterable[KVCache]) -> int:
    return sum(cache.positions for cache in caches)


def _tree(texts: Sequence[Ids], ahead: int) -> Iterator[Prefix]:
    """All prefixes that are long enough, parents first."""
    texts = [text if isinstance(text, list) else list(text) for text in texts]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    # Shared by a text and the one before it in `order`; any two share the least of what lies between them.
    common = [0] + [_shareable(texts[one], texts[other], ahead) for one, other in pairwise(order)]
    pending: list[tuple[int, int, Prefix | None]] = [(0, len(order), None)]
    while pending:
        first, last, parent = pending.pop()
        if last - first < 2:
            continue
        end = min(common[first + 1 : last])
        if end - (parent.end if parent else 0) >= LEAST_SHARED:
            parent = Prefix(end, parent, order[first:last], last - first)
            yield parent
        cuts = [place for place in range(first + 1, last) if common[place] == end]
        pending += [(begin, stop, parent) for begin, stop in pairwise([first, *cuts, last])]


def _shareable(one: Ids, other: Ids, ahead: int) -> int:
    """Number of positions that two texts share."""
    return max(0, min(common_length(one, other), len(one) - 1, len(other) - 1) - ahead)
