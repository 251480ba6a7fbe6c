"""Capacity: how many sequences go together, and how many rows a pass may carry, by the memory plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from runner.errors import BloomdeskError
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, memory_plan
from runner.generation.sequence import Request
from runner.generation.speculation.cost import SLOPE
from runner.generation.speculation.proposer import Proposer

# More sequences at a time hardly save anything: their pass computes for longer than a disk reads.
MOST_AT_A_TIME = 64
# Fraction of resident weights that may be given up for larger passes.
SHARE_FOR_ROWS = 0.1
# How much faster memory is than a disk; it decides only how many sequences are worth their RAM.
MEMORY_TO_DISK = 10.0


@dataclass(frozen=True)
class Capacity:
    """`batch` sequences at a time, and `rows` rows in a pass, of which `logit_rows` give logits."""

    batch: int
    rows: int
    logit_rows: int
    memory_plan: MemoryPlan


class Planner:
    """Finds the capacity for `requests`, with the draft tokens and the draft model of `proposer`.

    `base` says what they need if all of them go together, in passes without rows.
    """

    def __init__(self, base: MemoryRequest, requests: Sequence[Request], proposer: Proposer) -> None:
        self._base = base
        self._prompts = sorted((len(request.prompt_ids) for request in requests), reverse=True)
        self._draft_tokens = proposer.most_tokens(max(request.max_new_tokens for request in requests))
        self._draft = proposer.draft

    def plan(self, batch: int | None) -> Capacity:
        """The capacity for up to `batch` sequences at a time; by default for the most tokens a second.

        Raises `BloomdeskError` if the RAM is too little for the largest request alone.
        """
        best = self._largest_alone()
        for count in range(2, min(batch or MOST_AT_A_TIME, len(self._prompts)) + 1):
            try:
                found = self._fitting(count)
            except BloomdeskError:
                break
            if batch or self._worth(found) > self._worth(best):
                best = found
        return best

    def without_draft(self, found: Capacity) -> Capacity:
        """The same capacity without the draft model; weights that are resident stay so."""
        self._draft = None
        return self._capacity(found.batch, found.rows, found.logit_rows, found.memory_plan.resident)

    def _largest_alone(self) -> Capacity:
        try:
            return self._fitting(1)
        except BloomdeskError as error:
            if len(self._prompts) == 1:
                raise
            positions = f"{self._base.capacities[0]:,} tokens of prompt and output"
            raise BloomdeskError(
                f"{error.message}, for the longest of the prompts: {positions}", error.hint
            ) from error

    def _worth(self, found: Capacity) -> float:
        """Tokens for each byte of weights that is computed with; a streamed byte counts `MEMORY_TO_DISK` times."""
        computed = sum(self._base.chunks) * (1 + SLOPE * (found.batch - 1))
        return found.batch / max(computed, MEMORY_TO_DISK * found.memory_plan.streamed_bytes)

    def _fitting(self, batch: int) -> Capacity:
        """The capacity for `batch` sequences, with fewer draft tokens and rows if these would take too much RAM."""
        # A row for each sequence is needed: this raises if it does not fit.
        plan = self._capacity(batch, batch, batch).memory_plan
        room = plan.activations + plan.unused
        room += SHARE_FOR_ROWS * min(plan.resident_bytes, plan.streamed_bytes)
        logit_rows, draft_tokens = batch, self._draft_tokens
        while draft_tokens and logit_rows == batch:
            wanted = batch * (1 + draft_tokens)
            if self._request(batch, wanted, wanted).activations <= room:
                logit_rows = wanted
            draft_tokens //= 2
        wanted = max(logit_rows, sum(self._prompts[:batch]))
        rows = _most(
            logit_rows, wanted, lambda rows: self._request(batch, rows, logit_rows).activations <= room
        )
        # A prompt that fits into one pass as a whole never takes two.
        whole = max(rows, self._prompts[0])
        try:
            return self._capacity(batch, whole, logit_rows)
        except BloomdeskError:
            rows = _most(logit_rows, whole, lambda rows: self._fits(batch, rows, logit_rows))
            return self._capacity(batch, rows, logit_rows)

    def _fits(self, batch: int, rows: int, logit_rows: int) -> bool:
        try:
            self._capacity(batch, rows, logit_rows)
        except BloomdeskError:
            return False
        return True

    def _request(self, batch: int, rows: int, logit_rows: int) -> MemoryRequest:
        capacities = self._base.capacities[:batch]
        return replace(self._base, capacities=capacities, rows=rows, logit_rows=logit_rows)

    def _capacity(
        self, batch: int, rows: int, logit_rows: int, keep: frozenset[int] = frozenset()
    ) -> Capacity:
        draft = self._draft.nbytes(batch, self._base.capacities[0]) if self._draft else 0
        request = replace(self._request(batch, rows, logit_rows), draft=draft, keep=keep)
        return Capacity(batch, rows, logit_rows, memory_plan(request))


def _most(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, by bisection; `least` is taken to fit."""
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least
