"""Prompts that share their passes: who is in the next pass, with which rows, and what it gave each of them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runner.errors import BloomdeskError
from runner.generation.capacity import Planner
from runner.generation.sequence import Continuation, Request
from runner.generation.speculation.cost import Pace
from runner.generation.speculation.draft_model import Draft
from runner.generation.speculation.policy import MOST_PROPOSED
from runner.generation.speculation.proposer import Proposals, Trial
from runner.model.kv_cache import Segment

if TYPE_CHECKING:
    from runner.generation.model import Model, OnPart

LOOKUP, OFF = "lookup", "off"


class Batch:
    """Requests in the order given, up to `capacity.batch` of them in a pass, and what all of it took.

    Those that are done make room, in a pass and in RAM, for those that wait. A joining prompt's rows are in the same
    pass as the single rows of the others; a very long one, or many at once, go through several.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        batch: int | None,
        speculate: str,
        draft: Path | str | None,
        on_part: OnPart | None,
    ) -> None:
        """Shares the RAM out for all of it. Raises `BloomdeskError` where it is too little, or a draft unsuitable."""
        if speculate not in (LOOKUP, OFF):
            raise BloomdeskError(f"{speculate!r} is no way to speculate", f"choose {LOOKUP} or {OFF}")
        if batch is not None and batch < 1:
            raise BloomdeskError(f"a batch must be of at least 1 prompt, found {batch}")
        self.model = model
        self.continuations = tuple(Continuation(index, request) for index, request in enumerate(requests))
        self.passes = 0
        self._on_part = on_part
        self._active: list[Continuation] = []
        self._waiting = deque(self.continuations)
        self._pace = Pace()
        self._read_before = model.weights.stream.traffic.bytes_read
        opened = Draft.open(Path(draft), model) if draft else None
        self._proposals = Proposals(self._pace, looks_up=speculate == LOOKUP, draft=opened)
        speculates = speculate == LOOKUP or opened is not None
        most = max((request.max_new_tokens for request in requests), default=1) - 1
        self._planner = Planner(
            model, requests, min(MOST_PROPOSED, most) if speculates else 0, opened.nbytes if opened else None
        )
        self.capacity = self._planner.plan(batch)
        self._arrange()

    @property
    def active(self) -> int:
        """Prompts that are in the passes now."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Prompts that have not begun."""
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """New tokens of all prompts."""
        return sum(len(each.ids) for each in self.continuations)

    @property
    def bytes_read(self) -> int:
        """Weights that the passes took from the files: what is streamed once for each pass, what is resident once."""
        return self.model.weights.stream.traffic.bytes_read - self._read_before

    @property
    def proposed(self) -> int:
        """Tokens that passes carried on trial."""
        return self._proposals.proposed

    @property
    def accepted(self) -> int:
        """Of those, the ones that were right."""
        return self._proposals.accepted

    @property
    def drafting_seconds(self) -> float:
        return self._proposals.drafting_seconds

    @property
    def speculation(self) -> str:
        """What proposes now, in words."""
        names = [LOOKUP] * self._proposals.looks_up + ["draft"] * (self._proposals.draft is not None)
        return " and ".join(names) or OFF

    def run(self) -> Iterator[Continuation]:
        """Each continuation as soon as it is done."""
        while self._active or self._waiting:
            yield from self.step()

    def step(self) -> list[Continuation]:
        """One pass; the continuations that it ended. After one that an exception ended, the next makes it again."""
        self._admit()
        began = time.perf_counter()
        for each in self._active:  # an interruption may have come right after a pass
            each.cache.rewind(min(each.cache.length, each.settled))
        ready = [each for each in self._active if each.ids]
        segments = self._prompt_segments(len(ready))
        other_rows = sum(len(segment.ids) for segment in segments.values())
        room = min(self.capacity.rows - len(ready) - other_rows, self.capacity.logit_rows - len(self._active))
        trials = self._proposals.make(ready, other_rows, max(0, room))
        segments |= {each: each.segment(trial.tokens) for each, trial in trials.items()}
        logits, nbytes = self._pass(segments)
        accepted = {
            each: self._take(each, rows, trials.get(each, Trial()))
            for each, rows in zip(segments, logits, strict=True)
        }
        self._proposals.learn([(trial, accepted[each]) for each, trial in trials.items()], other_rows)
        seconds = time.perf_counter() - began
        for each in segments:
            each.passes += 1
            each.seconds += seconds / len(segments)
            each.bytes_read += nbytes // len(segments)
        if self._proposals.retire_draft(len(ready), self.model.weights.stream.streamed_bytes):
            self.capacity = self._planner.without_draft(self.capacity)
            self._arrange()
        return self._dismiss()

    def _arrange(self) -> None:
        shares = self.capacity.shares
        self.model.weights.stream.arrange(shares.resident, shares.buffers)

    def _admit(self) -> None:
        """Let those in for whom there is room, in their order."""
        while self._waiting and len(self._active) < self.capacity.batch:
            joining = self._waiting[0]
            joining.cache = self.model.new_cache(joining.request.capacity)
            self._proposals.join(joining)
            self._active.append(self._waiting.popleft())

    def _dismiss(self) -> list[Continuation]:
        """Those that are done, their RAM given back."""
        finished = [each for each in self._active if each.stop_reason]
        self._active = [each for each in self._active if not each.stop_reason]
        for each in finished:
            each.cache = None
            self._proposals.leave(each)
        return finished

    def _prompt_segments(self, ready: int) -> dict[Continuation, Segment]:
        """The next rows of prompts that are not through, as far as a pass has room beside `ready` rows of others."""
        room = self.capacity.rows - ready
        segments = {}
        for each in self._active:
            if not each.ids and room:
                segments[each] = each.prompt_segment(room)
                room -= len(segments[each].ids)
        return segments

    def _pass(self, segments: Mapping[Continuation, Segment]) -> tuple[list[torch.Tensor], int]:
        """Logits for each, and the bytes that the pass took from the files."""
        stream = self.model.weights.stream
        traffic = stream.traffic
        read, loaded, waited = traffic.bytes_read, traffic.bytes_loaded, traffic.waiting_seconds
        fetched, reading = traffic.bytes_fetched, traffic.reading_seconds
        began = time.perf_counter()
        logits = self.model.forward_all(list(segments.values()), self._on_part)
        computing = time.perf_counter() - began - (traffic.waiting_seconds - waited)
        fetched, reading = traffic.bytes_fetched - fetched, traffic.reading_seconds - reading
        disk_seconds = stream.streamed_bytes * reading / fetched if fetched else self._pace.disk_seconds
        rows = sum(len(segment.ids) for segment in segments.values())
        # What comes into RAM to stay makes a pass slower than all later ones.
        is_rough = traffic.bytes_loaded > loaded
        self._pace.learn(rows, max(0.0, computing), disk_seconds, is_rough=is_rough)
        self.passes += 1
        return logits, traffic.bytes_read - read

    def _take(self, each: Continuation, logits: torch.Tensor, trial: Trial) -> int:
        """Add the tokens that a pass gave a sequence, and have its cache forget the rows that were wrong.

        Of the tokens on trial so many were right.
        """
        if not len(logits):
            return 0
        if trial.tokens and not math.isfinite(float(logits[0].float().max())):
            # A row on trial that overflows would make those before it no numbers, since 0 times infinity is none. So
            # this pass says nothing, and the next ones of this sequence are made without.
            each.is_unsound = True
            each.cache.rewind(each.settled)
            return 0
        # In float32, as the reference does it: the lowest id wins a tie.
        likeliest = [int(row.float().argmax()) for row in logits]
        accepted = each.take(likeliest, trial.tokens, self.model.weights.model.eos_token_id) - 1
        each.cache.rewind(each.settled)
        return accepted
