"""Scores of given texts: log-probabilities of their tokens, with as many texts in a pass as the RAM has room for.

texts ──> segments of a pass, the last of them cut if it does not fit ──> logits of the scored rows alone ──> scores

What several texts begin with is a segment of its own before theirs, and its scores are those of each of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from runner.errors import BloomdeskError
from runner.generation.capacity import MEMORY_TO_DISK
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, memory_plan
from runner.generation.scoring import TokenScore, score
from runner.generation.sequence import no_numbers
from runner.generation.shared_prefixes import SharedPrefixes
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
    """A text, number `number` of the scorer's, and once it is done the scores of its tokens from `text.first` on."""

    number: int
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


@dataclass
class _CacheScores:
    """Scores of the tokens that a cache's rows predict, from position `first` of the text on."""

    first: int
    found: list[TokenScore] = field(default_factory=list)


class Scorer:
    """Scores `texts` in their order; each yields its scores as soon as they are known."""

    def __init__(
        self,
        model: ModelRunner,
        texts: Sequence[Text],
        plan: MemoryPlan,
        on_part: OnPart | None = None,
        prefixes: SharedPrefixes | None = None,
    ) -> None:
        """`prefixes` are those of the texts whose next token is the same as well; by default none."""
        self.model, self.plan = model, plan
        self.texts = texts
        self.waiting = deque(ScoredText(number, text) for number, text in enumerate(texts))
        self.active: list[ScoredText] = []
        self.passes = 0
        self._on_part = on_part
        self._prefixes = prefixes or SharedPrefixes([])
        # Of the caches in use, those of prefixes too.
        self._scores: WeakKeyDictionary[KVCache, _CacheScores] = WeakKeyDictionary()
        model.arrange(plan)

    def run(self) -> Iterator[ScoredText]:
        """Yields each text as soon as it is scored."""
        while self.active or self.waiting:
            yield from self.step()

    def step(self) -> list[ScoredText]:
        """The texts that are scored with one more pass. After an exception, the next step makes the pass again."""
        carried = self._carried()
        segments = [segment for _, segment in carried]
        found = self.model.forward_all(segments, self._on_part) if segments else []
        self.passes += bool(segments)
        for (text, segment), logits in zip(carried, found, strict=True):
            if len(logits) and not math.isfinite(float(logits.max())):
                raise no_numbers(segment.cache)
            scores = self._scores[segment.cache]
            for row in logits:
                scores.found.append(score(row, text.ids[scores.first + len(scores.found)], 1))
        finished = [each for each in self.active if each.cache is None or each.cache.is_full]
        self.active = [each for each in self.active if each not in finished]
        for each in finished:
            each.scores = self._scores_of(each)
            each.cache = None
        return finished

    def _carried(self) -> list[tuple[Text, Segment]]:
        """The next rows of texts, in their order, as many as the plan has room for; each with a text that has them."""
        request, carried = self.plan.request, []
        rows, logit_rows, place = request.rows, request.logit_rows, 0
        while rows and logit_rows:
            if place == len(self.active) and not self._begin_next():
                break
            text, chain = self.active[place].text, self.active[place].cache.chain
            place += 1
            seen = {segment.cache for _, segment in carried}
            for cache in chain:
                # One that is cut takes all the room, so its texts go no further.
                if cache.is_full or cache in seen or not (rows and logit_rows):
                    continue
                done = cache.length
                count = min(rows, cache.capacity - done)
                # The row before a scored token gives its logits.
                wanted = min(count, max(0, done + count - (self._scores[cache].first - 1)))
                if wanted > logit_rows:
                    count, wanted = count - (wanted - logit_rows), logit_rows
                carried.append((text, Segment(text.ids[done : done + count], cache, wanted)))
                rows, logit_rows = rows - count, logit_rows - wanted
        return carried

    def _begin_next(self) -> bool:
        """Whether there was room for the cache of the next text."""
        if not self.waiting:
            return False
        each, active = self.waiting[0], [other.cache for other in self.active]
        each.cache = self._prefixes.new_cache(
            self.model, each.number, each.text.rows, active, self.plan.request.positions
        )
        if each.cache is None:
            return False
        self.active.append(self.waiting.popleft())
        for cache in each.cache.chain:
            texts = self._prefixes.members(each.number, cache.capacity)
            first = min(self.texts[number].first for number in texts)
            self._scores.setdefault(cache, _CacheScores(max(first, cache.start + 1)))
        return True

    def _scores_of(self, each: ScoredText) -> list[TokenScore]:
        """The scores of a text that was read; a prefix may have more, for a text whose scores begin earlier."""
        parts = [self._scores[cache] for cache in each.cache.chain]
        return [found for part in parts for found in part.found[max(0, each.text.first - part.first) :]]


def plan_scoring(
    base: MemoryRequest, texts: Sequence[Text], prefixes: SharedPrefixes | None = None
) -> MemoryPlan:
    """The memory plan with the most rows a second; `base` says what passes without rows and caches need.

    `prefixes` are those of the texts; by default none. Raises `BloomdeskError` if the RAM is too little for the longest
    text.
    """
    longest = max(_positions(text) for text in texts)
    prefixes = prefixes or SharedPrefixes([])
    shared = [prefixes.shared(number) for number in range(len(texts))]
    everything = prefixes.positions + sum(map(_positions, texts)) - sum(shared)
    all_rows = prefixes.positions + sum(text.rows for text in texts) - sum(shared)
    joined = max((text.rows for text, count in zip(texts, shared, strict=True) if count), default=0)
    best, refusal = None, None
    for rows in ROW_COUNTS:
        rows = min(rows, all_rows)
        # Caches are of whole lanes, so a pass needs more positions than it has rows.
        positions = whole_lanes(-(-rows * everything // all_rows))
        capacities = (longest, max(0, positions - longest))
        request = replace(base, capacities=capacities, rows=rows, logit_rows=rows, joined=joined)
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
