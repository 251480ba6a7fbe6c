"""Orders: what rank 0 tells the others before each pass, and between passes.

pass     caches that are new, caches that are gone, segments, and, if it has changed, what the RAM is planned for
sign     nothing to do; the answer says that the rank is there
session  the lead's positions: which of them does the session here have?
keep     go on from that many positions of the session
fill     load the session's positions into a cache
save     append a cache's positions to the session
end      all is done
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from runner.generation.memory_plan import MemoryRequest
from runner.model.kv_cache import KVCache, Segment

PASS, SIGN, END = "pass", "sign", "end"
SESSION, KEEP, FILL, SAVE = "session", "keep", "fill", "save"
# The fields of a memory request that are the same on all machines.
_PLANNED = ("capacities", "rows", "logit_rows", "shared", "joined")


class CacheNumbers:
    """The lead's caches by number, under which the others have theirs; those that are gone are told once."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[KVCache, int] = weakref.WeakKeyDictionary()
        self._count = 0
        self._gone: list[int] = []
        self._new: list[list[Any]] = []

    def number(self, cache: KVCache) -> int:
        """That of a cache; one that is new gets one, after its prefixes."""
        if cache not in self._numbers:
            before = self.number(cache.prefix) if cache.prefix else None
            self._new.append([self._count, cache.capacity, before, cache.is_prefix])
            self._numbers[cache] = self._count
            weakref.finalize(cache, self._gone.append, self._count)
            self._count += 1
        return self._numbers[cache]

    def changes(self) -> dict[str, Any]:
        """What the others don't know yet of caches."""
        found = {"new": self._new, "gone": self._gone[:]}
        self._new = []
        del self._gone[: len(found["gone"])]
        return found


class Caches:
    """A follower's caches, by the lead's numbers."""

    def __init__(self, new_cache: Any) -> None:
        self._new_cache = new_cache
        self._caches: dict[int, KVCache] = {}

    def follow(self, changes: Mapping[str, Any]) -> None:
        """Make and drop what the lead has made and dropped."""
        for number in changes["gone"]:
            self._caches.pop(number, None)
        for number, capacity, before, is_prefix in changes["new"]:
            prefix = None if before is None else self._caches[before]
            self._caches[number] = self._new_cache(capacity, prefix, is_prefix=is_prefix)

    def __getitem__(self, number: int) -> KVCache:
        return self._caches[number]

    def at(self, number: int, length: int) -> KVCache:
        """A cache, without the positions from `length` on, which the lead has removed."""
        found = self._caches[number]
        if found.length > length:
            found.rewind(length)
        if found.length != length:
            raise ValueError(f"a cache has {found.length} positions here, and {length} at rank 0")
        return found


def pass_order(
    segments: Sequence[Segment], numbers: CacheNumbers, plan: MemoryRequest | None
) -> dict[str, Any]:
    """The order for a pass; `plan` says what the RAM is planned for, if it has changed."""
    rows = [[numbers.number(each.cache), each.cache.length, list(each.ids), each.logits] for each in segments]
    planned = None if plan is None else {name: getattr(plan, name) for name in _PLANNED}
    return {"order": PASS, "caches": numbers.changes(), "segments": rows, "plan": planned}


def segments_of(order: Mapping[str, Any], caches: Caches) -> list[Segment]:
    return [
        Segment(ids, caches.at(number, length), logits) for number, length, ids, logits in order["segments"]
    ]


def planned(order: Mapping[str, Any], own: MemoryRequest) -> MemoryRequest | None:
    """What this machine's RAM is to be planned for, if that has changed; `own` says what it has."""
    fields = order["plan"]
    return replace(own, **{**fields, "capacities": tuple(fields["capacities"])}) if fields else None
