"""A batch: which sequences are in the next pass, with which rows, and what the pass gave each of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

from runner.errors import BloomdeskError
from runner.generation.memory_plan import MemoryPlan, memory_plan
from runner.generation.sequence import Request, Restored, Sequence
from runner.generation.session import Session
from runner.generation.shared_prefixes import SharedPrefixes
from runner.generation.speculation.proposer import Proposer
from runner.model.forward import ModelRunner, OnPart
from runner.model.kv_cache import KVCache, Segment

Result = TypeVar("Result")


class Batch:
    """Requests in the order given, as many of them in a pass as `plan` has room for, and what they took together.

    A sequence that ends makes room, in the passes and in RAM, for the next. The rows of a joining prompt share the pass
    with the single rows of the others; a very long prompt, or many at once, take several passes. What prompts begin
    with in common is read once, in segments of its own before theirs.
    """

    def __init__(
        self,
        model: ModelRunner,
        requests: Iterable[Request],
        plan: MemoryPlan,
        prefixes: SharedPrefixes,
        proposer: Proposer,
        on_part: OnPart | None = None,
        session: Session | None = None,
    ) -> None:
        """`prefixes` are those of the prompts, and `session` is that of the only request."""
        self.model = model
        self._prefixes = prefixes
        eos = model.weights.model.eos_token_ids
        self.sequences = tuple(Sequence(index, request, eos) for index, request in enumerate(requests))
        self.active: list[Sequence] = []
        self.waiting = deque(self.sequences)
        self.passes = 0
        self.proposer = proposer
        self._on_part = on_part
        self._stream = model.weights.stream
        self._read_before = self._stream.traffic.bytes_read
        self._session = session
        if session:
            self.sequences[0].restore(Restored(session.new_ids, session.scores))
        self._arrange(plan)

    @property
    def tokens(self) -> int:
        """Number of new tokens of all sequences."""
        return sum(len(each.ids) for each in self.sequences)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that the passes used from the files: streamed ones in each pass, resident ones once."""
        return self._stream.traffic.bytes_read - self._read_before

    @property
    def proposed(self) -> int:
        """Number of draft tokens that passes carried."""
        return sum(each.proposed for each in self.sequences)

    @property
    def accepted(self) -> int:
        """Number of draft tokens that were right."""
        return sum(each.accepted for each in self.sequences)

    @property
    def drafting_seconds(self) -> float:
        return sum(each.drafting_seconds for each in self.sequences)

    def run(self) -> Iterator[Sequence]:
        """Yields each sequence as soon as it is done."""
        while self.active or self.waiting:
            yield from self.step()

    def step(self) -> list[Sequence]:
        """The sequences that end with one more pass. After an exception, the next step makes the pass again."""
        began, read = time.perf_counter(), self.bytes_read
        self._admit()
        request = self.plan.request
        # What is forced to its end needs no pass.
        if finished := self._dismiss():
            return finished
        prefixes, counts, logit_room = self._unread_rows()
        ready = [each for each, count in counts.items() if each.is_begun and count == each.unread]
        rows = sum(counts.values()) + sum(len(segment.ids) for segment in prefixes.values())
        other_rows = rows - len(ready)
        drafts = self.proposer.propose(ready, other_rows, max(0, min(request.rows - rows, logit_room)))
        own = {each: each.segment(count, drafts.get(each, ())) for each, count in counts.items()}
        segments = [*prefixes.values(), *own.values()]
        with self.proposer.cost.measure(self._stream, sum(len(segment.ids) for segment in segments)):
            found = self.model.forward_all(segments, self._on_part)[len(prefixes) :]
        self.passes += 1
        accepted = {
            each: alone(each, partial(each.verify, logits)) or 0
            for each, logits in zip(own, found, strict=True)
        }
        if self._session and not self.sequences[0].failure:
            self._session.save(self.sequences[0])
        self.proposer.learn(accepted, other_rows)
        seconds, nbytes = time.perf_counter() - began, self.bytes_read - read
        carried = [
            each for each in self.active if each in own or not prefixes.keys().isdisjoint(each.cache.chain)
        ]
        for each in carried:
            each.count_pass(seconds, nbytes, len(carried))
        if self.proposer.retire_draft(len(ready), self._stream.streamed_bytes):
            self._arrange(memory_plan(replace(request, draft=0, keep=self.plan.resident)))
        return self._dismiss()

    def _arrange(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.model.arrange(plan)

    def _admit(self) -> None:
        """Let waiting sequences join in their order, if there is room."""
        request = self.plan.request
        while self.waiting and len(self.active) < request.batch:
            each, active = self.waiting[0], [other.cache for other in self.active]
            each.cache = self._prefixes.new_cache(
                self.model, each.index, each.request.capacity, active, request.positions
            )
            if each.cache is None:
                break
            if self._session:
                self._session.fill(each.cache)
            self.active.append(self.waiting.popleft())
        self._resume()

    def _resume(self) -> None:
        for each in self.active:
            alone(each, each.resume)

    def _dismiss(self) -> list[Sequence]:
        """The sequences that are done, after their RAM is freed."""
        finished = [each for each in self.active if each.is_done]
        self.active = [each for each in self.active if not each.is_done]
        for each in finished:
            each.cache = None
            self.proposer.release(each)
        return finished

    def _unread_rows(self) -> tuple[dict[KVCache, Segment], dict[Sequence, int], int]:
        """What the pass carries: segments of prefixes, the number of unread rows of each text; and what is left.

        That is how many more rows may give logits. Each text that has one unread row gets it; those with more, of
        prompts or forced tokens, share what is left.
        """
        request, prefixes = self.plan.request, {}
        counts = {each: 1 for each in self.active if each.unread == 1 and not each.unread_prefixes}
        room, logit_room = request.rows - len(counts), request.logit_rows - len(self.active)
        for each in self.active:
            if each in counts:
                continue
            for cache in each.unread_prefixes:
                if room and cache not in prefixes:
                    prefixes[cache] = each.prefix_segment(cache, room)
                    room -= len(prefixes[cache].ids)
            # A prefix takes all the room before it is left unfinished, so with some left they are all read.
            if not room:
                continue
            count = min(each.unread, room)
            # Of one row that gives logits there is room for each text.
            if (excess := each.logit_rows(count) - 1 - logit_room) > 0:
                count -= excess
            counts[each] = count
            room -= count
            logit_room -= max(0, each.logit_rows(count) - 1)
        return prefixes, counts, logit_room


def alone(each: Sequence, act: Callable[[], Result]) -> Result | None:
    """What `act` gives. If it fails, as by a grammar that gives up, that text ends, and the others of the batch go on.

    What the machine refuses is no fault of the text, and is raised.
    """
    try:
        return act()
    except (OSError, MemoryError):
        raise
    except BloomdeskError as error:
        each.fail(error)
    except Exception as error:
        failure = BloomdeskError(f"unexpected {type(error).__name__}: {error}", "report it")
        failure.__cause__ = error
        each.fail(failure)
    return None
