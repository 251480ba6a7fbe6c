"""A batch: which sequences are in the next pass, with which rows, and what the pass gave each of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import torch

from runner.generation.capacity import Planner
from runner.generation.sequence import Request, Sequence
from runner.generation.speculation.proposer import DraftTokens, Proposer
from runner.model.forward import ModelRunner, OnPart
from runner.model.kv_cache import Segment


class Batch:
    """Requests in the order given, up to `capacity.batch` of them in a pass, and what they took together.

    A sequence that ends makes room, in the passes and in RAM, for the next. The rows of a joining prompt share the pass
    with the single rows of the others; a very long prompt, or many at once, take several passes.
    """

    def __init__(
        self,
        model: ModelRunner,
        requests: Iterable[Request],
        planner: Planner,
        batch: int | None,
        proposer: Proposer,
        on_part: OnPart | None,
    ) -> None:
        """Arranges the weights by the memory plan. Raises `BloomdeskError` if the RAM is too little."""
        self.model = model
        self.sequences = tuple(Sequence(index, request) for index, request in enumerate(requests))
        self.passes = 0
        self._on_part = on_part
        self._active: list[Sequence] = []
        self._waiting = deque(self.sequences)
        self._proposer = proposer
        self._stream = model.weights.stream
        self._read_before = self._stream.traffic.bytes_read
        self._planner = planner
        self.capacity = planner.plan(batch)
        self._arrange()

    @property
    def active(self) -> int:
        """Number of sequences that are in the passes now."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Number of sequences that have not begun."""
        return len(self._waiting)

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

    @property
    def speculation(self) -> str:
        """What proposes draft tokens now, in words."""
        return self._proposer.words

    def run(self) -> Iterator[Sequence]:
        """Yields each sequence as soon as it is done."""
        while self._active or self._waiting:
            yield from self.step()

    def step(self) -> list[Sequence]:
        """The sequences that end with one more pass. After an exception, the next step makes the pass again."""
        self._admit()
        began = time.perf_counter()
        for each in self._active:
            # An interruption may have come right after a pass.
            each.rewind()
        ready = [each for each in self._active if each.ids]
        segments = self._prompt_segments(len(ready))
        other_rows = sum(len(segment.ids) for segment in segments.values())
        room = min(self.capacity.rows - len(ready) - other_rows, self.capacity.logit_rows - len(self._active))
        drafts = self._proposer.propose(ready, other_rows, max(0, room))
        segments |= {each: each.segment(drafts[each].tokens) for each in ready}
        read = self.bytes_read
        accepted = {}
        for each, logits in zip(segments, self._pass(segments), strict=True):
            tokens = drafts.get(each, DraftTokens()).tokens
            accepted[each] = each.verify(logits, tokens, self.model.weights.model.eos_token_id)
        self._proposer.learn([(drafts[each], accepted[each]) for each in ready], other_rows)
        seconds, nbytes = time.perf_counter() - began, self.bytes_read - read
        for each in segments:
            each.passes += 1
            each.seconds += seconds / len(segments)
            each.bytes_read += nbytes // len(segments)
        if self._proposer.retire_draft(len(ready), self._stream.streamed_bytes):
            self.capacity = self._planner.without_draft(self.capacity)
            self._arrange()
        return self._dismiss()

    def _arrange(self) -> None:
        plan = self.capacity.memory_plan
        self._stream.arrange(plan.resident, plan.buffers)

    def _admit(self) -> None:
        """Let waiting sequences join in their order, if there is room."""
        while self._waiting and len(self._active) < self.capacity.batch:
            joining = self._waiting[0]
            joining.cache = self.model.new_cache(joining.request.capacity)
            self._active.append(self._waiting.popleft())

    def _dismiss(self) -> list[Sequence]:
        """The sequences that are done, after their RAM is freed."""
        finished = [each for each in self._active if each.stop_reason]
        self._active = [each for each in self._active if not each.stop_reason]
        for each in finished:
            each.cache = None
            self._proposer.release(each)
        return finished

    def _prompt_segments(self, ready: int) -> dict[Sequence, Segment]:
        """The next rows of unfinished prompts that fit into a pass beside `ready` rows of others."""
        room = self.capacity.rows - ready
        segments = {}
        for each in self._active:
            if not each.ids and room:
                segments[each] = each.prompt_segment(room)
                room -= len(segments[each].ids)
        return segments

    def _pass(self, segments: Mapping[Sequence, Segment]) -> list[torch.Tensor]:
        """Logits of each segment; the cost model learns what the pass took."""
        traffic, cost = self._stream.traffic, self._proposer.cost
        loaded, waited = traffic.bytes_loaded, traffic.waiting_seconds
        fetched, reading = traffic.bytes_read, traffic.reading_seconds
        began = time.perf_counter()
        logits = self.model.forward_all(list(segments.values()), self._on_part)
        computing = time.perf_counter() - began - (traffic.waiting_seconds - waited)
        fetched, reading = traffic.bytes_read - fetched, traffic.reading_seconds - reading
        disk_seconds = self._stream.streamed_bytes * reading / fetched if fetched else cost.disk_seconds
        rows = sum(len(segment.ids) for segment in segments.values())
        # A pass that loads resident weights is slower than all later ones.
        is_rough = traffic.bytes_loaded > loaded
        cost.learn(rows, max(0.0, computing), disk_seconds, is_rough=is_rough)
        self.passes += 1
        return logits
