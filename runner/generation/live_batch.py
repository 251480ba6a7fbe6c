"""A batch that stays: requests join it before any pass, and leave it when they are done or nobody wants them.

add ──> waiting ──────────────> active ──> done
add ──> giving_way, if it does ──┘ ^  │ one of `waiting` has no room: its cache is dropped, and its tokens stay
              ^────────────────────┼──┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

from runner.errors import BloomdeskError
from runner.generation.batch import Batch, alone
from runner.generation.capacity import MOST_AT_A_TIME, Planner, first_rows, worth
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, memory_plan
from runner.generation.sequence import Ids, Request, Restored, Sequence
from runner.generation.shared_prefixes import SharedPrefixes
from runner.generation.speculation.proposer import Proposer
from runner.model.forward import ModelRunner, OnPart


class LiveBatch(Batch):
    """Requests come with `add` and go with `drop`; the memory plan is made again for those that are there.

    `base` gives what passes without rows and caches need at the time. Up to `most` sequences are active; None leaves
    it to the plan. Those that join together share what their prompts begin with. Those that give way join when no other
    waits. Who else is there changes no token.
    """

    def __init__(
        self,
        model: ModelRunner,
        base: Callable[[], MemoryRequest],
        proposer: Proposer,
        most: int | None = None,
        on_part: OnPart | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> None:
        """`on_begin` is called before each pass, when those who join it are active.

        Raises `BloomdeskError` if the RAM is too little for a single position.
        """
        plan = memory_plan(replace(base(), capacities=(1,), rows=1))
        super().__init__(model, (), plan, SharedPrefixes([]), proposer, on_part)
        self._base, self._most, self._on_begin = base, most, on_begin
        self._added = 0
        # Those that wait behind all others, the first that came first.
        self.giving_way: deque[Sequence] = deque()
        # Whether somebody has left since the last plan.
        self._has_room = False

    def add(self, request: Request, earlier: Restored | None = None) -> Sequence:
        """The sequence of a request, which joins the next pass with room for it, unless it needs none.

        It goes on from what it has of an `earlier` run.
        """
        sequence = Sequence(self._added, request, self.model.weights.model.eos_token_ids)
        self._added += 1
        if earlier:
            alone(sequence, partial(sequence.restore, earlier))
        if not sequence.is_done:
            (self.giving_way if request.gives_way else self.waiting).append(sequence)
        return sequence

    def drop(self, sequence: Sequence) -> None:
        """Remove a sequence, done or not; its RAM is free for the next pass."""
        if sequence in self.active:
            self._take_out(sequence)
        for queue in (self.waiting, self.giving_way):
            if sequence in queue:
                queue.remove(sequence)

    def check(self, request: Request) -> None:
        """Raise `BloomdeskError`, with the figures, if the RAM is too little for this request alone."""
        self._plan_for([Sequence(0, request)])

    def _admit(self) -> None:
        count, plan = self._joining()
        while count < len(self.waiting) and self._suspend():
            count, plan = self._joining()
        if plan:
            self._has_room = False
            self._arrange(plan)
        joining = [self._next() for _ in range(count)]
        if not (self.active or joining) and (self.waiting or self.giving_way):
            # It failed: there is no RAM for it even alone.
            self.active.append(self._next())
        prefixes = SharedPrefixes(list(map(_shareable, joining)))
        for number, each in enumerate(joining):
            active = [other.cache for other in self.active]
            capacity, most = each.request.capacity, self.plan.request.positions
            each.cache = prefixes.new_cache(self.model, number, capacity, active, most)
            self.active.append(each)
        self._resume()
        if self._on_begin:
            self._on_begin()

    def _next(self) -> Sequence:
        return (self.waiting or self.giving_way).popleft()

    def _suspend(self) -> bool:
        """Whether the last active sequence that gives way has left; its tokens stay, and it reads them again later."""
        last = next((each for each in reversed(self.active) if each.request.gives_way), None)
        if last:
            self._take_out(last)
            self.giving_way.appendleft(last)
        return last is not None

    def _take_out(self, sequence: Sequence) -> None:
        self.active.remove(sequence)
        sequence.cache, self._has_room = None, True
        self.proposer.release(sequence)

    def _dismiss(self) -> list[Sequence]:
        finished = super()._dismiss()
        self._has_room |= bool(finished)
        return finished

    def _joining(self) -> tuple[int, MemoryPlan | None]:
        """How many of those that wait join now, the first ones, and the memory plan for that, if it is another."""
        waiting = len(self.waiting) + len(self.giving_way)
        room = min((self._most or MOST_AT_A_TIME) - len(self.active), waiting)
        if room <= 0 and not (self._has_room and self.active):
            return 0, None
        everybody = self._plan_with(room)
        if everybody and not everybody.streamed_bytes:
            return room, everybody
        best_count, best = 0, self._plan_with(0) if self.active else None
        for count in range(1, room + 1):
            plan = self._plan_with(count)
            if plan is None:
                break
            if best is None or self._most or worth(plan) > worth(best):
                best_count, best = count, plan
        return best_count, best

    def _plan_with(self, count: int) -> MemoryPlan | None:
        """The plan for the active sequences and the first `count` that wait, or None if the RAM is too little."""
        try:
            return self._plan_for([*self.active, *islice(chain(self.waiting, self.giving_way), count)])
        except BloomdeskError as error:
            if not self.active and count == 1:
                # Only what has been taken since it was checked, as by a grammar, can be why.
                (self.waiting or self.giving_way)[0].fail(error)
            return None

    def _plan_for(self, sequences: Row[Sequence]) -> MemoryPlan:
        """The plan for passes that carry all of these. Raises `BloomdeskError` if the RAM is too little."""
        requests = [each.request for each in sequences]
        capacities = tuple(sorted((request.capacity for request in requests), reverse=True))
        base = replace(self._base(), capacities=capacities, keep=self.plan.resident)
        sharing = _Sharing.of(sequences)
        rows = [_rows(each, sharing.shared(number)) for number, each in enumerate(sequences)]
        return Planner(base, requests, self.proposer, sharing, rows).all_together()


@dataclass(frozen=True)
class _Sharing:
    """What sequences share, active ones by their caches, and those that are to join among themselves."""

    counts: Row[int]
    positions: int

    @classmethod
    def of(cls, sequences: Row[Sequence]) -> _Sharing:
        prefixes = {cache for each in sequences if each.cache for cache in each.cache.chain[:-1]}
        joining = {each: place for place, each in enumerate(each for each in sequences if not each.cache)}
        tree = SharedPrefixes(list(map(_shareable, joining)))
        counts = [tree.shared(joining[each]) if each in joining else each.cache.start for each in sequences]
        return cls(counts, tree.positions + sum(cache.positions for cache in prefixes))

    def shared(self, number: int) -> int:
        return self.counts[number]


def _rows(each: Sequence, shared: int) -> int:
    """Rows that come before the next token of a sequence, with those of its prefixes."""
    if each.cache:
        return each.unread + shared
    return min(each.request.capacity, first_rows(each.request) + len(each.ids))


def _shareable(each: Sequence) -> Ids:
    """The prompt, as far as others may compute it: all but a scored one, whose rows give logits."""
    return () if each.request.scores_prompt else each.prompt_ids
