"""Scores of given texts: log-probabilities of their tokens, with as many texts in a pass as the RAM has room for.

texts ──> segments of a pass, the last of them cut if it does not fit ──> logits of the scored rows alone ──> scores
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from runner.errors import BloomdeskError
from runner.generation.capacity import MEMORY_TO_DISK
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, memory_plan
from runner.generation.scoring import TokenScore, score
from runner.generation.sequence import no_numbers
from runner.generation.speculation.cost import SLOPE
from runner.model.forward import ModelRunner, OnPart
from runner.model.kv_cache import KVCache, Segment, whole_lanes

# Rows of a pass that are tried, the most first.
ROW_COUNTS = (2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
# Rows beyond this fraction of the best worth are not worth their RAM.
GOOD_ENOUGH = 0.98


@dataclass(frozen=True)
class Text:
    """Token `ids` of a text, of which those from position `first` on, at least 1, are scored."""

    index: int
    ids: Sequence[int]
    first: int

    @property
    def rows(self) -> int:
        """Rows of passes; the last token predicts nothing that is asked for."""
        return len(self.ids) - 1


@dataclass(eq=False)
class ScoredText:
    """A text and the scores of its tokens from `text.first` on."""

    text: Text
    scores: list[TokenScore] = field(default_factory=list)
    cache: KVCache | None = None

    @property
    def logprob(self) -> float:
        """The log-probability of all scored tokens together."""
        return sum(each.logprob for each in self.scores)

    @property
    def is_greedy(self) -> bool:
        """Whether each scored token is the likeliest one at its place."""
        return all(each.is_greedy for each in self.scores)


class Scorer:
    """Scores `texts` in their order; each yields its scores as soon as they are known."""

    def __init__(
        self,
        model: ModelRunner,
        texts: Iterable[Text],
        plan: MemoryPlan,
        on_part: OnPart | None = None,
    ) -> None:
        self.model, self.plan = model, plan
        self.waiting = deque(ScoredText(text) for text in texts)
        self.active: list[ScoredText] = []
        self.passes = 0
        self._on_part = on_part
        model.weights.stream.arrange(plan.resident, plan.buffers)

    def run(self) -> Iterator[ScoredText]:
        """Yields each text as soon as it is scored."""
        while self.active or self.waiting:
            yield from self.step()

    def step(self) -> list[ScoredText]:
        """The texts that are scored with one more pass. After an exception, the next step makes the pass again."""
        segments = self._segments()
        found = self.model.forward_all(list(segments.values()), self._on_part) if segments else []
        self.passes += bool(segments)
        for each, logits in zip(segments, found, strict=True):
            if len(logits) and not math.isfinite(float(logits.max())):
                raise no_numbers(each.cache)
            for row in logits:
                token = each.text.ids[each.text.first + len(each.scores)]
                each.scores.append(score(row, token, 1))
        finished = [each for each in self.active if each.cache is None or each.cache.length == each.text.rows]
        self.active = [each for each in self.active if each not in finished]
        for each in finished:
            each.cache = None
        return finished

    def _segments(self) -> dict[ScoredText, Segment]:
        """The next rows of texts, in their order, as many as the plan has room for."""
        request, segments = self.plan.request, {}
        rows, logit_rows = request.rows, request.logit_rows
        positions = sum(request.capacities) - sum(_positions(each.text) for each in self.active)
        while rows and logit_rows:
            each = next((each for each in self.active if each not in segments), None)
            if each is None:
                if not self.waiting or (self.active and _positions(self.waiting[0].text) > positions):
                    break
                each = self.waiting.popleft()
                each.cache = self.model.new_cache(each.text.rows)
                positions -= _positions(each.text)
                self.active.append(each)
            done, text = each.cache.length, each.text
            count = min(rows, text.rows - done)
            # The row before a scored token gives its logits.
            wanted = min(count, max(0, done + count - (text.first - 1)))
            if wanted > logit_rows:
                count, wanted = count - (wanted - logit_rows), logit_rows
            segments[each] = Segment(text.ids[done : done + count], each.cache, wanted)
            rows, logit_rows = rows - count, logit_rows - wanted
        return segments


def plan_scoring(base: MemoryRequest, texts: Sequence[Text]) -> MemoryPlan:
    """The memory plan with the most rows a second; `base` says what passes without rows and caches need.

    Raises `BloomdeskError` if the RAM is too little for the longest text.
    """
    longest = max(_positions(text) for text in texts)
    everything = sum(_positions(text) for text in texts)
    best, refusal = None, None
    for rows in ROW_COUNTS:
        rows = min(rows, sum(text.rows for text in texts))
        capacities = (longest, max(0, min(whole_lanes(rows), everything) - longest))
        request = replace(base, capacities=capacities, rows=rows, logit_rows=rows)
        try:
            plan = memory_plan(request)
        except BloomdeskError as error:
            refusal = error
            continue
        if best is None or GOOD_ENOUGH * _worth(plan) > _worth(best):
            best = plan
    if best is None:
        raise BloomdeskError(
            f"{refusal.message}, for a text of {longest:,} tokens", refusal.hint
        ) from refusal
    return best


def _worth(plan: MemoryPlan) -> float:
    """Rows for each byte of weights that is computed with; a streamed byte counts `MEMORY_TO_DISK` times."""
    rows = plan.request.rows
    computed = sum(plan.request.chunks) * (1 + SLOPE * (rows - 1))
    return rows / max(computed, MEMORY_TO_DISK * plan.streamed_bytes)


def _positions(text: Text) -> int:
    return whole_lanes(text.rows)


def windows(ids: Sequence[int], context: int, stride: int) -> Iterator[Text]:
    """A long text in windows of `context` tokens, each `stride` further; every token but the first is scored once.

    As https://huggingface.co/docs/transformers/perplexity describes it.
    """
    done = 1
    for index, begin in enumerate(range(0, len(ids), stride)):
        end = min(begin + context, len(ids))
        if end > done:
            yield Text(index, ids[begin:end], done - begin)
            done = end
        if end == len(ids):
            return
