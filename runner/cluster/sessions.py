"""A session on several machines: each keeps the positions of its heads in a directory of its own, rank 0 the text, too.

What all of them have counts. If one has less, as after a kill between two saves, or nothing, as a machine that stands
in for another, the next pass computes the rest again from the tokens, which rank 0 has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from runner.cluster import orders
from runner.errors import BloomdeskError
from runner.generation.scoring import TokenScore
from runner.generation.sequence import Request, common_length
from runner.generation.sequence import Sequence as TextSequence
from runner.generation.session import Session, append_positions, load_positions
from runner.generation.session_files import SessionFiles, SessionRequest
from runner.model.kv_cache import KVCache


class Orders(Protocol):
    """What rank 0 tells the others with; `Lead` does."""

    numbers: orders.CacheNumbers

    def give(self, order: dict[str, Any]) -> None: ...

    def answers(self, order: dict[str, Any]) -> list[Any]: ...


class LeadSession(Session):
    """Rank 0's session: it has the text, and the positions of its own heads."""

    def __init__(
        self, directory: Path, identity: str, request: Request, warn: Callable[[str], None], lead: Orders
    ) -> None:
        self._known: tuple[tuple[int, ...], list[TokenScore]] | None = None
        super().__init__(directory, identity, request, warn)
        self._lead, self._known = lead, (super().new_ids, super().scores)
        answers = lead.answers({"order": orders.SESSION, "ids": list(self._files.ids)})
        stops = {0, *(record.stop for record in self._files.records)}
        self.restored = max(stops.intersection(*({0, *each} for each in answers)))
        lead.give({"order": orders.KEEP, "positions": self.restored})

    @property
    def new_ids(self) -> tuple[int, ...]:
        return self._known[0] if self._known else super().new_ids

    @property
    def scores(self) -> list[TokenScore]:
        return self._known[1] if self._known else super().scores

    def fill(self, cache: KVCache) -> None:
        load_positions(self._files, cache, self.restored)
        number = self._lead.numbers.number(cache)
        self._lead.give({"order": orders.FILL, "cache": number, "caches": self._lead.numbers.changes()})

    def save(self, sequence: TextSequence) -> None:
        # Until now the tokens of positions that others have lost were safe there.
        if self._files.positions > self.restored:
            self._guarded(partial(self._files.truncate, self.restored))
        before = self._files.positions
        super().save(sequence)
        self.restored = self._files.positions
        new = [record for record in self._files.records if record.stop > before]
        if sequence.cache is not None and new:
            number = self._lead.numbers.number(sequence.cache)
            self._lead.give(
                {"order": orders.SAVE, "cache": number, "records": [list(record.ids) for record in new]}
            )


class FollowerSession:
    """The positions of a follower's heads, in `directory`; `identity` is that of its weights.

    Raises `BloomdeskError` if it is of other weights, or holds something else.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self._files = SessionFiles.load(directory)
        wanted = SessionRequest(identity, (), {})
        known = self._files.request
        if known is not None and known.fingerprint != identity:
            raise BloomdeskError(
                f"{directory} is a session of another model or slice", "give another --session, or that slice"
            )
        if known != wanted:
            self._files.begin(wanted, 0)

    def stops(self, ids: Sequence[int]) -> list[int]:
        """The positions at which a record of the text `ids` ends here."""
        common = common_length(ids, self._files.ids)
        return [record.stop for record in self._files.records if record.stop <= common]

    def keep(self, positions: int) -> None:
        """Forget what is recorded beyond a number of positions."""
        self._files.truncate(positions)

    def fill(self, cache: KVCache) -> None:
        load_positions(self._files, cache)

    def save(self, cache: KVCache, records: Sequence[Sequence[int]]) -> None:
        """Record the next positions of a cache, in records of these token ids. Raises `OSError` if the disk fails."""
        for ids in records:
            append_positions(self._files, cache, ids)
