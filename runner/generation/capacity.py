"""Capacity: how many sequences go together, and how many rows a pass may carry, by the memory plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from runner.errors import BloomdeskError
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, memory_plan
from runner.generation.sequence import Request
from runner.generation.speculation.cost import SLOPE
from runner.generation.speculation.policy import MOST_DRAFT_TOKENS
from runner.generation.speculation.proposer import Proposer
from runner.model.kv_cache import whole_lanes

# More sequences at a time hardly save anything: their pass computes for longer than a disk reads.
MOST_AT_A_TIME = 64
# By this fraction a pass may read more for being larger, which resident weights are given up for.
SHARE_FOR_ROWS = 0.1
# Rows of a pass for the forced tokens of a text, if it has a grammar.
FORCED_ROWS = 128
# How much faster memory is than a disk; it decides only how many sequences are worth their RAM.
MEMORY_TO_DISK = 10.0


class Sharing(Protocol):
    """What texts share: `positions` of prefixes, each counted once."""

    positions: int

    def shared(self, number: int) -> int:
        """Number of the first positions of text `number` that are those of prefixes."""


class Planner:
    """Finds the capacity for `requests`, with the draft tokens and the draft model of `proposer`.

    `base` says what all of them need together, in passes without rows; its caches are sorted, the largest first.
    `rows` are those that come before the next token of each, by default of its prompt.
    """

    def __init__(
        self,
        base: MemoryRequest,
        requests: Sequence[Request],
        proposer: Proposer,
        prefixes: Sharing,
        rows: Sequence[int] | None = None,
    ) -> None:
        rows = rows or list(map(first_rows, requests))
        self._prompts = sorted(rows, reverse=True)
        self._longest = max(self._prompts[0], *map(_forced_rows, requests))
        shared = [prefixes.shared(number) for number in range(len(requests))]
        sharing = zip(requests, shared, strict=True)
        joined = max((request.capacity for request, count in sharing if count), default=0)
        self._base = replace(base, joined=joined)
        self._prefix_positions = prefixes.positions
        # What the prefixes leave of each prompt and of each cache, the most first.
        self._rest_rows = _rests(rows, shared)
        self._rest_positions = _rests((whole_lanes(request.capacity) for request in requests), shared)
        self._draft_tokens = proposer.most_tokens(max(request.max_new_tokens for request in requests))
        if any(request.grammar and request.sampling.logprobs is not None for request in requests):
            # Rows of forced tokens give logits then.
            self._draft_tokens = max(self._draft_tokens, MOST_DRAFT_TOKENS)
        # Rows of prompts that give logits.
        self._scored_rows = sum(
            count for request, count in zip(requests, rows, strict=True) if request.scores_prompt
        )
        self._draft = proposer.draft

    def plan(self, batch: int | None) -> MemoryPlan:
        """The plan for up to `batch` sequences at a time; by default the one with the most tokens a second.

        Raises `BloomdeskError` if the RAM is too little for the largest request alone.
        """
        try:
            best = self._largest(1)
        except BloomdeskError as error:
            if len(self._prompts) == 1:
                raise
            positions = f"{self._base.capacities[0]:,} tokens of prompt and output"
            raise BloomdeskError(
                f"{error.message}, for the longest of the prompts: {positions}", error.hint
            ) from error
        for count in range(2, min(batch or MOST_AT_A_TIME, len(self._prompts)) + 1):
            if not self._request(count, count, count).fits:
                break
            found = self._largest(count)
            if batch or worth(found) > worth(best):
                best = found
        return best

    def all_together(self) -> MemoryPlan:
        """The plan for passes that carry all of them. Raises `BloomdeskError` if the RAM is too little for that."""
        return self._largest(len(self._prompts))

    def _largest(self, batch: int) -> MemoryPlan:
        """The plan with the largest passes for `batch` sequences that are worth their RAM."""
        # A row for each sequence is needed: this raises if it does not fit.
        plan = memory_plan(self._request(batch, batch, batch))
        room = plan.request.activations + plan.unused
        room += min(plan.resident_bytes, SHARE_FOR_ROWS * plan.streamed_bytes)
        logit_rows, draft_tokens = batch, self._draft_tokens
        while draft_tokens and logit_rows == batch:
            wanted = batch * (1 + draft_tokens)
            if self._request(batch, wanted, wanted).activations <= room:
                logit_rows = wanted
            draft_tokens //= 2
        logit_rows = self._with_scored_rows(batch, logit_rows, room)

        def is_cheap(rows: int) -> bool:
            return self._request(batch, rows, logit_rows).activations <= room

        wanted = sum(self._prompts[:batch])
        wanted -= self._saved(wanted, self._rest_rows[:batch])
        rows = _most(logit_rows, max(logit_rows, wanted), is_cheap)
        # A prompt that fits into one pass as a whole never takes two.
        whole = max(rows, self._longest)
        rows = _most(logit_rows, whole, lambda rows: self._request(batch, rows, logit_rows).fits)
        return memory_plan(self._request(batch, rows, logit_rows))

    def _with_scored_rows(self, batch: int, logit_rows: int, room: int) -> int:
        """`logit_rows` and as many more, for the prompts' log-probabilities, as `room` bytes of activations allow."""
        if not self._scored_rows:
            return logit_rows

        def is_cheap(rows: int) -> bool:
            return self._request(batch, rows, rows).activations <= room

        return _most(logit_rows, logit_rows + self._scored_rows, is_cheap)

    def _request(self, batch: int, rows: int, logit_rows: int) -> MemoryRequest:
        capacities = self._base.capacities[:batch]
        draft = self._draft.nbytes(batch, capacities[0]) if self._draft else 0
        shared = self._saved(sum(map(whole_lanes, capacities)), self._rest_positions[:batch])
        return replace(
            self._base, capacities=capacities, rows=rows, logit_rows=logit_rows, draft=draft, shared=shared
        )

    def _saved(self, whole: int, rests: Sequence[int]) -> int:
        """How much less than `whole` is enough for any texts at a time: all prefixes, and of each text the rest."""
        return max(0, whole - sum(rests) - self._prefix_positions)


def first_rows(request: Request) -> int:
    """Rows of the prompt and of the tokens that must follow it."""
    forced = request.grammar.forced_tokens if request.grammar else 0
    return min(request.capacity, len(request.prompt_ids) + forced)


def _rests(wholes: Iterable[int], shared: Sequence[int]) -> list[int]:
    return sorted((whole - count for whole, count in zip(wholes, shared, strict=True)), reverse=True)


def _forced_rows(request: Request) -> int:
    return min(request.capacity, FORCED_ROWS) if request.grammar else 0


def worth(plan: MemoryPlan) -> float:
    """Tokens for each byte of weights that is computed with; a streamed byte counts `MEMORY_TO_DISK` times."""
    computed = sum(plan.request.chunks) * (1 + SLOPE * (plan.request.batch - 1))
    return plan.request.batch / max(computed, MEMORY_TO_DISK * plan.streamed_bytes)


def _most(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, by bisection; `least` is taken to fit."""
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least
